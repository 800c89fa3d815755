"""VTA instructions and micro-ops as Python values; ``isa`` turns them to bits and back."""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum

from tvmstruct.vta.config import Memory


class Opcode(IntEnum):
    """Bits 0 to 2 of an instruction."""

    LOAD = 0
    STORE = 1
    GEMM = 2
    FINISH = 3
    ALU = 4
    VGEMM = 5  # with the extension "vvma" only


class AluOp(IntEnum):
    """What the vector ALU does; SHR by a negative amount shifts left."""

    MIN = 0
    MAX = 1
    ADD = 2
    SHR = 3
    MUL = 4


class Unit(IntEnum):
    """The three units that run instructions, each with a queue, side by side in this order."""

    LOAD = 0
    COMPUTE = 1
    STORE = 2


@dataclass(frozen=True, slots=True)
class Deps:
    """Tokens taken from and given to the units before and after, in load, compute, store."""

    pop_prev: bool = False
    pop_next: bool = False
    push_prev: bool = False
    push_next: bool = False


NO_DEPS = Deps()


@dataclass(frozen=True, slots=True, kw_only=True)
class Transfer:
    """Rows of tiles between DRAM and a scratchpad; sizes, bases and pads count tiles.

    ``y_size`` rows of ``x_size`` tiles, ``x_stride`` apart in DRAM; ``y_pad_0`` above,
    ``y_pad_1`` below, ``x_pad_0`` left and ``x_pad_1`` right are written as zeros.
    With ``x_size`` 0 it moves nothing and only passes tokens.
    """

    memory: Memory
    sram_base: int = 0
    dram_base: int = 0
    y_size: int = 0
    x_size: int = 0
    x_stride: int = 0
    y_pad_0: int = 0
    y_pad_1: int = 0
    x_pad_0: int = 0
    x_pad_1: int = 0
    deps: Deps = NO_DEPS

    @property
    def is_nop(self) -> bool:
        """Whether nothing moves, pads included."""
        return self.x_size == 0

    @property
    def row_tiles(self) -> int:
        """Tiles of a scratchpad row, pads included; 0 for a NOP."""
        return 0 if self.is_nop else self.x_pad_0 + self.x_size + self.x_pad_1

    @property
    def rows(self) -> int:
        """Scratchpad rows, pads included."""
        return self.y_pad_0 + self.y_size + self.y_pad_1


@dataclass(frozen=True, slots=True, kw_only=True)
class Load(Transfer):
    """DRAM to a scratchpad."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Store(Transfer):
    """The output scratchpad to DRAM: the low bits of accumulators."""

    memory: Memory = Memory.OUT


@dataclass(frozen=True, slots=True, kw_only=True)
class Loops:
    """Micro-ops ``uop_bgn`` to ``uop_end - 1`` in two loops, each adding its factors."""

    reset: bool = False
    uop_bgn: int = 0
    uop_end: int = 1
    iter_out: int = 1
    iter_in: int = 1
    dst_factor_out: int = 0
    dst_factor_in: int = 0
    src_factor_out: int = 0
    src_factor_in: int = 0

    @property
    def tile_ops(self) -> int:
        """Tile operations; 0 where the micro-op range is empty or backwards."""
        return self.iter_out * self.iter_in * max(0, self.uop_end - self.uop_bgn)


@dataclass(frozen=True, slots=True, kw_only=True)
class Gemm(Loops):
    """``acc[dst] += inp[src] @ wgt[wgt].T``, or ``acc[dst] = 0`` with ``reset``."""

    wgt_factor_out: int = 0
    wgt_factor_in: int = 0
    deps: Deps = NO_DEPS


@dataclass(frozen=True, slots=True, kw_only=True)
class VectorGemm(Gemm):
    """``acc[dst] += (inp[src] * inp[vec]) @ wgt[wgt].T``: the unit that the VVMA paper proposes.

    A stage before the matrix unit multiplies the input tile, element by element, by a tile of the
    input memory; the product keeps all its bits.  The vector tiles come in order, from ``vec_base``
    on, one for each micro-op and turn of the inner loop, and again the same for each turn of the
    outer loop.  The weight tile is that of the micro-op: it has no factors.  Stock VTA has no such
    instruction; a configuration with the extension ``vvma`` does.
    """

    vec_base: int = 0

    @property
    def vectors(self) -> int:
        """Vector tiles that are read."""
        return self.iter_in * max(0, self.uop_end - self.uop_bgn)


@dataclass(frozen=True, slots=True, kw_only=True)
class Alu(Loops):
    """``acc[dst] = op(acc[dst], imm if use_imm else acc[src])``, element by element."""

    alu_opcode: AluOp
    use_imm: bool = False
    imm: int = 0
    deps: Deps = NO_DEPS


@dataclass(frozen=True, slots=True, kw_only=True)
class Finish:
    """The last instruction: hardware reports that it is done."""

    deps: Deps = NO_DEPS


Instruction = Load | Store | Gemm | Alu | Finish


@dataclass(frozen=True, slots=True)
class Uop:
    """Tile indices of one operation, before loop factors; ALU has no ``wgt``."""

    dst: int = 0
    src: int = 0
    wgt: int = 0


def unit_of(instruction: Instruction) -> Unit:
    """Return the unit that runs an instruction."""
    if isinstance(instruction, Store):
        return Unit.STORE
    inputs = (Memory.INP, Memory.WGT)
    if isinstance(instruction, Load) and instruction.memory in inputs:
        return Unit.LOAD
    return Unit.COMPUTE


def nop(unit: Unit, deps: Deps = NO_DEPS) -> Instruction:
    """Return an instruction of ``unit`` that only passes tokens."""
    if unit is Unit.STORE:
        return Store(deps=deps)
    return Load(memory=Memory.INP if unit is Unit.LOAD else Memory.UOP, deps=deps)
