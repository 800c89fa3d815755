"""What `minimal_attention` does for one element of the batch, head after head."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from math import inf

from tvm.ir import Expr
from tvm.script.ir_builder import tirx as T

from tvmstruct.schedules.builder import i64, loops
from tvmstruct.schedules.compute.dense import Epilogue
from tvmstruct.schedules.compute.layer_norm import RowNorm
from tvmstruct.schedules.x86.attention import Heads, emit_ragged
from tvmstruct.schedules.x86.attention_tile import Operands, Problem, Tile, View, scratch
from tvmstruct.schedules.x86.packed_dense import HEIGHTS, VECTORS, panel_width
from tvmstruct.schedules.x86.partial_sums import PartialSums
from tvmstruct.schedules.x86.query_tile import declare_tile
from tvmstruct.schedules.x86.skipping import Keys

GENERATED = 256  # keys whose k and v are made at a time: enough rows to reuse the weights
BLOCK = 64  # rows of y that a thread takes at a time


@dataclass(frozen=True)
class Source:
    """Where q, k or v comes from: features of the input, and whether there is a bias."""

    features: int
    bias: bool


@dataclass(frozen=True)
class Sizes:
    """The static side: heads, what feeds q, k and v, the projection to n and its epilogue.

    With zero skipping, a row of v is made where some query weighs its key and at most the share
    ``zero_ratio`` of those that see it does not.
    """

    h: Heads
    sources: tuple[Source, Source, Source]
    n: int
    epilogue: Epilogue
    zero_ratio: float = 1.0


def source_heads(h: Heads) -> tuple[int, int, int]:
    """Return the heads of q, k and v."""
    return h.heads, h.kv_heads or h.heads, h.kv_heads or h.heads


def head_dims(h: Heads) -> tuple[int, int, int]:
    """Return the features of a head of q, k and v."""
    return h.head_dim, h.head_dim, h.width


def tile_problem(h: Heads) -> Problem:
    """Return what one tile computes of ``h`` where q, k and v are made on the way."""
    return replace(h.problem, in_parts=True, makes_values=h.skip is not None)


@dataclass
class Element:
    """Code for one element of the batch; ``kind`` is the loop over the rows of a step."""

    sizes: Sizes
    buffers: dict
    element: Expr
    kind: Callable

    def __post_init__(self) -> None:
        h = self.sizes.h
        self.problem = tile_problem(h)
        width, p = panel_width(h.isa), self.problem
        # generated at a time; whether a weight is zero is known when its chunk is
        self.keys = p.chunk if p.makes_values else max(p.chunk, GENERATED // p.chunk * p.chunk)
        self.tiles = -(-h.query_length // p.tile)
        dims = [-(-dim // width) * width for dim in head_dims(h)]
        lengths = (h.query_length, min(self.keys, h.key_length), min(self.keys, h.key_length))
        self.made = {
            name: View(scratch(length * dim), stride=dim)
            for name, length, dim in zip("qkv", lengths, dims, strict=True)
        }
        self.out = View(scratch(h.query_length * h.width), stride=h.width)
        self.kept = {name: scratch(self.tiles * p.tile) for name in ("top", "total")}

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
                self._add_keys(head, first, count)
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

    def _generate(
        self, name: str, head: Expr, first: Expr, count, places: Keys | None = None
    ) -> None:
        """Make q, k or v of a head for ``count`` rows from ``first`` of the element on.

        With ``places`` those are the rows it lists, and each goes where it would without.
        """
        h, made, x = self.sizes.h, self.made[name], self.buffers[f"x{name}"]
        length = h.query_length if name == "q" else h.key_length
        w, bias = self.buffers[f"w{name}"], self.buffers.get(f"b{name}")
        features = self.sizes.sources["qkv".index(name)].features
        lanes, width = h.isa.lanes, VECTORS * h.isa.lanes
        head = head // (h.heads // source_heads(h)["qkv".index(name)])
        place = (lambda row: row) if places is None else places.at
        with (
            self._blocks(count) as (sums, start),
            loops(made.stride // width) as (panel,),
        ):

            def write(v: int, row, value) -> None:
                column = panel * width + v * lanes
                if bias is not None:
                    value = value + bias[T.ramp(head * made.stride + column, 1, lanes)]
                made.store(value, place(start + row), column, lanes)

            origin = self.element * length + first
            left = lambda i, p: x[origin + place(start + i), p]  # noqa: E731
            right = lambda p, v: w[head, panel, p, sums.lane(v)]  # noqa: E731
            sums.multiply(left, right, features, write)

    def _reset(self) -> None:
        """Start a head with no key seen."""
        h, p = self.sizes.h, self.problem
        with loops(self.tiles * p.tile) as (i,):
            T.buffer_store(self.kept["top"], T.float32(-inf), [i])
            T.buffer_store(self.kept["total"], T.float32(0), [i])
        with loops(h.query_length * h.width) as (i,):
            T.buffer_store(self.out.buffer, T.float32(0), [i])

    def _add_keys(self, head: Expr, first: Expr, count: Expr) -> None:
        """Make k and v of ``count`` keys from ``first`` on, and add them to every query."""
        p = self.problem
        for name in "kv":
            self._generate(name, head, first, count)

        def emit(_: Expr, at: Operands, start: Expr, queries: int) -> None:
            tile = declare_tile(p, at, start, queries)
            tile.begin()
            self._exchange(tile, start, "top", "total", load=True)
            tile.add_chunks(first // p.chunk, (first + count + (p.chunk - 1)) // p.chunk)
            self._divide(tile, first + count)
            self._exchange(tile, start, "top", "total", load=False)

        self._each_tile(head, first, emit)

    def _each_tile(
        self, head: Expr, first: Expr, emit: Callable[[Expr, Operands, Expr, int], None]
    ) -> None:
        """Emit ``emit(number, operands, first query, queries)`` of every tile of a head.

        The made rows of k and v are those of keys from ``first`` on.
        """
        h, p = self.sizes.h, self.problem
        with loops(self.tiles, kind=self.kind) as (t,):
            start = t * p.tile
            key = lambda name: replace(self.made[name], row=-first)  # noqa: E731
            at = Operands(
                replace(self.made["q"], row=start), key("k"), key("v"),
                replace(self.out, row=start),
                h.mask_view(self.buffers, self.element, head, start),
            )  # fmt: skip
            emit_ragged(p, t, lambda queries: emit(t, at, start, queries))

    def _divide(self, tile: Tile, stop: Expr) -> None:
        """Divide the sums of a tile where the last key is one of them."""
        with T.If(stop == self.sizes.h.key_length), T.Then():
            tile.divide()

    def _exchange(self, tile: Tile, start: Expr, *names: str, load: bool) -> None:
        """Load or keep what a tile knows of its queries."""
        with loops(tile.queries) as (i,):
            for name in names:
                mine, kept = getattr(tile, name), self.kept[name]
                if load:
                    T.buffer_store(mine, kept[start + i], [i])
                else:
                    T.buffer_store(kept, mine[i], [start + i])
