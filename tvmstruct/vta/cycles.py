"""Cycles of a VTA program, as the hardware description takes them, and what they were spent on."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

from tvmstruct.vta.channel import Dram
from tvmstruct.vta.config import DEFAULT, Config
from tvmstruct.vta.engine import UNITS, Engine, Span
from tvmstruct.vta.instructions import Gemm, Instruction, unit_of
from tvmstruct.vta.timing import jobs, tile_operations

STANDARD = Dram()


@dataclass(frozen=True)
class Prediction:
    """What ``predict`` found of a program.

    ``cycles`` are those from launch to finish, ``busy`` those in which each unit ran an
    instruction, ``matrix_cycles`` those in which the matrix unit multiplied (resets do not), and
    ``read_beats`` those in which the read channel moved data.  ``spans`` has an entry for each
    instruction that was dispatched; ``end`` is -1 where it had not ended at the finish.
    """

    stream: Sequence[Instruction]
    cycles: int
    busy: Mapping[str, int]
    matrix_cycles: int
    read_beats: int
    spans: Sequence[Span]

    @property
    def utilisation(self) -> float:
        """Return the share of cycles in which the matrix unit multiplied."""
        return self.matrix_cycles / self.cycles

    @cached_property
    def heads(self) -> list[int]:
        """Return when each instruction came to the head of its queue."""
        free = [0] * len(UNITS)
        times: list[int] = []
        for instruction, span in zip(self.stream, self.spans, strict=False):
            unit = unit_of(instruction)
            times.append(max(span.queued, free[unit]))
            free[unit] = span.end
        return times

    @cached_property
    def waits(self) -> dict[str, int]:
        """Return the cycles that all units stood still or waited for data, by reason.

        Tokens by name, ``fetch``, and ``dma`` for beats that others on the channel delayed.
        """
        found: dict[str, int] = {"dma": sum(span.memory for span in self.spans)}
        free = [0] * len(UNITS)
        for instruction, span in zip(self.stream, self.spans, strict=False):
            unit = unit_of(instruction)
            if span.start >= 0:
                found[span.reason] = found.get(span.reason, 0) + span.start - free[unit]
                free[unit] = span.end
        found.pop("queue", None)
        return found


def predict(
    stream: Sequence[Instruction], config: Config = DEFAULT, dram: Dram = STANDARD, base: int = 0
) -> Prediction:
    """Return the cycles of a program that lies at byte address ``base``.

    Follows the hardware: a loop count of 0 runs 16384 times.  Raises ``VtaRunError`` where
    the program never finishes.
    """
    engine = Engine(jobs(stream, config, dram), dram, base)
    cycles = engine.run()
    busy = dict.fromkeys(UNITS, 0)
    matrix = 0
    for instruction, span in zip(stream, engine.spans, strict=False):
        if span.end >= 0:
            busy[UNITS[unit_of(instruction)]] += span.end - span.start
            if isinstance(instruction, Gemm) and not instruction.reset:
                matrix += tile_operations(instruction)
    return Prediction(stream, cycles, busy, matrix, engine.channel.busy, engine.spans)
