"""Instructions while a stream is recorded: complete but for the token flags, which come later."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import NamedTuple

from tvmstruct.vta.config import Memory
from tvmstruct.vta.instructions import (
    Alu,
    AluOp,
    Deps,
    Gemm,
    Instruction,
    Load,
    Store,
    Transfer,
    Unit,
)

# By the unit that pushes and the one that pops: the names of their flags.
PUSH = {
    (Unit.LOAD, Unit.COMPUTE): "push_next",
    (Unit.COMPUTE, Unit.LOAD): "push_prev",
    (Unit.COMPUTE, Unit.STORE): "push_next",
    (Unit.STORE, Unit.COMPUTE): "push_prev",
}
POP = {
    (Unit.LOAD, Unit.COMPUTE): "pop_prev",
    (Unit.COMPUTE, Unit.LOAD): "pop_next",
    (Unit.COMPUTE, Unit.STORE): "pop_prev",
    (Unit.STORE, Unit.COMPUTE): "pop_next",
}


class Loop(NamedTuple):
    """One dimension of a GEMM or ALU loop nest: its extent and how far each operand moves."""

    extent: int
    dst: int
    src: int
    wgt: int = 0


@dataclass(eq=False)
class Entry:
    """One instruction, and its token flags so far."""

    instruction: Instruction
    flags: set[str] = field(default_factory=set)

    def finished(self) -> Instruction:
        """Return the instruction with its flags."""
        return replace(self.instruction, deps=Deps(**dict.fromkeys(self.flags, True)))

    def set_dram(self, tile: int) -> None:
        """Fill the DRAM address of a transfer in."""
        assert isinstance(self.instruction, Transfer)
        self.instruction = replace(self.instruction, dram_base=tile)


@dataclass(frozen=True)
class Transfer2d:
    """Rows of ``columns`` tiles, ``stride`` apart in DRAM and dense on chip from ``sram`` on."""

    sram: int
    dram: int
    rows: int
    columns: int
    stride: int

    def load(self, memory: Memory) -> Entry:
        """Return the LOAD."""
        return Entry(Load(memory=memory, **self._fields()))

    def store(self) -> Entry:
        """Return the STORE."""
        return Entry(Store(**self._fields()))

    def _fields(self) -> dict[str, int]:
        return {
            "sram_base": self.sram,
            "dram_base": self.dram,
            "y_size": self.rows,
            "x_size": self.columns,
            "x_stride": self.stride,
        }


def gemm(bounds: tuple[int, int], loops: Sequence[Loop], reset: bool) -> Entry:
    """Return a GEMM over ``bounds`` of micro-ops and up to two loops, the outer one first."""
    fields = _loops(bounds, loops, ("dst", "src", "wgt"))
    return Entry(Gemm(reset=reset, **fields))


def alu(op: AluOp, bounds: tuple[int, int], loops: Sequence[Loop], imm: int | None) -> Entry:
    """Return an ALU instruction with an immediate, or with a register where ``imm`` is None."""
    fields = _loops(bounds, loops, ("dst", "src"))
    return Entry(Alu(alu_opcode=op, use_imm=imm is not None, imm=imm or 0, **fields))


def _loops(
    bounds: tuple[int, int], loops: Sequence[Loop], operands: Iterable[str]
) -> dict[str, int]:
    fields = {"uop_bgn": bounds[0], "uop_end": bounds[1]}
    for level, loop in zip(("in", "out"), reversed(loops), strict=False):  # one loop is inner
        fields[f"iter_{level}"] = loop.extent
        for operand in operands:
            fields[f"{operand}_factor_{level}"] = getattr(loop, operand)
    return fields
