"""Which tiles and which bytes of DRAM an instruction reads and writes, checked for range.

A set of tiles is an int whose bit i stands for tile i: union, intersection and a loop over
steps are then a few operations on whole sets.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import lru_cache

import numpy as np

from tvmstruct.errors import VtaRunError
from tvmstruct.vta.config import Config, Memory
from tvmstruct.vta.isa import Alu, Gemm, Instruction, Load, Store, VectorGemm
from tvmstruct.vta.queues import described

ADDRESS_LIMIT = 1 << 32
CACHED = 4096
TileSets = Mapping[Memory, int]


class _OutOfRange(Exception):
    """What an instruction reaches beyond a memory, to be completed by its index."""


@dataclass(frozen=True)
class Rows:
    """``count`` rows of ``size`` bytes in DRAM, ``pitch`` apart, the first at ``start``."""

    start: int
    count: int
    size: int
    pitch: int

    @property
    def end(self) -> int:
        """The byte after the last."""
        return self.start + (self.count - 1) * self.pitch + self.size

    def overlaps(self, other: Rows) -> bool:
        """Return whether a byte belongs to both."""
        if self.end <= other.start or other.end <= self.start:
            return False
        if self.count == 1 and other.count == 1:
            return True
        mine, theirs = self._starts(), other._starts()
        # the first of my rows that ends after a row of theirs begins
        at = np.searchsorted(mine + self.size, theirs, side="right")
        inside = at < len(mine)
        return bool((mine[at[inside]] < theirs[inside] + other.size).any())

    def _starts(self) -> np.ndarray:
        return self.start + np.arange(self.count, dtype=np.int64) * self.pitch


@dataclass(frozen=True)
class Accesses:
    """Sets of tiles that an instruction reads and writes, and its DRAM rows if it has any."""

    reads: TileSets = field(default_factory=dict[Memory, int])
    writes: TileSets = field(default_factory=dict[Memory, int])
    dram: Rows | None = None


def accesses_of(index: int, instruction: Instruction, uops: np.ndarray, config: Config) -> Accesses:
    """Return what an instruction touches; ``uops`` (depth, 3) is what the uop memory holds.

    Raises VtaRunError with the rule ``sram-range`` or ``dram-range``.  ACC8 counts as ACC, the
    tiles that a STORE reads as OUT, and what writes ACC does not count as writing OUT.
    """
    if isinstance(instruction, Load | Store):
        return _transfer(index, instruction, config)
    if not isinstance(instruction, Gemm | Alu) or not instruction.tile_ops:
        return Accesses()
    if instruction.uop_end > (depth := config.depth(Memory.UOP)):
        what = f"{described(index, instruction)} runs uop {instruction.uop_end - 1} of {depth}"
        raise VtaRunError("sram-range", what, index)
    try:
        return _loops(instruction, words_of(instruction, uops).tobytes(), config)
    except _OutOfRange as error:
        what = f"{described(index, instruction)} {error}"
        raise VtaRunError("sram-range", what, index) from error


def words_of(instruction: Instruction, uops: np.ndarray) -> np.ndarray:
    """Return the micro-ops (n, 3) that an instruction runs: none unless GEMM or ALU."""
    if isinstance(instruction, Gemm | Alu):
        return uops[instruction.uop_bgn : instruction.uop_end]
    return uops[:0]


def tile_range(first: int, count: int) -> int:
    """Return the set of ``count`` tiles from ``first`` on."""
    return ((1 << count) - 1) << first


def tile_set(indices: np.ndarray) -> int:
    """Return the set of the given tiles."""
    bits = np.zeros(int(indices.max(initial=0)) + 1, np.uint8)
    bits[indices] = 1
    return int.from_bytes(np.packbits(bits, bitorder="little").tobytes(), "little")


def tiles(members: int) -> np.ndarray:
    """Return the tiles of a set in order."""
    data = members.to_bytes((members.bit_length() + 7) // 8, "little")
    return np.flatnonzero(np.unpackbits(np.frombuffer(data, np.uint8), bitorder="little"))


def repeat(start: int, count: int, step: int) -> int:
    """Return the union of ``start`` moved by 0, 1, ... ``count - 1`` steps."""
    if step == 0:
        return start
    done = 1
    while done < count:  # doubling: the union of n moves, moved by n, is 2n moves
        more = min(done, count - done)
        start |= start << (more * step)
        done += more
    return start


def _transfer(index: int, i: Load | Store, config: Config) -> Accesses:
    if i.is_nop:
        return Accesses()
    memory = Memory.ACC if i.memory is Memory.ACC8 else i.memory
    count = i.rows * i.row_tiles if isinstance(i, Load) else i.y_size * i.x_size
    if i.sram_base + count > (depth := config.depth(memory)):
        raise VtaRunError(
            "sram-range",
            f"{described(index, i)} reaches {memory.name.lower()} tile "
            f"{i.sram_base + count - 1}; there are {depth}",
            index,
        )
    touched = {memory: tile_range(i.sram_base, count)}
    dram = _rows(index, i, config) if i.y_size else None
    return Accesses({}, touched, dram) if isinstance(i, Load) else Accesses(touched, {}, dram)


def _rows(index: int, i: Load | Store, config: Config) -> Rows:
    tile = config.tile_bytes(i.memory)
    rows = Rows(i.dram_base * tile, i.y_size, i.x_size * tile, i.x_stride * tile)
    if rows.end > ADDRESS_LIMIT:
        raise VtaRunError(
            "dram-range",
            f"{described(index, i)} ends at {rows.end:#x}; addresses have 32 bits",
            index,
        )
    return rows


@lru_cache(maxsize=CACHED)
def _loops(i: Gemm | Alu, words: bytes, config: Config) -> Accesses:
    """Return what the micro-ops ``words`` touch; programs repeat few instructions often."""
    uops = np.frombuffer(words, np.int32).reshape(-1, 3)
    dst = _visited(uops[:, 0], i, (i.dst_factor_out, i.dst_factor_in), Memory.ACC, config)
    used = {Memory.UOP: tile_range(i.uop_bgn, i.uop_end - i.uop_bgn)}
    writes = {Memory.ACC: dst}
    if isinstance(i, Gemm) and i.reset:
        return Accesses(used, writes)
    source = Memory.ACC if isinstance(i, Alu) else Memory.INP
    src = _visited(uops[:, 1], i, (i.src_factor_out, i.src_factor_in), source, config)
    if isinstance(i, Alu):
        return Accesses(used | {Memory.ACC: dst if i.use_imm else dst | src}, writes)
    wgt = _visited(uops[:, 2], i, (i.wgt_factor_out, i.wgt_factor_in), Memory.WGT, config)
    if isinstance(i, VectorGemm):
        src |= _vectors(i, config)
    return Accesses(used | {Memory.ACC: dst, Memory.INP: src, Memory.WGT: wgt}, writes)


def _vectors(i: VectorGemm, config: Config) -> int:
    """Return the vector tiles that an instruction reads."""
    last = i.vec_base + i.vectors - 1
    if last >= (depth := config.depth(Memory.INP)):
        raise _OutOfRange(f"reaches vector {last} in inp; there are {depth} tiles")
    return tile_range(i.vec_base, i.vectors)


def _visited(
    column: np.ndarray, i: Gemm | Alu, factors: tuple[int, int], memory: Memory, config: Config
) -> int:
    """Return the tiles that one index of the micro-ops visits."""
    outer, inner = factors
    first = int(column.max())
    largest = first + (i.iter_out - 1) * outer + (i.iter_in - 1) * inner
    if largest >= (depth := config.depth(memory)):
        raise _OutOfRange(
            f"reaches {memory.name.lower()} tile {largest}; there are {depth} "
            f"(largest index in its uops {first})"
        )
    return repeat(repeat(tile_set(column), i.iter_in, inner), i.iter_out, outer)
