"""Self- or cross-attention from x to its output projection, in the memory of Table III of NLP-Fast.

One head after the other: its queries (length x head_dim), then chunk after chunk of keys their k
and v (chunk x head_dim), scores, running softmax and weighted sum, and at the end its share of
the output projection. Of Q, K, V, S, P and A nothing larger exists at any time. Threads share
the rows of every step, or take an element of the batch each where there are enough.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from math import inf

from tvm import tirx
from tvm.ir import Expr
from tvm.script.ir_builder import tirx as T

from tvmstruct.schedules.builder import argument, i64, loops, prim_func, symbol
from tvmstruct.schedules.compute.dense import Epilogue
from tvmstruct.schedules.compute.layer_norm import RowNorm
from tvmstruct.schedules.registry import Kernel, make_kernel
from tvmstruct.schedules.vector_math import replace_math
from tvmstruct.schedules.x86.attention import Heads, emit_ragged
from tvmstruct.schedules.x86.attention_tile import Operands, Problem, Tile, View
from tvmstruct.schedules.x86.attention_tile import scratch as _scratch
from tvmstruct.schedules.x86.packed_dense import HEIGHTS, VECTORS, panel_width
from tvmstruct.schedules.x86.partial_sums import PartialSums
from tvmstruct.schedules.x86.query_tile import declare_tile

GENERATED = 256  # keys whose k and v are made at a time: enough rows to reuse the weights
BLOCK = 64  # rows of y that a thread takes at a time


@dataclass(frozen=True)
class Source:
    """Where q, k or v comes from: features of the input, and whether there is a bias."""

    features: int
    bias: bool


@dataclass(frozen=True)
class Sizes:
    """The static side: heads, what feeds q, k and v, the projection to n and its epilogue."""

    h: Heads
    sources: tuple[Source, Source, Source]
    n: int
    epilogue: Epilogue


def legal(isa, n: int) -> bool:
    """Return whether the kernel can compute a projection to n features."""
    return n % panel_width(isa) == 0


def minimal_attention(sizes: Sizes, rows: int, threads: int) -> Kernel:
    """Return the kernel: xq, xk, xv, wq, [bq], wk, [bk], wv, [bv], [mask], w, and the rest.

    The rest is [bias], [residual], [gamma, beta], y. wq, wk and wv are packed by `pack_heads`,
    their biases by `pad_heads`, w is in packed panels.
    """
    h = sizes.h
    within = rows // h.query_length < threads
    key = (*h.key, sizes.sources, sizes.n, sizes.epilogue, within)
    made = sum(s.features * d for s, d in zip(sizes.sources, _dims(h), strict=True)) * h.heads
    work = made + h.heads * (h.key_length * (h.head_dim + h.width) + h.width * sizes.n)
    return make_kernel("minimal_attention", key, lambda: _build(sizes, within), work=work)


def source_heads(h: Heads) -> tuple[int, int, int]:
    """Return the heads of q, k and v."""
    return h.heads, h.kv_heads or h.heads, h.kv_heads or h.heads


def _dims(h: Heads) -> tuple[int, int, int]:
    return h.head_dim, h.head_dim, h.width


def _build(sizes: Sizes, within: bool) -> tirx.PrimFunc:
    h, width = sizes.h, panel_width(sizes.h.isa)

    def body() -> None:
        rows, key_rows = symbol("rows"), symbol("key_rows")
        buffers = {}
        for name, source in zip("qkv", sizes.sources, strict=True):
            m = rows if name == "q" else key_rows
            buffers[f"x{name}"] = argument(f"x{name}", (m, i64(source.features)))
        for name, source, dim in zip("qkv", sizes.sources, _dims(h), strict=True):
            panels = -(-dim // width)
            heads = source_heads(h)["qkv".index(name)]
            shape = (heads, panels, source.features, width)
            buffers[f"w{name}"] = argument(f"w{name}", tuple(map(i64, shape)))
            if source.bias:
                buffers[f"b{name}"] = argument(f"b{name}", (i64(heads * panels * width),))
        if h.mask != "none":
            buffers["mask"] = argument("mask", h.mask_shape())
        buffers["w"] = argument("w", (i64(sizes.n // width), i64(h.heads * h.width), i64(width)))
        if sizes.epilogue.bias:
            buffers["bias"] = argument("bias", (i64(sizes.n),))
        if sizes.epilogue.residual:
            buffers["residual"] = argument("residual", (rows, i64(sizes.n)))
        norm = RowNorm.declare(h.isa.lanes, sizes.n, sizes.epilogue.norm)
        buffers["y"] = argument("y", (rows, i64(sizes.n)))
        with loops(rows // h.query_length, kind=T.serial if within else T.parallel) as (element,):
            _Element(sizes, buffers, element, T.parallel if within else T.serial).emit(norm)

    return replace_math(prim_func(body))


@dataclass
class _Element:
    """Code for one element of the batch; ``kind`` is the loop over the rows of a step."""

    sizes: Sizes
    buffers: dict
    element: Expr
    kind: Callable

    def __post_init__(self) -> None:
        h = self.sizes.h
        self.problem: Problem = replace(h.problem, in_parts=True)
        width, p = panel_width(h.isa), self.problem
        self.keys = max(p.chunk, GENERATED // p.chunk * p.chunk)  # generated at a time
        self.tiles = -(-h.query_length // p.tile)
        dims = [-(-dim // width) * width for dim in _dims(h)]
        lengths = (h.query_length, min(self.keys, h.key_length), min(self.keys, h.key_length))
        self.made = {
            name: View(_scratch(length * dim), stride=dim)
            for name, length, dim in zip("qkv", lengths, dims, strict=True)
        }
        self.out = View(_scratch(h.query_length * h.width), stride=h.width)
        self.top, self.total = (_scratch(self.tiles * p.tile) for _ in range(2))

    def emit(self, norm: RowNorm | None) -> None:
        """Emit all heads, and the epilogue."""
        h, n = self.sizes.h, self.sizes.n
        with self._blocks(h.query_length) as (sums, _):
            sums.clear(n)
        with loops(h.heads) as (head,):
            self._generate("q", head, T.int64(0), h.query_length)
            self._reset()
            with loops(-(-h.key_length // self.keys)) as (c,):
                first = c * self.keys
                count = T.min(i64(self.keys), h.key_length - first)
                for name in "kv":
                    self._generate(name, head, first, count)
                self._attend(head, first, count)
            with self._blocks(h.query_length) as (sums, start):
                local = lambda row, p, start=start: self.out.load(start + row, p)  # noqa: E731
                sums.add(n, local, self.buffers["w"], head * h.width, h.width)
        with self._blocks(h.query_length) as (sums, _):
            sums.finish(n, self.buffers.get("bias"), self.buffers.get("residual"))
            if norm is not None:
                norm.emit(self.buffers["y"], sums.first, sums.count, parallel=False)

    @contextmanager
    def _blocks(self, length) -> Iterator[tuple[PartialSums, Expr]]:
        """Loop over blocks of rows of y and yield their sums and their first row."""
        h = self.sizes.h
        with loops((length + BLOCK - 1) // BLOCK, kind=self.kind) as (b,):
            start = b * BLOCK
            count = T.min(i64(BLOCK), length - start)
            first = self.element * h.query_length + start
            yield PartialSums(h.isa, self.buffers["y"], first, count, HEIGHTS[h.isa.name]), start

    def _generate(self, name: str, head: Expr, first: Expr, count) -> None:
        """Make q, k or v of a head for ``count`` rows from ``first`` of the element on."""
        h, made, x = self.sizes.h, self.made[name], self.buffers[f"x{name}"]
        length = h.query_length if name == "q" else h.key_length
        w, bias = self.buffers[f"w{name}"], self.buffers.get(f"b{name}")
        features = self.sizes.sources["qkv".index(name)].features
        lanes, width = h.isa.lanes, VECTORS * h.isa.lanes
        head = head // (h.heads // source_heads(h)["qkv".index(name)])
        with (
            self._blocks(count) as (sums, start),
            loops(made.stride // width) as (panel,),
        ):

            def write(v: int, row, value) -> None:
                column = panel * width + v * lanes
                if bias is not None:
                    value = value + bias[T.ramp(head * made.stride + column, 1, lanes)]
                made.store(value, start + row, column, lanes)

            row = self.element * length + first + start
            left = lambda i, p: x[row + i, p]  # noqa: E731
            right = lambda p, v: w[head, panel, p, sums.lane(v)]  # noqa: E731
            sums.multiply(left, right, features, write)

    def _reset(self) -> None:
        """Start a head with no key seen."""
        h, p = self.sizes.h, self.problem
        with loops(self.tiles * p.tile) as (i,):
            T.buffer_store(self.top, T.float32(-inf), [i])
            T.buffer_store(self.total, T.float32(0), [i])
        with loops(h.query_length * h.width) as (i,):
            T.buffer_store(self.out.buffer, T.float32(0), [i])

    def _attend(self, head: Expr, first: Expr, count: Expr) -> None:
        """Add ``count`` keys from ``first`` on to every tile of queries."""
        h, p = self.sizes.h, self.problem
        with loops(self.tiles, kind=self.kind) as (t,):
            start = t * p.tile
            key = lambda name: replace(self.made[name], row=-first)  # noqa: E731
            at = Operands(
                replace(self.made["q"], row=start), key("k"), key("v"),
                replace(self.out, row=start),
                h.mask_view(self.buffers, self.element, head, start),
            )  # fmt: skip

            def emit(queries: int) -> None:
                tile = declare_tile(p, at, start, queries)
                tile.begin()
                self._exchange(tile, start, load=True)
                tile.add_chunks(first // p.chunk, (first + count + (p.chunk - 1)) // p.chunk)
                with T.If(first + count == h.key_length), T.Then():
                    tile.divide()
                self._exchange(tile, start, load=False)

            emit_ragged(p, t, emit)

    def _exchange(self, tile: Tile, start: Expr, *, load: bool) -> None:
        """Load or keep the running maximum and sum of a tile."""
        with loops(tile.queries) as (i,):
            for mine, kept in ((tile.top, self.top), (tile.total, self.total)):
                if load:
                    T.buffer_store(mine, kept[start + i], [i])
                else:
                    T.buffer_store(kept, mine[i], [start + i])
