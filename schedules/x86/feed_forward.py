"""Feed-forward splitting on x86: a chunk of the hidden features through both matrices at once.

``y = residual + act(x @ w1 + b1) @ w2 + b2`` (NLP-Fast, "feed-forward splitting"). One thread
takes a block of rows; for that block a chunk of hidden features is computed, activated and
multiplied into y while it is in cache, so the hidden layer never exists in memory. Both weights
are packed panels, and each streams once for a block of rows.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import product

from tvm import tirx
from tvm.script.ir_builder import tirx as T

from tvmstruct.schedules.builder import argument, i64, loops, prim_func, symbol
from tvmstruct.schedules.compute.dense import ACTIVATIONS, Epilogue, row_segments, tile_heights
from tvmstruct.schedules.compute.layer_norm import RowNorm
from tvmstruct.schedules.registry import Kernel, Pick, Space, divisors, make_kernel
from tvmstruct.schedules.vector_math import replace_math
from tvmstruct.schedules.x86.packed_dense import HEIGHTS, VECTORS, panel_width
from tvmstruct.schedules.x86.register_tile import accumulate
from tvmstruct.targets import Isa

BLOCK = 64  # rows of a block: enough to reuse a streamed panel, few enough for the cache
HIDDEN = 256  # hidden features of a chunk: y is read and written once per chunk
MOST = 4  # times as many rows and features at most, when tuning chooses
MANY_ROWS = 512  # below, the hidden rows stay in cache anyway and separate kernels tie


def block_rows(rows: int, threads: int) -> int:
    """Return rows per block such that all threads get equally many blocks."""
    blocks = threads * -(-rows // (BLOCK * threads))
    return -(-rows // (blocks * 8)) * 8


def pays(isa: Isa, n: int, hidden: int, rows: int, threads: int) -> bool:
    """Return whether the split form is legal and the faster one for ``rows`` rows."""
    width = panel_width(isa)
    return n % width == 0 and hidden % width == 0 and rows >= max(MANY_ROWS, BLOCK * threads)


@dataclass(frozen=True)
class Cut:
    """How the work is cut: rows of a block, hidden features of a chunk, heights of tiles."""

    rows: int | None  # all of them; None: any number
    block: int
    chunk: int
    heights: tuple[int, ...]


def feed_forward(
    isa: Isa,
    sizes: tuple[int, int, int],
    up: Epilogue,
    down: Epilogue,
    block: int,
) -> Kernel:
    """Return the kernel: x, w1, [b1], w2, [b2], [residual], [gamma, beta], y.

    ``sizes`` is (k, hidden, n); ``up`` and ``down`` say what follows the two products.
    """
    key = (isa.name, *sizes, up, down, block)
    k, hidden, n = sizes
    default = Cut(None, block, _chunk(isa, hidden), HEIGHTS[isa.name])

    def build(cut: Cut) -> tirx.PrimFunc:
        return replace_math(prim_func(lambda: _emit(isa, sizes, (up, down), cut)))

    def build_tuned(rows: int, pick: Pick) -> tirx.PrimFunc:
        return build(_choose(isa, default, hidden, rows, pick))

    space = Space(f"{k} {hidden} {n} {up.words} then {down.words}", build_tuned)
    work = hidden * (k + n)
    return make_kernel("feed_forward", key, lambda: build(default), work=work, space=space)


def _chunk(isa: Isa, hidden: int) -> int:
    """Return the hidden features of a chunk: whole panels of both weights."""
    width = panel_width(isa)
    return max(c for c in range(width, max(HIDDEN, width) + 1, width) if hidden % c == 0)


def _choose(isa: Isa, default: Cut, hidden: int, rows: int, pick: Pick) -> Cut:
    """Return the cut of choice for exactly ``rows`` rows."""
    most = min(rows, (isa.registers - 4) // VECTORS)  # sums, and the operands of one FMA
    height = pick("height", range(min(most, 3), most + 1), min(rows, default.heights[0]))
    block = min(rows, default.block)
    blocks = [d for d in divisors(rows, height, rows) if d <= MOST * BLOCK]
    block = pick("block", sorted({block, *blocks}), block)
    width = panel_width(isa)
    panels = divisors(hidden // width, 1, hidden // width)
    chunks = [p * width for p in panels if p * width <= MOST * HIDDEN]
    chunk = pick("chunk", sorted({default.chunk, *chunks}), default.chunk)
    return Cut(rows, block, chunk, tile_heights(height, None if rows % block else block))


@dataclass
class _Block:
    """Code for one block of rows: its buffers and where it starts."""

    isa: Isa
    buffers: dict
    first: object
    count: object
    cut: Cut

    def clear(self, n: int) -> None:
        """Set y to zero, onto which every chunk adds."""
        lanes, y = self.isa.lanes, self.buffers["y"]
        with loops(self.count, n // lanes) as (row, j):
            place = [self.first + row, T.ramp(j * lanes, 1, lanes)]
            T.buffer_store(y, T.broadcast(T.float32(0), lanes), place)

    def finish(self, n: int) -> None:
        """Add b2 and the residual: last, since sums onto a large residual would lose digits."""
        lanes, (b2, residual, y) = self.isa.lanes, map(self.buffers.get, ("b2", "residual", "y"))
        if b2 is None and residual is None:
            return
        with loops(self.count, n // lanes) as (row, j):
            at = T.ramp(j * lanes, 1, lanes)
            value = y[self.first + row, at]
            value = value if b2 is None else value + b2[at]
            value = value if residual is None else value + residual[self.first + row, at]
            T.buffer_store(y, value, [self.first + row, at])

    def up(self, k: int, panel, local, activation: str) -> None:
        """Compute one panel of hidden features and activate it."""
        lanes, b1, inner = self.isa.lanes, self.buffers.get("b1"), self.buffers["inner"]
        width = VECTORS * lanes

        def emit(height: int, row) -> None:
            left = lambda i, p: self.buffers["x"][self.first + row + i, p]  # noqa: E731
            right = lambda p, v: self.buffers["w1"][panel, p, self._lane(v)]  # noqa: E731
            sums = self._multiply(height, k, left, right)
            for i, v in product(range(height), range(VECTORS)):
                value = sums[v][i]
                if b1 is not None:
                    value = value + b1[T.ramp(panel * width + v * lanes, 1, lanes)]
                at = (row + i) * self.cut.chunk + local * width + v * lanes
                value = ACTIVATIONS[activation](value)
                T.buffer_store(inner, value, [T.ramp(at, 1, lanes)])

        self._tiles(emit)

    def down(self, panel, offset) -> None:
        """Add the chunk's share to one panel of y."""
        lanes, inner, y = self.isa.lanes, self.buffers["inner"], self.buffers["y"]

        def emit(height: int, row) -> None:
            def out(i: int, v: int) -> tuple:
                at = panel * (VECTORS * lanes) + v * lanes
                return (self.first + row + i, T.ramp(at, 1, lanes))

            left = lambda i, p: inner[(row + i) * self.cut.chunk + p]  # noqa: E731
            right = lambda p, v: self.buffers["w2"][panel, offset + p, self._lane(v)]  # noqa: E731
            sums = self._multiply(height, self.cut.chunk, left, right)
            for i, v in product(range(height), range(VECTORS)):
                T.buffer_store(y, y[out(i, v)] + sums[v][i], list(out(i, v)))

        self._tiles(emit)

    def _multiply(self, height: int, depth: int, left, right) -> list[list]:
        def step(p, add) -> None:
            for i, v in product(range(height), range(VECTORS)):
                add(i, v, T.broadcast(left(i, p), self.isa.lanes), right(p, v))

        return accumulate(self.isa, self.isa.lanes, (height, VECTORS), depth, step)

    def _lane(self, v: int):
        return T.ramp(i64(v * self.isa.lanes), 1, self.isa.lanes)

    def _tiles(self, emit) -> None:
        for segment in row_segments(self.count, self.cut.heights):
            with loops(segment.count) as (t,):
                emit(segment.height, segment.start + t * segment.height)


def _emit(isa: Isa, sizes, epilogues: tuple[Epilogue, Epilogue], cut: Cut) -> None:
    k, hidden, n = sizes
    width, rows, block, chunk = panel_width(isa), cut.rows, cut.block, cut.chunk
    m = symbol("m") if rows is None else i64(rows)
    up, down = epilogues
    buffers = _arguments(m, sizes, (up.bias, down.bias, down.residual), width)
    norm = RowNorm.declare(isa.lanes, n, down.norm)
    buffers["y"] = argument("y", (m, i64(n)))
    with loops((m + block - 1) // block, kind=T.parallel) as (b,):
        whole = rows is not None and rows % block == 0
        count = block if whole else T.min(i64(block), m - b * block)
        buffers["inner"] = T.alloc_buffer((i64(block * chunk),), "float32", scope="global")
        work = _Block(isa, buffers, b * block, count, cut)
        work.clear(n)
        with loops(hidden // chunk) as (c,):
            with loops(chunk // width) as (panel,):
                work.up(k, c * (chunk // width) + panel, panel, up.activation)
            with loops(n // width) as (panel,):
                work.down(panel, c * chunk)
        work.finish(n)
        if norm is not None:
            norm.emit(buffers["y"], b * block, count, parallel=False)


def _arguments(m, sizes, flags, width: int) -> dict:
    k, hidden, n = sizes
    shapes = {
        "x": (m, i64(k)),
        "w1": (i64(hidden // width), i64(k), i64(width)),
        "b1": (i64(hidden),) if flags[0] else None,
        "w2": (i64(n // width), i64(hidden), i64(width)),
        "b2": (i64(n),) if flags[1] else None,
        "residual": (m, i64(n)) if flags[2] else None,
    }
    return {name: argument(name, shape) for name, shape in shapes.items() if shape is not None}
