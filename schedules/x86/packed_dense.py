"""Packed dense on x86: parallel panels, register tiles of 8 x 32 (AVX-512) or 6 x 16 (AVX2)."""

from __future__ import annotations

from tvm import tirx
from tvm.s_tir import Schedule

from tvmstruct.schedules.compute import dense
from tvmstruct.schedules.compute.dense import Epilogue, Nest, tile_heights
from tvmstruct.schedules.registry import Kernel, Pick, Space, divisors, make_kernel, pick_default
from tvmstruct.schedules.vector_math import replace_math
from tvmstruct.schedules.x86.intrinsics import fma_tile
from tvmstruct.targets import Isa

LINE = 16  # elements of a cache line
VECTORS = 2  # columns of a register tile, in vectors
HEIGHTS = {"avx512": (8, 4, 2, 1), "avx2": (6, 4, 2, 1), "sse": (4, 2, 1)}
SERIAL_MACS = 1 << 17  # under this much work, waking a second thread costs more than it saves
MAYBE_SERIAL = 8  # up to so many times that, tuning tries one thread too
SMALLEST_DEPTH = 64  # fewer products of a sum at a time are eaten up by its load and store


def panel_width(isa: Isa) -> int:
    """Columns of a packed panel."""
    return VECTORS * isa.lanes


def packed_dense(isa: Isa, n: int, k: int, epilogue: Epilogue, rows: int) -> Kernel:
    """Return the kernel for ``rows`` rows: code depends on it only through three classes."""
    single = rows == 1
    parallel = rows * n * k > SERIAL_MACS
    key = (isa.name, n, k, epilogue, single, parallel)

    def build() -> tirx.PrimFunc:
        nest = Nest((1,), parallel)
        if not single:
            nest = Nest(HEIGHTS[isa.name], parallel, ahead=panel_width(isa) // LINE)
        return _build(isa, (n, k), epilogue, nest, 1 if single else None, pick_default)

    def build_tuned(rows: int, pick: Pick) -> tirx.PrimFunc:
        return _build(isa, (n, k), epilogue, choose_nest(isa, (rows, n, k), pick), rows, pick)

    space = Space(f"{n} {k} {epilogue.words}", build_tuned)
    return make_kernel("packed_dense", key, build, work=n * k, space=space)


def _build(isa: Isa, sizes, epilogue: Epilogue, nest: Nest, rows, pick: Pick) -> tirx.PrimFunc:
    lanes, width = isa.lanes, panel_width(isa)
    definition = dense.packed_dense(
        *sizes, lanes=lanes, width=width, nest=nest, epilogue=epilogue, rows=rows
    )
    schedule = Schedule(definition)
    schedule_packed_dense(schedule, isa, pick)
    return replace_math(schedule.mod["main"])


def choose_nest(isa: Isa, sizes: tuple[int, int, int], pick: Pick) -> Nest:
    """Return the loops around the tiles at a fixed number of rows; ``sizes`` are (rows, n, k)."""
    rows, n, k = sizes
    most = min(rows, (isa.registers - 4) // VECTORS)  # sums, and the operands of one FMA
    height = pick("height", range(min(most, 3), most + 1), min(rows, HEIGHTS[isa.name][0]))
    block = pick("block", divisors(rows, height, rows), rows)
    depth = pick("depth", divisors(k, SMALLEST_DEPTH, k), dense.depth_step(k))
    blocks_first = pick("blocks_first", (0, 1) if block < rows else (0,), 0)
    small = rows * n * k <= MAYBE_SERIAL * SERIAL_MACS
    parallel = pick("parallel", (0, 1) if small else (1,), int(rows * n * k > SERIAL_MACS))
    ahead = panel_width(isa) // LINE if block == rows else 0
    heights = tile_heights(height, block)
    return Nest(heights, bool(parallel), block, depth, bool(blocks_first), ahead)


def schedule_packed_dense(sch: Schedule, isa: Isa, pick: Pick = pick_default) -> None:
    """Tensorise every update and vectorise the zeroing before it."""
    blocks = sch.get_child_blocks(sch.get_sblock("root"))
    updates = [b for b in blocks if sch.get(b).name_hint.startswith("update")]
    steps = {b: dense.depth_step(int(sch.get(sch.get_loops(b)[-1]).extent)) for b in updates}
    unroll = 1
    if updates:
        turns = [u for u in (1, 2, 4, 8) if all(step % u == 0 for step in steps.values())]
        unroll = pick("unroll", turns, 1)
    for block in blocks:
        if block in steps:
            _tensorize(sch, isa, block, steps[block], unroll)
        elif sch.get(block).name_hint.startswith("zero"):
            _vectorize(sch, isa, block)


def _tensorize(sch: Schedule, isa: Isa, block, step: int, unroll: int) -> None:
    height = _height(sch, block)
    *_, row, columns, depth = sch.get_loops(block)
    tile = [row, columns] if height > 1 else [columns]
    if step < int(sch.get(depth).extent):  # a split of extent one would keep it from matching
        chunk, depth = sch.split(depth, [None, step])
        sch.reorder(chunk, *tile, depth)
    ahead = None
    if (part := sch.get(block).annotations.get(dense.AHEAD)) is not None:
        ahead = (int(sch.get(block).iter_vars[-1].dom.extent), int(part) * LINE)
    sch.tensorize(tile[0], fma_tile(isa, height, VECTORS, step, unroll, ahead))


def _vectorize(sch: Schedule, isa: Isa, block) -> None:
    columns = sch.get_loops(block)[-1]
    outer, inner = sch.split(columns, [None, isa.lanes])
    sch.vectorize(inner)
    sch.unroll(outer)


def _height(sch: Schedule, block) -> int:
    return int(sch.get(block).annotations[dense.HEIGHT])
