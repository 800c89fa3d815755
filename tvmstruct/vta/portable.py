"""Check that simulator and hardware make the same of a program, without running it.

Rules for single instructions are ``rules.RULES`` and ``STATE_RULES``.  ``races`` has those about
units that run side by side: ``race``, ``token-overflow``, ``token-leftover``, ``finish-last``.
``uop-stored`` is a program that changes its own micro-ops.  Broken structure comes first:
``token-bits``, ``deadlock``, ``finish-missing``, ``sram-range``, ``dram-range``, ``dram-base``.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import islice

import numpy as np

from tvmstruct.errors import VtaRunError
from tvmstruct.vta.accesses import Accesses, accesses_of, words_of
from tvmstruct.vta.config import DEFAULT, Config, Memory
from tvmstruct.vta.dram import Dram, decode_words, unpack
from tvmstruct.vta.isa import Instruction, Load, Store, decode_stream
from tvmstruct.vta.queues import Order, described, order
from tvmstruct.vta.races import Finding, find_early_finish, find_races, find_token_faults
from tvmstruct.vta.rules import RULES, STATE_RULES, Level, broken
from tvmstruct.vta.scratchpads import ScratchpadState

__all__ = ["RULES", "STATE_RULES", "Level", "Violation", "check", "register_shift_limit", "verify"]

Violation = Finding
SHOWN = 100


def check(
    program: bytes | Sequence[Instruction],
    dram: bytes | np.ndarray,
    base: int,
    config: Config = DEFAULT,
    level: Level = Level.RTL,
    *,
    state: ScratchpadState | None = None,
    found: Order | None = None,
) -> list[Violation]:
    """Return what breaks a rule of ``level``, at most 100; an empty list is a proof.

    ``dram`` is the image from the physical address ``base`` on; only its micro-ops are read.
    ``state`` is what earlier launches left in the scratchpads, ``found`` the program's order if
    it is known.  Amounts of register shifts are data: only a strict run checks them.
    """
    if isinstance(program, bytes | bytearray | memoryview):
        program = decode_stream(bytes(program), config)
    image = dram if isinstance(dram, np.ndarray) else np.frombuffer(dram, np.uint8)
    try:
        memory = Dram(image, base)
        found = found or order(program)
    except VtaRunError as error:
        return [_of(error)]
    state = state or ScratchpadState(np.zeros((config.depth(Memory.UOP), 3), np.int32))
    walk = _Walk(program, memory, config, level, state.copy())
    return list(islice(_findings(walk, found), SHOWN))


def verify(
    program: Sequence[Instruction],
    dram: bytes | np.ndarray,
    base: int,
    config: Config = DEFAULT,
    level: Level = Level.RTL,
    *,
    state: ScratchpadState | None = None,
    found: Order | None = None,
) -> None:
    """Raise VtaRunError for the first violation that ``check`` finds."""
    violations = check(program, dram, base, config, level, state=state, found=found)
    if violations:
        first, more = violations[0], len(violations) - 1
        rest = f" ({more} more violations)" if more else ""
        index = first.instructions[0] if first.instructions else None
        raise VtaRunError(first.rule, first.message + rest, index)


def register_shift_limit(level: Level) -> int:
    """Return the largest amount that a register shift may read from an accumulator."""
    return 15 if level >= Level.HLS else 31


def _findings(walk: _Walk, found: Order) -> Iterator[Violation]:
    for index in found.sequence:
        yield from walk.step(index)
    yield from find_token_faults(walk.program, found)
    yield from find_early_finish(walk.program, found)
    yield from find_races(walk.program, found, walk.touched, walk.config)


def _of(error: VtaRunError) -> Violation:
    where = () if error.instruction is None else (error.instruction,)
    return Violation(error.rule, where, str(error).removeprefix(f"{error.rule}: "))


class _Walk:
    """Go through a program in order, knowing the micro-ops and which tiles were written."""

    def __init__(
        self,
        program: Sequence[Instruction],
        memory: Dram,
        config: Config,
        level: Level,
        state: ScratchpadState,
    ) -> None:
        self.program, self.memory, self.config, self.state = program, memory, config, state
        self.level = level
        self.touched = [Accesses()] * len(program)
        self.stored = Dram(np.zeros(len(memory.data), np.uint8), memory.base)  # 1: stored to

    def step(self, index: int) -> Iterator[Violation]:
        """Yield what an instruction breaks, and note what it does."""
        instruction = self.program[index]
        try:
            touched = accesses_of(index, instruction, self.state.uops, self.config)
            rows = self._rows(index, instruction, touched)
        except VtaRunError as error:
            yield _of(error)
            return
        self.touched[index] = touched
        words = words_of(instruction, self.state.uops).tobytes()
        wrong = list(broken(self.level, instruction, words, self.config))
        for rule in STATE_RULES:
            if what := rule.check(touched, self.state):
                wrong.append((rule.name, f"{what}; {rule.reason}"))
        for name, what in wrong:
            yield Violation(name, (index,), f"{described(index, instruction)}: {what}")
        if isinstance(instruction, Load) and instruction.memory is Memory.UOP:
            yield from self._load_uops(index, instruction, touched, rows)
        self.state.apply(instruction, touched)

    def _rows(self, index: int, instruction: Instruction, touched: Accesses) -> np.ndarray | None:
        if touched.dram is None or not isinstance(instruction, Load | Store):
            return None
        rows = self.memory.rows(index, instruction, touched.dram)
        if isinstance(instruction, Store):
            self.stored.rows(index, instruction, touched.dram)[...] = 1
        return rows

    def _load_uops(
        self, index: int, i: Load, touched: Accesses, rows: np.ndarray | None
    ) -> Iterator[Violation]:
        if i.is_nop:
            return
        block = np.zeros((i.rows, i.row_tiles, 3), np.int32)
        if rows is not None and touched.dram is not None:
            words = unpack(rows, Memory.UOP, self.config).reshape(-1)
            inside = block[i.y_pad_0 : i.y_pad_0 + i.y_size, i.x_pad_0 : i.x_pad_0 + i.x_size]
            inside[...] = decode_words(words, self.config).reshape(inside.shape)
            if self.stored.rows(index, i, touched.dram).any():
                message = f"{described(index, i)}: this program stores to the micro-ops it loads"
                yield Violation("uop-stored", (index,), message)
        self.state.uops[i.sram_base : i.sram_base + i.rows * i.row_tiles] = block.reshape(-1, 3)
