"""What packed dense computes, independent of any target.

``y[m, n] = epilogue(x[m, k] @ w)`` with ``w`` packed as panels ``[ceil(n / width)][k][width]``,
so that a register tile reads one contiguous row of a panel per step of k. The rows are cut into
segments of fixed tile heights (8, 4, 2, 1, say), each tensorised by the intrinsic of its height: a
symbolic number of rows needs no predicate.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
from tvm import tirx
from tvm.script.ir_builder import tirx as T

from tvmstruct.schedules.builder import argument, block, i64, loops, prim_func, symbol, vectors
from tvmstruct.schedules.compute.layer_norm import RowNorm

HEIGHT = "tvmstruct.height"  # annotation of every sblock: rows of its tile
AHEAD = "tvmstruct.ahead"  # of some: the part of the next panel to fetch
MAX_DEPTH = 256  # products in one running sum: more loses digits, fewer costs stores
CHEAP = ("none", "relu")  # activations that want neither much code nor registers

ACTIVATIONS: dict[str, Callable] = {
    "none": lambda v: v,
    "relu": lambda v: T.max(T.float32(0), v),  # in this order NaN stays NaN
    "tanh": T.tanh,
    "sigmoid": T.sigmoid,
    "silu": lambda v: v * T.sigmoid(v),
    "gelu_sigmoid": lambda v: v * T.sigmoid(T.float32(1.702) * v),
    "gelu": lambda v: v * T.float32(0.5) * (T.float32(1) + T.erf(v * T.float32(0.5**0.5))),
    "gelu_tanh": lambda v: (
        v * T.sigmoid(T.float32(1.5957691216057308) * (v + T.float32(0.044715) * v * v * v))
    ),
}


@dataclass(frozen=True)
class Epilogue:
    """What happens to y before it leaves the cache.

    To a tile of it bias, activation and residual; to a whole row layer normalisation, where
    ``norm`` is its epsilon.
    """

    bias: bool = False
    activation: str = "none"
    residual: bool = False
    norm: float | None = None

    @property
    def joins_rows(self) -> bool:
        """Whether it needs more of a row than the layer itself computes in a tile."""
        return self.residual or self.norm is not None

    @property
    def words(self) -> str:
        """What there is of it, for the key of a record."""
        parts = {"bias": self.bias, self.activation: True, "residual": self.residual}
        parts["norm"] = self.norm is not None
        return " ".join(sorted(name for name, there in parts.items() if there))


@dataclass(frozen=True)
class Nest:
    """In which order the tiles of y are computed; the fields after ``parallel`` want fixed rows.

    ``heights`` are the rows of tiles, each as often as it fits. A panel meets ``block`` rows at
    a time (0: all of them) and ``depth`` of k at a time (0: all of it), the tiles of a block one
    after the other. The outer loop, of whose turns threads take a share each if ``parallel``,
    goes over the panels or, with ``blocks_first``, over the blocks of rows.
    """

    heights: tuple[int, ...]
    parallel: bool = True
    block: int = 0
    depth: int = 0
    blocks_first: bool = False
    ahead: int = 0  # tiles of a panel that each fetch a part of the next one


@dataclass(frozen=True)
class Segment:
    """Rows ``[start, start + count * height)`` as ``count`` tiles of ``height`` rows.

    ``ahead`` says which part of the next panel its tiles may fetch meanwhile, if any.
    """

    height: int
    start: object
    count: object
    ahead: int | None = None


def row_segments(m, heights: tuple[int, ...]) -> list[Segment]:
    """Cut ``m`` rows into tiles of falling ``heights``, each as often as it fits."""
    if isinstance(m, int):
        return list(_fixed_segments(m, heights))
    segments = [Segment(heights[0], i64(0), m // heights[0])]
    rest, divides = m, True
    for above, height in itertools.pairwise(heights):
        if divides:  # then the rest of the rest is that of all rows
            rest, start = m % above, m // above * above
        else:
            rest = rest % above
            start = m - rest
        divides &= above % height == 0
        segments.append(Segment(height, start, rest // height))
    return segments


def _fixed_segments(m: int, heights: tuple[int, ...]) -> Iterator[Segment]:
    start = 0
    for height in heights:
        count = (m - start) // height
        if count:
            yield Segment(height, i64(start), i64(count))
        start += count * height


def tile_heights(height: int, m: int | None) -> tuple[int, ...]:
    """Return heights that cut m rows (None: any number), the first of them ``height``."""
    if m is not None:
        return (height, rest) if (rest := m % height) else (height,)
    heights = [height]
    while heights[-1] > 1:
        heights.append(max(d for d in range(1, heights[-1]) if heights[-1] % d == 0))
    return tuple(heights)


def _ahead(segment: Segment, parts: int) -> Iterator[Segment]:
    """Set the first tiles of a segment apart, each with a part of the next panel to fetch."""
    start, count, height = segment.start, segment.count, segment.height
    if isinstance(count, tirx.IntImm):
        parts = min(parts, int(count) - 1)  # loops of no turn would keep tensorize from matching
    for part in range(parts):
        one = T.min(T.max(count - part, T.int64(0)), T.int64(1))
        yield Segment(height, start + part * height, one, part)
    rest = T.max(count - parts, T.int64(0)) if parts else count
    yield Segment(height, start + parts * height, rest)


def depth_step(k: int) -> int:
    """Return the largest divisor of k up to MAX_DEPTH, or k where none is near."""
    step = max(d for d in range(1, min(k, MAX_DEPTH) + 1) if k % d == 0)
    return step if step * 8 >= MAX_DEPTH or step == k else k


def pack(w: np.ndarray, width: int) -> np.ndarray:
    """Return a (k, n) weight as panels ``[ceil(n / width)][k][width]``, padded with zeros."""
    k, n = w.shape
    panels = -(-n // width)
    padded = np.zeros((k, panels * width), w.dtype)
    padded[:, :n] = w
    return np.ascontiguousarray(padded.reshape(k, panels, width).transpose(1, 0, 2))


def pack_heads(w: np.ndarray, heads: int, width: int) -> np.ndarray:
    """Return a (k, heads * dim) weight as panels of each head, (heads, panels, k, width)."""
    return np.stack([pack(np.ascontiguousarray(part), width) for part in np.split(w, heads, 1)])


def pad_heads(bias: np.ndarray, heads: int, width: int) -> np.ndarray:
    """Return a bias with the zeros that fill up the panels of each head."""
    parts = bias.reshape(heads, -1)
    rest = -parts.shape[1] % width
    return np.ascontiguousarray(np.pad(parts, ((0, 0), (0, rest))).reshape(-1), np.float32)


def packed_dense(
    n: int,
    k: int,
    *,
    lanes: int,
    width: int,
    nest: Nest,
    epilogue: Epilogue,
    rows: int | None = None,
) -> tirx.PrimFunc:
    """Return the definition; ``rows=None`` is symbolic.

    Arguments are x, w, [bias], [residual], [gamma, beta], y.

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
        norm = RowNorm.declare(lanes, n, epilogue.norm)
        y = argument("y", (m, i64(n)))

        def finish(value, row, column):
            if bias is not None:
                value = value + bias[column]
            value = ACTIVATIONS[epilogue.activation](value)
            return value if residual is None else value + residual[row, column]

        together = m if rows is None else rows
        blocks = rows // nest.block if rows and nest.block else 1
        segments = row_segments(nest.block if blocks > 1 else together, nest.heights)
        segments = [*_ahead(segments[0], nest.ahead), *segments[1:]]
        for count, columns, base in ((full, width, 0), (int(ragged > 0), ragged, full)):
            if count:
                sizes = (k, width, columns, lanes)
                # Next to a long epilogue LLVM runs out of AVX2's registers for the products:
                # it moves sums to the stack and back in every step of k.
                apart = epilogue.activation not in CHEAP
                panels = _Panels(nest, (x, w, y), sizes, finish, count, base, apart)
                panels.emit(blocks, segments)
        if norm is not None:
            norm.emit(y, i64(0), m, parallel=nest.parallel)

    return prim_func(body)


@dataclass
class _Panels:
    """Code for ``count`` whole panels from the first, or for the ragged one at ``base``.

    ``sizes`` are k, the width of a panel, the columns of it that exist, and lanes of a vector.
    """

    nest: Nest
    buffers: tuple
    sizes: tuple[int, int, int, int]
    finish: Callable
    count: int
    base: int  # of the ragged panel a constant offset: as an axis it would be lost
    apart: bool  # whether the epilogue waits for all tiles of a block

    @property
    def ragged(self) -> bool:
        return self.sizes[2] < self.sizes[1]

    def emit(self, blocks: int, segments: list[Segment]) -> None:
        """Loop over panels and blocks of rows."""
        extents = {} if self.ragged else {"panel": self.count}
        if blocks > 1:
            block = {"block": blocks}
            extents = block | extents if self.nest.blocks_first else extents | block
        first = next(iter(extents.values()), 1)
        kind = T.parallel if self.nest.parallel and first > 1 else None
        with loops(*extents.values(), kind=kind) as variables:
            at = dict(zip(extents, variables, strict=True))
            panel = [(self.count, at.get("panel", i64(0)))]
            self._block(segments, panel, [(blocks, at["block"])] if blocks > 1 else [])

    def _block(self, segments: list[Segment], panel: list, block: list) -> None:
        """Emit all tiles of a block of rows in one panel."""
        k = self.sizes[0]
        chunks = 1 if self.ragged or not self.nest.depth else k // self.nest.depth

        def walk(*emit: Callable[[_Tile], None]) -> None:
            for segment in segments:
                with loops(segment.count) as (t,):
                    tile = _Tile(self, segment, [*panel, (segment.count, t), *block])
                    for part in emit:
                        part(tile)

        if chunks > 1:
            walk(_Tile.zero)
            with loops(chunks) as (chunk,):
                walk(lambda tile: tile.update(self.nest.depth, chunk))
        elif self.ragged or not self.apart:
            walk(_Tile.multiply, _Tile.finish)
            return
        else:
            walk(_Tile.multiply)
        walk(_Tile.finish)


class _Tile:
    """Code for one tile: ``outer`` are its axes panel, tile, and block of rows if there are any."""

    def __init__(self, panels: _Panels, segment: Segment, outer: list[tuple]) -> None:
        self.panels, self.segment, self.outer = panels, segment, outer
        self.x, self.w, self.y = panels.buffers
        self.k, self.width, self.columns, self.lanes = panels.sizes
        # A loop over one row would be simplified away while scheduling, so it is left out.
        self.rows = [segment.height] if segment.height > 1 else []
        self.sums = self.y
        if panels.ragged:
            shape = (i64(segment.height), i64(self.width))
            self.sums = T.sblock_alloc_buffer(shape, "float32", scope="global")

    def multiply(self) -> None:
        """Compute the sums of the tile over all of k."""
        if self.k > 1:
            self.zero()
            self.update(self.k)
            return
        # Nothing to add up, and a loop of extent one would keep tensorize from matching.
        with self._vectors("product", self.width, self.lanes) as (index, row, panel, vj, _):
            T.buffer_store(self.sums, self.x[row, 0] * self.w[panel, 0, vj], index)

    def zero(self) -> None:
        """Set the sums to zero."""
        with loops(*self.rows, self.width) as (*i, j):
            with self._place("zero", self.width, j, i) as (index, *_):
                T.buffer_store(self.sums, T.float32(0), index)

    def update(self, depth: int, chunk=None) -> None:
        """Add the products over one chunk of k."""
        with loops(*self.rows, self.width, depth) as (*i, j, p):
            p = p if chunk is None else chunk * depth + p
            with self._place("update", self.width, j, i, [(self.k, p)]) as at:
                index, row, panel, vj, (vk,) = at
                value = self.sums[tuple(index)] + self.x[row, vk] * self.w[panel, vk, vj]
                T.buffer_store(self.sums, value, index)

    def finish(self) -> None:
        """Apply the epilogue in place, which no schedule primitive may touch: vectors already."""
        lanes = next(v for v in (self.lanes, 8, 4, 2, 1) if self.columns % v == 0)
        with self._vectors("finish", self.columns, lanes) as (index, row, panel, vj, _):
            column = panel * self.width + vj
            value = self.panels.finish(self.sums[tuple(index)], row, column)
            T.buffer_store(self.y, value, [row, column])

    @contextmanager
    def _vectors(self, name: str, extent: int, lanes: int):
        """Open an sblock over whole vectors of a tile's columns."""
        with loops(*self.rows, extent // lanes, kind=T.unroll) as (*i, chunk):
            with vectors(lanes) as j, self._place(name, extent, chunk * lanes + j, i) as at:
                yield at

    @contextmanager
    def _place(self, name: str, extent: int, j, i: list, reduce: Sequence[tuple] = ()):
        """Open an sblock and yield where it is: index of the sum, row, panel, column, reduction."""
        axes = [*self.outer, (extent, j), *zip(self.rows, i, strict=True)]
        notes = {"height": self.segment.height}
        if self.segment.ahead is not None:
            notes["ahead"] = self.segment.ahead
        with block(name, axes, reduce, **notes) as (vp, vt, *rest):
            row = self.segment.start + vt * self.segment.height
            vb = rest.pop(0) if len(self.outer) > 2 else None
            vj, *rest = rest
            vi = rest.pop(0) if self.rows else i64(0)
            row = row + vi if self.rows else row
            row = row if vb is None else vb * self.panels.nest.block + row
            panel = vp + self.panels.base
            index = [vi, vj] if self.sums is not self.y else [row, panel * self.width + vj]
            yield index, row, panel, vj, rest
