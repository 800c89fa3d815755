"""Packed dense on x86: parallel panels, register tiles of 8 x 32 (AVX-512) or 6 x 16 (AVX2)."""

from __future__ import annotations

from tvm.s_tir import Schedule

from tvmstruct.schedules.compute import dense
from tvmstruct.schedules.compute.dense import Epilogue
from tvmstruct.schedules.registry import Kernel, make_kernel
from tvmstruct.schedules.vector_math import replace_math
from tvmstruct.schedules.x86.intrinsics import fma_tile
from tvmstruct.targets import Isa

VECTORS = 2  # columns of a register tile, in vectors
HEIGHTS = {"avx512": (8, 4, 2, 1), "avx2": (4, 2, 1), "sse": (4, 2, 1)}
MAX_DEPTH = 2048  # a panel of more rows than this leaves the second-level cache
SERIAL_MACS = 1 << 17  # under this much work, waking a second thread costs more than it saves


def panel_width(isa: Isa) -> int:
    """Columns of a packed panel."""
    return VECTORS * isa.lanes


def packed_dense(isa: Isa, n: int, k: int, epilogue: Epilogue, rows: int) -> Kernel:
    """Return the kernel for ``rows`` rows: code depends on it only through three classes."""
    single = rows == 1
    parallel = rows * n * k > SERIAL_MACS
    key = (isa.name, n, k, epilogue, single, parallel)

    def build():
        definition = dense.packed_dense(
            n,
            k,
            lanes=isa.lanes,
            width=panel_width(isa),
            heights=(1,) if single else HEIGHTS[isa.name],
            epilogue=epilogue,
            rows=1 if single else None,
            parallel=parallel,
        )
        schedule = Schedule(definition)
        schedule_packed_dense(schedule, isa)
        return replace_math(schedule.mod["main"])

    return make_kernel("packed_dense", key, build, work=n * k)


def schedule_packed_dense(sch: Schedule, isa: Isa) -> None:
    """Tensorise every update and vectorise the zeroing before it."""
    for block in sch.get_child_blocks(sch.get_sblock("root")):
        name = sch.get(block).name_hint
        if name.startswith("update"):
            _tensorize(sch, isa, block)
        elif name.startswith("zero"):
            _vectorize(sch, isa, block)


def _tensorize(sch: Schedule, isa: Isa, block) -> None:
    height = _height(sch, block)
    *_, row, columns, depth = sch.get_loops(block)
    tile = [row, columns] if height > 1 else [columns]
    step = _depth_step(k := int(sch.get(depth).extent))
    if step < k:  # a split of extent one would keep tensorize from matching
        chunk, depth = sch.split(depth, [None, step])
        sch.reorder(chunk, *tile, depth)
    sch.tensorize(tile[0], fma_tile(isa, height, VECTORS, step))


def _vectorize(sch: Schedule, isa: Isa, block) -> None:
    columns = sch.get_loops(block)[-1]
    outer, inner = sch.split(columns, [None, isa.lanes])
    sch.vectorize(inner)
    sch.unroll(outer)


def _height(sch: Schedule, block) -> int:
    return int(sch.get(block).annotations[dense.HEIGHT])


def _depth_step(k: int) -> int:
    """Return the largest divisor of k that keeps a panel in cache, or k where none is near."""
    step = max(d for d in range(1, min(k, MAX_DEPTH) + 1) if k % d == 0)
    return step if step * 8 >= MAX_DEPTH or step == k else k
