"""Attention and its output projection in one kernel: partial-head update (NLP-Fast, III-B.1).

``y = residual + sum_h softmax(q_h k_h^T) v_h @ w_h + b``: the result of a head, or of a few, is
multiplied with its rows of the projection and added to y at once, so the concatenated heads
exist nowhere. A thread takes a block of rows through all heads.
"""

from __future__ import annotations

from dataclasses import dataclass

from tvm import tirx
from tvm.ir import Expr
from tvm.script.ir_builder import tirx as T

from tvmstruct.schedules.builder import argument, i64, loops, prim_func
from tvmstruct.schedules.compute.dense import Epilogue
from tvmstruct.schedules.compute.layer_norm import RowNorm
from tvmstruct.schedules.registry import Kernel, Pick, Space, make_kernel
from tvmstruct.schedules.vector_math import replace_math
from tvmstruct.schedules.x86.attention import Heads, emit_ragged
from tvmstruct.schedules.x86.attention_tile import View
from tvmstruct.schedules.x86.packed_dense import HEIGHTS, panel_width
from tvmstruct.schedules.x86.partial_sums import PartialSums
from tvmstruct.schedules.x86.query_tile import declare_tile

BLOCK = 128  # rows of a task: enough to reuse the projection's weights, few enough for the cache
LEAST_BLOCK = 32  # fewer rows read the weights too often
DEPTH = 256  # features of heads that are multiplied together: y is read and written once for each


@dataclass(frozen=True)
class Cut:
    """How the work is cut: a task is ``block`` queries of one element, or all of several."""

    block: int
    elements: int
    heads: int  # that are multiplied together

    @property
    def rows(self) -> int:
        """Rows of a task at most."""
        return self.block * self.elements


def pays(h: Heads, n: int, rows: int, threads: int) -> bool:
    """Return whether one kernel is legal and no slower than two for ``rows`` rows."""
    return n % panel_width(h.isa) == 0 and rows >= LEAST_BLOCK * threads


def default_cut(h: Heads, rows: int, threads: int, most: int = BLOCK) -> Cut:
    """Return blocks of up to ``most`` rows, so many that every thread gets as much to do."""
    length, batch = h.query_length, max(1, rows // h.query_length)
    heads = _heads_together(h, DEPTH)
    if length > most:
        pieces = -(-length // most)
        while batch * pieces % threads and length // (pieces + 1) >= LEAST_BLOCK:
            pieces += 1
        return Cut(_whole_tiles(h, -(-length // pieces)), 1, heads)
    if batch < threads and length >= 2 * LEAST_BLOCK:
        return Cut(_whole_tiles(h, -(-length // min(threads, length // LEAST_BLOCK))), 1, heads)
    tasks = threads * -(-batch * length // (threads * most))
    return Cut(length, max(1, batch // tasks), heads)


def _whole_tiles(h: Heads, rows: int) -> int:
    return -(-rows // h.problem.tile) * h.problem.tile


def _heads_together(h: Heads, depth: int) -> int:
    fits = [g for g in range(1, h.heads + 1) if h.heads % g == 0 and g * h.width <= depth]
    return max(fits, default=1)


def projected_attention(h: Heads, n: int, epilogue: Epilogue, rows: int, threads: int) -> Kernel:
    """Return the kernel: q, k, v, [mask], w, [bias], [residual], [gamma, beta], y.

    w is (heads * width, n) in packed panels.
    """
    cut = default_cut(h, rows, threads)

    def build_tuned(rows: int, pick: Pick) -> tirx.PrimFunc:
        return _build(h, n, epilogue, _choose(h, rows, threads, pick))

    space = Space(f"{n} {epilogue.words} of {h.words}", build_tuned)
    work = h.heads * (h.key_length * (h.head_dim + h.width) + h.width * n)
    return make_kernel(
        "projected_attention", (*h.key, n, epilogue, cut),
        lambda: _build(h, n, epilogue, cut), work=work, space=space,
    )  # fmt: skip


def _choose(h: Heads, rows: int, threads: int, pick: Pick) -> Cut:
    default = default_cut(h, rows, threads)
    options = {default_cut(h, rows, threads, most).block for most in (32, 64, 96, 128, 256)}
    block = default.block
    if default.elements == 1:
        block = pick("block", sorted({block, *options}), block)
    together = sorted({_heads_together(h, depth) for depth in (1, 64, 128, 256)} | {default.heads})
    return Cut(block, default.elements, pick("heads", together, default.heads))


def _build(h: Heads, n: int, epilogue: Epilogue, cut: Cut) -> tirx.PrimFunc:
    width = panel_width(h.isa)

    def body() -> None:
        buffers = h.arguments()
        m = buffers["q"].shape[0]
        buffers["w"] = argument("w", (i64(n // width), i64(h.heads * h.width), i64(width)))
        if epilogue.bias:
            buffers["bias"] = argument("bias", (i64(n),))
        if epilogue.residual:
            buffers["residual"] = argument("residual", (m, i64(n)))
        norm = RowNorm.declare(h.isa.lanes, n, epilogue.norm)
        buffers["y"] = argument("y", (m, i64(n)))
        _emit(h, n, cut, buffers, norm)

    return replace_math(prim_func(body))


def _emit(h: Heads, n: int, cut: Cut, buffers: dict, norm: RowNorm | None) -> None:
    m, length = buffers["q"].shape[0], h.query_length
    pieces = -(-length // cut.block)
    batch = m // length
    tasks = (batch + cut.elements - 1) // cut.elements * pieces
    with loops(tasks, kind=T.parallel) as (task,):
        element, start = task // pieces * cut.elements, task % pieces * cut.block
        first = element * length + start
        if cut.elements > 1:
            elements = T.min(i64(cut.elements), batch - element)
            count = elements * length
        else:
            elements, count = i64(1), T.min(i64(cut.block), length - start)
        sums = PartialSums(h.isa, buffers["y"], first, count, HEIGHTS[h.isa.name])
        sums.clear(n)
        depth = cut.heads * h.width
        inner = T.alloc_buffer((i64(cut.rows * depth),), "float32", scope="global")
        local = View(inner, stride=depth)
        with loops(h.heads // cut.heads) as (group,):
            with loops(cut.heads, elements) as (i, e):
                out = View(inner, e * length, i * h.width, stride=depth)
                _emit_head(h, buffers, element + e, group * cut.heads + i, start, cut.block, out)
            sums.add(n, local.load, buffers["w"], group * depth, depth)
        sums.finish(n, buffers.get("bias"), buffers.get("residual"))
        if norm is not None:
            norm.emit(buffers["y"], first, count, parallel=False)


def _emit_head(
    h: Heads, buffers: dict, batch: Expr, head: Expr, start: Expr, block: int, out: View
) -> None:
    """Emit the attention of one head for the queries ``[start, start + block)`` of an element."""
    problem = h.problem
    tiles = -(-min(block, h.query_length) // problem.tile)
    if h.query_length > block and h.query_length % block:
        tiles = T.min(i64(tiles), -(-h.query_length // problem.tile) - start // problem.tile)
    with loops(tiles) as (t,):
        at = start + t * problem.tile
        place = View(out.buffer, out.row + t * problem.tile, out.column, stride=out.stride)
        operands = h.operands(buffers, batch, head, at, place)
        emit_ragged(
            problem,
            at // problem.tile,
            lambda queries: declare_tile(problem, operands, at, queries).attend(),
        )
