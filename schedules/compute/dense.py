"""What packed dense computes, independent of any target.

``y[m, n] = epilogue(x[m, k] @ w)`` with ``w`` packed as panels ``[ceil(n / width)][k][width]``,
so that a register tile reads one contiguous row of a panel per step of k. The rows are cut into
segments of fixed tile heights (8, 4, 2, 1), each tensorised by the intrinsic of its height: a
symbolic number of rows needs no predicate.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from tvm import tirx
from tvm.script.ir_builder import tirx as T

from tvmstruct.schedules.builder import argument, block, i64, loops, prim_func, symbol, vectors

HEIGHT = "tvmstruct.height"  # annotation of every sblock: rows of its tile

ACTIVATIONS: dict[str, Callable] = {
    "none": lambda v: v,
    "relu": lambda v: T.max(v, T.float32(0)),
    "tanh": T.tanh,
    "sigmoid": T.sigmoid,
    "gelu": lambda v: v * T.float32(0.5) * (T.float32(1) + T.erf(v * T.float32(0.5**0.5))),
    "gelu_tanh": lambda v: (
        v * T.sigmoid(T.float32(1.5957691216057308) * (v + T.float32(0.044715) * v * v * v))
    ),
}


@dataclass(frozen=True)
class Epilogue:
    """What happens to a tile of y before it leaves the cache: bias, activation, residual."""

    bias: bool = False
    activation: str = "none"
    residual: bool = False


@dataclass(frozen=True)
class Segment:
    """Rows ``[start, start + count * height)`` as ``count`` tiles of ``height`` rows."""

    height: int
    start: object
    count: object


def row_segments(m, heights: tuple[int, ...]) -> list[Segment]:
    """Cut ``m`` rows into tiles of falling ``heights``; each height divides the one before."""
    whole = i64(m)
    segments = [Segment(heights[0], i64(0), whole // heights[0])]
    for above, height in itertools.pairwise(heights):
        segments.append(Segment(height, whole // above * above, whole % above // height))
    if isinstance(m, int):  # a static number of rows needs no empty segment
        counts = [m // heights[0]] + [m % a // h for a, h in itertools.pairwise(heights)]
        segments = [s for s, count in zip(segments, counts, strict=True) if count]
    return segments


def pack(w: np.ndarray, width: int) -> np.ndarray:
    """Return a (k, n) weight as panels ``[ceil(n / width)][k][width]``, padded with zeros."""
    k, n = w.shape
    panels = -(-n // width)
    padded = np.zeros((k, panels * width), w.dtype)
    padded[:, :n] = w
    return np.ascontiguousarray(padded.reshape(k, panels, width).transpose(1, 0, 2))


def packed_dense(
    n: int,
    k: int,
    *,
    lanes: int,
    width: int,
    heights: tuple[int, ...],
    epilogue: Epilogue,
    rows: int | None = None,
    parallel: bool = True,
) -> tirx.PrimFunc:
    """Return the definition; arguments x, w, [bias], [residual], y; ``rows=None`` is symbolic.

    The sblocks ``zero``, ``update`` and ``finish`` come once for each segment of rows, and once
    more for a ragged last panel, which computes a full tile and stores its first columns.
    """
    full, ragged = divmod(n, width)

    def body() -> None:
        m = symbol("m") if rows is None else i64(rows)
        x = argument("x", (m, i64(k)))
        w = argument("w", (i64(full + (ragged > 0)), i64(k), i64(width)))
        bias = argument("bias", (i64(n),)) if epilogue.bias else None
        residual = argument("residual", (m, i64(n))) if epilogue.residual else None
        y = argument("y", (m, i64(n)))

        def finish(value, row, column):
            if bias is not None:
                value = value + bias[column]
            value = ACTIVATIONS[epilogue.activation](value)
            return value if residual is None else value + residual[row, column]

        segments = row_segments(m if rows is None else rows, heights)
        if full:
            with loops(full, kind=T.parallel if parallel and full > 1 else None) as (panel,):
                for segment in segments:
                    _tile(segment, (x, w, y), (full, panel, 0), (k, width, width, lanes), finish)
        if ragged:
            for segment in segments:
                _tile(segment, (x, w, y), (1, i64(0), full), (k, width, ragged, lanes), finish)

    return prim_func(body)


def _tile(segment: Segment, buffers, panel, sizes, finish) -> None:
    """Emit zero, update and finish for every tile of one segment in one panel."""
    x, w, y = buffers
    panels, at, base = panel  # the last panel is a constant offset: as an axis it would be lost
    k, width, columns, whole = sizes
    lanes = next(v for v in (whole, 8, 4, 2, 1) if columns % v == 0)
    height, start = segment.height, segment.start
    with loops(segment.count) as (t,):
        if columns == width:
            tile = y
        else:
            tile = T.sblock_alloc_buffer((i64(height), i64(width)), "float32", scope="global")

        def place(vt, vi, vp, vj):
            row = start + vt * height + (vi[0] if vi else 0)
            return [row, (vp + base) * width + vj] if tile is y else [
                vi[0] if vi else i64(0),
                vj,
            ], row

        # A loop over one row would be simplified away while scheduling, so it is left out.
        rows = [height] if height > 1 else []
        shared = [(panels, at), (segment.count, t)]
        if k == 1:  # nothing to add up, and a loop of extent one would keep tensorize from matching
            with loops(*rows, width // whole, kind=T.unroll) as (*i, chunk), vectors(whole) as j:
                axes = [*shared, (width, chunk * whole + j), *zip(rows, i, strict=True)]
                with block("product", axes, height=height) as (vp, vt, vj, *vi):
                    index, row = place(vt, vi, vp, vj)
                    T.buffer_store(tile, x[row, 0] * w[vp + base, 0, vj], index)
        else:
            with loops(*rows, width) as (*i, j):
                axes = [*shared, (width, j), *zip(rows, i, strict=True)]
                with block("zero", axes, height=height) as (vp, vt, vj, *vi):
                    T.buffer_store(tile, T.float32(0), place(vt, vi, vp, vj)[0])
            with loops(*rows, width, k) as (*i, j, p):
                axes = [*shared, (width, j), *zip(rows, i, strict=True)]
                with block("update", axes, [(k, p)], height=height) as (vp, vt, vj, *vi, vk):
                    index, row = place(vt, vi, vp, vj)
                    T.buffer_store(
                        tile, tile[tuple(index)] + x[row, vk] * w[vp + base, vk, vj], index
                    )
        # In place, which no schedule primitive may touch: the loops are vectors from the start.
        with loops(*rows, columns // lanes, kind=T.unroll) as (*i, chunk), vectors(lanes) as j:
            axes = [*shared, (columns, chunk * lanes + j), *zip(rows, i, strict=True)]
            with block("finish", axes, height=height) as (vp, vt, vj, *vi):
                index, row = place(vt, vi, vp, vj)
                column = (vp + base) * width + vj
                T.buffer_store(y, finish(tile[tuple(index)], row, column), [row, column])
