"""Tensor intrinsics of x86: a description that anyone can read and its register-tile form.

Register rules (found by reading assembly): an accumulator stays in a register when it lives in
a buffer of scope "global" strictly under 1024 bytes that only constants index after unrolling.
"""

from __future__ import annotations

from functools import cache

from tvm import tirx
from tvm.s_tir import TensorIntrin
from tvm.script.ir_builder import tirx as T

from tvmstruct.schedules.builder import argument, block, fma, i64, loops, prim_func, symbol
from tvmstruct.targets import Isa


@cache
def fma_tile(isa: Isa, height: int, vectors: int, depth: int) -> str:
    """Register ``c[height, vectors * lanes] += a[height, depth] @ b`` and return its name.

    Rows of one tile broadcast a; few rows keep several partial sums, since an FMA has a
    latency of four cycles and two accumulators would leave most of them idle.
    """
    name = f"tvmstruct.fma_tile.{isa.name}.{height}x{vectors}x{depth}"
    describe = _tile_description(height, vectors * isa.lanes, depth)
    implement = _tile_implementation(isa, height, vectors, depth)
    TensorIntrin.register(name, describe, implement, override=True)
    return name


def _tile_description(height: int, width: int, depth: int) -> tirx.PrimFunc:
    def body() -> None:
        a = argument("a", (height, depth), offset_factor=1)
        b = argument("b", (depth, width), offset_factor=1)
        c = argument("c", (height, width), offset_factor=1)
        with T.sblock("root"):
            T.reads(c[0:height, 0:width], a[0:height, 0:depth], b[0:depth, 0:width])
            T.writes(c[0:height, 0:width])
            # An extent of one would be simplified away in the schedule, so it is left out here.
            rows = [height] if height > 1 else []
            with loops(*rows, width, depth) as (*i, j, p):
                axes = [(width, j)] + [(height, row) for row in i]
                with block("update", axes, [(depth, p)]) as (vj, *vi, vp):
                    row = vi[0] if vi else 0
                    T.buffer_store(c, c[row, vj] + a[row, vp] * b[vp, vj], [row, vj])

    return prim_func(body)


def _tile_implementation(isa: Isa, height: int, vectors: int, depth: int) -> tirx.PrimFunc:
    lanes = isa.lanes
    partials = next((p for p in (4, 2) if height * vectors * p <= 8 and depth % p == 0), 1)

    def body() -> None:
        a = argument("a", (height, depth), offset_factor=1, strides=[symbol("lda"), 1])
        b = argument("b", (depth, vectors * lanes), offset_factor=1, strides=[symbol("ldb"), 1])
        c = argument("c", (height, vectors * lanes), offset_factor=1, strides=[symbol("ldc"), 1])
        with T.sblock("root"):
            width = vectors * lanes
            T.reads(c[0:height, 0:width], a[0:height, 0:depth], b[0:depth, 0:width])
            T.writes(c[0:height, 0 : vectors * lanes])
            multiply_tile(isa, (height, vectors, depth, partials), a, b, c)

    return prim_func(body)


def multiply_tile(isa: Isa, sizes: tuple[int, int, int, int], a, b, c) -> None:
    """Emit the loop over depth with all accumulators in registers."""
    height, vectors, depth, partials = sizes
    lanes = isa.lanes
    accumulators = [
        [T.alloc_buffer((height * lanes,), "float32", scope="global") for _ in range(vectors)]
        for _ in range(partials)
    ]

    def vector(buffer, row, column):
        return buffer[row, T.ramp(i64(column * lanes), 1, lanes)]

    for part, row, column in _grid(partials, height, vectors):
        zero = T.broadcast(T.float32(0), lanes)
        start = vector(c, row, column) if part == 0 else zero
        T.buffer_store(accumulators[part][column], start, [T.ramp(row * lanes, 1, lanes)])
    with loops(depth // partials) as (p,):
        for part, row, column in _grid(partials, height, vectors):
            at = p * partials + part
            total = accumulators[part][column]
            place = T.ramp(row * lanes, 1, lanes)
            left = T.broadcast(a[row, at], lanes)
            T.buffer_store(
                total, fma(left, vector(b, at, column), total[place], lanes, isa.fma), [place]
            )
    for row, column in _grid(height, vectors):
        place = T.ramp(row * lanes, 1, lanes)
        total = accumulators[0][column][place]
        for part in range(1, partials):
            total = total + accumulators[part][column][place]
        T.buffer_store(c, total, [row, T.ramp(i64(column * lanes), 1, lanes)])


def _grid(*extents: int):
    """Iterate over the index tuples of a grid, last index fastest."""
    if not extents:
        yield ()
        return
    for first in range(extents[0]):
        for rest in _grid(*extents[1:]):
            yield (first, *rest)
