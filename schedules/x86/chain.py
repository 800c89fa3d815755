"""A structured operator as one kernel on x86: which rows, tiles and threads, tensorised products.

Small weights pass a tile of rows through all stages while it is in the first-level cache; large
ones meet more rows at a time, so that they stream from memory less often.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

from tvm import tirx
from tvm.s_tir import Schedule

from tvmstruct.schedules.compute import chain as compute
from tvmstruct.schedules.compute.chain import RowNest
from tvmstruct.schedules.compute.dense import Epilogue
from tvmstruct.schedules.compute.product_tile import Tile
from tvmstruct.schedules.registry import Kernel, Pick, Space, make_kernel, pick_default
from tvmstruct.schedules.vector_math import replace_math
from tvmstruct.schedules.x86.intrinsics import product_tile
from tvmstruct.schedules.x86.packed_dense import HEIGHTS, SERIAL_MACS
from tvmstruct.stages import Program
from tvmstruct.targets import Isa

LOW = 4  # rows of a tile at most, where threads would get unequal shares of taller ones
WAYS = ("none", "rows", "stages")
MOST_ROWS = 64  # of a block
UNEVEN = 1.1  # times the least rows of the busiest thread, for larger blocks
SHARED_MACS = 120 << 10  # below, a stage is done before a second thread has woken
CACHED = 256 << 10  # bytes of weights that a second-level cache keeps beside the rows


def chain(
    isa: Isa, program: Program, epilogue: Epilogue, rows: int, macs: int, threads: int = 2
) -> Kernel:
    """Return the kernel: arguments x, weights, [bias], [residual], [gamma, beta], y."""
    work = _Work(isa, program, macs, threads)
    nest = work.nest(rows, pick_default)
    key = (isa.name, program.key, epilogue, rows == 1, nest)

    def build() -> tirx.PrimFunc:
        return _build(isa, program, epilogue, nest, 1 if rows == 1 else None)

    def build_tuned(rows: int, pick: Pick) -> tirx.PrimFunc:
        return _build(isa, program, epilogue, work.nest(rows, pick), rows)

    digest = hashlib.sha256(repr((program.key, epilogue)).encode()).hexdigest()[:12]
    space = Space(f"{program.sizes[0]} {program.sizes[1]} {digest}", build_tuned)
    return make_kernel("chain", key, build, work=macs, space=space)


def _build(isa: Isa, program: Program, epilogue: Epilogue, nest: RowNest, rows: int | None):
    definition, tiles = compute.chain(program, nest, epilogue, isa.lanes, rows)
    schedule = Schedule(definition)
    schedule_chain(schedule, isa, tiles)
    return replace_math(schedule.mod["main"])


def schedule_chain(sch: Schedule, isa: Isa, tiles: list[Tile]) -> None:
    """Tensorise every product."""
    pending = [sch.get_sblock("root")]
    while pending:
        for found in sch.get_child_blocks(pending.pop()):
            name = sch.get(found).name_hint
            if name.startswith(compute.PRODUCT):
                number = int(sch.get(found).annotations[compute.TILE])
                sch.tensorize(found, product_tile(isa, tiles[number]))
            else:
                pending.append(found)


@dataclass(frozen=True)
class _Work:
    """What a program costs, and from that how its rows are cut."""

    isa: Isa
    program: Program
    macs: int  # for one row
    threads: int

    def nest(self, rows: int, pick: Pick) -> RowNest:
        """Return the nest for so many rows: by default one of a few, so that kernels are shared."""
        sums = self.isa.registers * 3 // 4
        together = "stages" if self.threads > 1 else "none"
        if rows == 1:
            mode = WAYS[pick("threads", (0, 2), WAYS.index(together))]
            return RowNest((1,), 1, mode, sums, self.threads, SHARED_MACS)
        heights = HEIGHTS[self.isa.name]
        tall = pick("height", [h for h in heights if h <= max(1, rows)], self._tall(rows))
        mode = "rows" if self._shares(rows, tall) else together
        mode = WAYS[pick("threads", range(len(WAYS)), WAYS.index(mode))]
        sizes = sorted(tall * n << i for i in range(7) for n in (1, 3))
        blocks = [size for size in sizes if size <= min(rows, MOST_ROWS)]
        block = pick("block", blocks, self._block(rows, blocks, mode))
        heights = tuple(h for h in heights if h <= tall)
        return RowNest(heights, block, mode, sums, self.threads, SHARED_MACS)

    def _tall(self, rows: int) -> int:
        """Return the rows of a tile: the most, unless threads would then get unequal shares."""
        heights = HEIGHTS[self.isa.name]
        each = heights[0] * self.threads
        most = heights[0] if rows >= 4 * each or rows % each == 0 else LOW
        return max(h for h in heights if h <= max(1, min(rows, most)))

    def _shares(self, rows: int, tall: int) -> bool:
        """Return whether each thread takes rows of its own, though it then reads all weights."""
        enough = rows * self.macs > SERIAL_MACS and rows > tall and self.threads > 1
        return enough and (self._weights <= CACHED or rows >= 2 * LOW * self.threads)

    def _block(self, rows: int, blocks: list[int], mode: str) -> int:
        """Return the rows of a block: more where the weights do not stay in cache."""
        share = rows // self.threads if mode == "rows" else rows
        fits = [b for b in blocks if b == blocks[0] or (b <= share and self._weights > CACHED)]
        if mode != "rows":
            return max(fits)

        def busiest(b: int) -> int:
            """Return the rows of the thread with most: blocks, and tiles of the rows after them."""
            whole, rest = divmod(rows, b)
            tiles = -(-rest // blocks[0])
            return -(-whole // self.threads) * b + -(-tiles // self.threads) * blocks[0]

        least = min(map(busiest, fits))
        return max(b for b in fits if busiest(b) <= UNEVEN * least)

    @property
    def _weights(self) -> int:
        """Bytes of all weights."""
        return 4 * sum(map(self.program.words, range(len(self.program.weights))))
