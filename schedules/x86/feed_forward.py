"""Feed-forward splitting on x86: a chunk of the hidden features through both matrices at once.

``y = residual + act(x @ w1 + b1) @ w2 + b2`` (NLP-Fast, "feed-forward splitting"). One thread
takes a block of rows; for that block a chunk of hidden features is computed, activated and
multiplied into y while it is in cache, so the hidden layer never exists in memory. Both weights
are packed panels, and each streams once for a block of rows.
"""

from __future__ import annotations

from dataclasses import dataclass

from tvm import tirx
from tvm.script.ir_builder import tirx as T

from tvmstruct.schedules.builder import argument, i64, loops, prim_func, symbol
from tvmstruct.schedules.compute.dense import ACTIVATIONS, Epilogue, tile_heights
from tvmstruct.schedules.compute.layer_norm import RowNorm
from tvmstruct.schedules.registry import Kernel, Pick, Space, divisors, make_kernel
from tvmstruct.schedules.vector_math import replace_math
from tvmstruct.schedules.x86.packed_dense import HEIGHTS, VECTORS, panel_width
from tvmstruct.schedules.x86.partial_sums import PartialSums
from tvmstruct.targets import Isa

BLOCK = 128  # rows of a block: enough to reuse a streamed panel, few enough for the cache
HIDDEN = 256  # hidden features of a chunk: y is read and written once per chunk
MOST = 4  # times as many rows and features at most, when tuning chooses
MANY_ROWS = 256  # below, the hidden rows stay in cache anyway and separate kernels tie


def block_rows(rows: int, threads: int) -> int:
    """Return rows per block such that all threads get equally many blocks."""
    blocks = threads * -(-rows // (BLOCK * threads))
    return -(-rows // (blocks * 8)) * 8


def legal(isa: Isa, n: int, hidden: int) -> bool:
    """Return whether both weights are whole panels."""
    return n % panel_width(isa) == 0 and hidden % panel_width(isa) == 0


def pays(isa: Isa, n: int, hidden: int, rows: int, threads: int) -> bool:
    """Return whether the split form is legal and the faster one for ``rows`` rows."""
    return legal(isa, n, hidden) and rows >= max(MANY_ROWS, BLOCK * threads)


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


def _hidden_panel(sums: PartialSums, buffers: dict, sizes, panel, local, activation: str) -> None:
    """Compute one panel of hidden features and activate it; ``sizes`` are (k, chunk)."""
    lanes, width, (k, chunk) = sums.isa.lanes, sums.width, sizes

    def write(v: int, row, value) -> None:
        if "b1" in buffers:
            value = value + buffers["b1"][T.ramp(panel * width + v * lanes, 1, lanes)]
        at = row * chunk + local * width + v * lanes
        T.buffer_store(buffers["inner"], ACTIVATIONS[activation](value), [T.ramp(at, 1, lanes)])

    left = lambda row, p: buffers["x"][sums.first + row, p]  # noqa: E731
    right = lambda p, v: buffers["w1"][panel, p, sums.lane(v)]  # noqa: E731
    sums.multiply(left, right, k, write)


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
        sums = PartialSums(isa, buffers["y"], b * block, count, cut.heights)
        sums.clear(n)
        with loops(hidden // chunk) as (c,):
            with loops(chunk // width) as (i,):
                panel = c * (chunk // width) + i
                _hidden_panel(sums, buffers, (k, chunk), panel, i, up.activation)
            local = lambda row, p: buffers["inner"][row * chunk + p]  # noqa: E731
            sums.add(n, local, buffers["w2"], c * chunk, chunk)
        sums.finish(n, buffers.get("b2"), buffers.get("residual"))
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
