"""Tensor intrinsics of x86: a description that anyone can read and its register-tile form."""

from __future__ import annotations

from functools import cache
from itertools import product

from tvm import tirx
from tvm.s_tir import TensorIntrin
from tvm.script.ir_builder import tirx as T

from tvmstruct.schedules.builder import argument, block, i64, loops, prim_func, symbol
from tvmstruct.schedules.x86.register_tile import accumulate
from tvmstruct.targets import Isa


@cache
def fma_tile(isa: Isa, height: int, vectors: int, depth: int, unroll: int = 1) -> str:
    """Register ``c[height, vectors * lanes] += a[height, depth] @ b`` and return its name.

    ``unroll`` steps of the depth, a divisor of it, are one turn of the loop.
    """
    name = f"tvmstruct.fma_tile.{isa.name}.{height}x{vectors}x{depth}x{unroll}"
    describe = _tile_description(height, vectors * isa.lanes, depth)
    implement = _tile_implementation(isa, height, vectors, (depth, unroll))
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


def _tile_implementation(
    isa: Isa, height: int, vectors: int, steps: tuple[int, int]
) -> tirx.PrimFunc:
    lanes, width, (depth, unroll) = isa.lanes, vectors * isa.lanes, steps

    def body() -> None:
        a = argument("a", (height, depth), offset_factor=1, strides=[symbol("lda"), 1])
        b = argument("b", (depth, width), offset_factor=1, strides=[symbol("ldb"), 1])
        c = argument("c", (height, width), offset_factor=1, strides=[symbol("ldc"), 1])

        def place(row: int, column: int) -> tuple:
            return (row, T.ramp(i64(column * lanes), 1, lanes))

        def step(turn, add) -> None:
            for u, row, column in product(range(unroll), range(height), range(vectors)):
                p = turn * unroll + u if unroll > 1 else turn
                right = b[p, T.ramp(i64(column * lanes), 1, lanes)]
                add(row, column, T.broadcast(a[row, p], lanes), right)

        with T.sblock("root"):
            T.reads(c[0:height, 0:width], a[0:height, 0:depth], b[0:depth, 0:width])
            T.writes(c[0:height, 0:width])
            tile = (height, vectors)
            turns = depth // unroll
            # From zero and then onto c: chunks of the depth add up like a tree, so the rounding
            # error grows with the root of the chunk and not of the whole depth.
            sums = accumulate(isa, lanes, tile, turns, step)
            for row, column in product(range(height), range(vectors)):
                total = c[place(row, column)] + sums[column][row]
                T.buffer_store(c, total, list(place(row, column)))

    return prim_func(body)
