"""Kernels: the launches of linear steps, run in the simulator."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property

from tvmstruct.ops import Array
from tvmstruct.schedules.registry import Pick, pick_default
from tvmstruct.schedules.vta import vta_chain
from tvmstruct.vta import simulator
from tvmstruct.vta.config import Config
from tvmstruct.vta.cycles import Prediction, predict
from tvmstruct.vta.instructions import Instruction
from tvmstruct.vta.integer import Reorder, Step
from tvmstruct.vta.isa import decode_stream
from tvmstruct.vta.launch import Launch


def make_kernels(
    steps: Sequence[Step], rows: int, config: Config, pick: Pick = pick_default
) -> tuple[Kernel | Reorder, ...]:
    """Return steps as one launch, and what the CPU must move before and after it.

    ``pick`` answers the choices of its schedule.

    Raises VtaError where buffers do not fit, or features move in a way that VTA has nothing for.
    """
    made = vta_chain(steps, rows, config, pick)
    parts = (made.before, Kernel(made.launch), made.after)
    return tuple(part for part in parts if part is not None)


@dataclass(frozen=True, eq=False)
class Kernel:
    """A launch that runs in the simulator.

    The first run is strict: it refuses a stream that hardware would treat differently. What
    follows has the same stream, so it is not checked again.
    """

    launch: Launch
    _checked: threading.Event = field(default_factory=threading.Event, repr=False)

    @property
    def n_out(self) -> int:
        """Features that it yields."""
        return self.launch.y.features

    @cached_property
    def program(self) -> list[Instruction]:
        """The instructions of its stream."""
        return decode_stream(self.launch.insn, self.launch.config)

    @cached_property
    def prediction(self) -> Prediction:
        """The cycles that hardware takes for it."""
        return predict(self.program, self.launch.config)

    def run(self, x: Array) -> Array:
        """Return int8 rows for int8 rows.

        Raises VtaError where the stream is no program for its VTA.
        """
        image = simulate(self.launch, self.program, self.launch.image(x), self._checked.is_set())
        self._checked.set()
        return self.launch.result(image)


def simulate(
    launch: Launch, program: list[Instruction], image: Array, checked: bool = False
) -> Array:
    """Return the memory after a launch on ``image`` (bytes,) uint8."""
    config, base = launch.config, launch.base
    return simulator.simulate(program, image, base, config, strict=not checked).dram
