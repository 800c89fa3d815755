"""Attention of few queries to many keys: threads take ranges of keys, and their shares merge.

A memory network asks one question of millions of keys; there is no second tile of queries for a
second thread. Each range keeps a running maximum, a sum of weights and a weighted sum of its own,
so k and v stream through once and the working set is one chunk a thread, whatever their number.
At the end every share is scaled to the common maximum (NLP-Fast eq. 4; associativity of the
online softmax).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from math import inf

from tvm import tirx
from tvm.ir import Expr
from tvm.script.ir_builder import tirx as T

from tvmstruct.schedules import vector_math
from tvmstruct.schedules.builder import argument, i64, loops, prim_func
from tvmstruct.schedules.registry import Kernel, make_kernel
from tvmstruct.schedules.x86 import skipping
from tvmstruct.schedules.x86.attention import Heads, emit_ragged
from tvmstruct.schedules.x86.attention_tile import View, pieces, spread
from tvmstruct.schedules.x86.attention_tile import scratch as _scratch
from tvmstruct.schedules.x86.dynamic import hand_out
from tvmstruct.schedules.x86.query_tile import declare_tile

LEAST_KEYS = 1024  # of a range: fewer are not worth the merging
UNEVEN = 1.1  # busiest thread over the average, from which on splitting keys pays


@dataclass(frozen=True)
class _Shares:
    """What each (tile of queries, range of keys) found; rows of a tile lie together."""

    sums: tirx.Buffer  # (pairs * tile, width), flat
    top: tirx.Buffer  # (pairs * tile)
    total: tirx.Buffer


SHARES = 8  # ranges for each thread where some may skip more than others


def ranges(h: Heads, rows: int, threads: int) -> int:
    """Return into how many ranges of keys every tile is split; 1 where that does not pay."""
    tasks = rows // h.query_length * h.heads * -(-h.query_length // h.problem.tile)
    if not tasks or h.causal:  # ranges of a causal tile would be of uneven work
        return 1
    most = min(h.key_length // LEAST_KEYS, h.problem.chunks)
    for count in range(1, min(most, threads) + 1):
        if -(-tasks * count // threads) * threads <= UNEVEN * tasks * count:
            return count if h.skip is None else min(most, count * SHARES)
    return max(1, most) if tasks < threads else 1


def streamed_attention(h: Heads, rows: int, count: int, threads: int) -> Kernel:
    """Return the kernel ``(q, k, v[, mask], out)`` for exactly ``rows`` rows of q."""
    work = h.heads * h.key_length * (h.head_dim + h.width)
    key = (*h.key, rows, count, threads if h.skip else 0)
    build = lambda: _build(h, rows, count, threads)  # noqa: E731
    return make_kernel("streamed_attention", key, build, work=work)


def _build(h: Heads, rows: int, count: int, threads: int) -> tirx.PrimFunc:
    problem = h.problem
    tiles = -(-h.query_length // problem.tile)
    tasks = rows // h.query_length * h.heads * tiles
    pairs = tasks * count

    def body() -> None:
        buffers = h.arguments()
        buffers["out"] = argument("out", (i64(rows), i64(h.heads * h.width)))
        shares = _Shares(
            _scratch(pairs * problem.tile * h.width),
            _scratch(pairs * problem.tile),
            _scratch(pairs * problem.tile),
        )
        if h.skip is None:
            with loops(pairs, kind=T.parallel) as (pair,):
                _emit_share(h, buffers, shares, pair, count)
        else:
            _hand_out_shares(h, buffers, shares, pairs, count, threads)
        with loops(tasks) as (task,):
            _emit_merge(h, buffers, shares, task, count)

    return prim_func(body)


def _hand_out_shares(
    h: Heads, buffers: dict, shares: _Shares, pairs: int, count: int, threads: int
) -> None:
    """Emit all pairs where each may skip more than others, and what all have found is known.

    The maximum of few keys is far under that of millions: by itself a range would skip less.
    """
    queries = pairs // count * h.problem.tile
    best = _scratch(queries)
    with loops(queries) as (i,):
        T.buffer_store(best, T.float32(-inf), [i])

    def emit(pair: Expr) -> None:
        seen = View(best, pair // count, stride=h.problem.tile) if h.problem.streamed else None
        _emit_share(h, buffers, shares, pair, count, seen)

    with T.attr(T.int64(0), "pragma_import_llvm", skipping.LLVM):
        hand_out(i64(pairs), threads, emit)


def _place(h: Heads, task: Expr) -> tuple[Expr, Expr, Expr]:
    """Return (element of the batch, head, tile) of a task."""
    tiles = -(-h.query_length // h.problem.tile)
    return task // (tiles * h.heads), task // tiles % h.heads, task % tiles


def _emit_share(
    h: Heads,
    buffers: dict,
    shares: _Shares,
    pair: Expr,
    count: int,
    best: View | None = None,
) -> None:
    """Emit the attention of one tile of queries to one range of keys."""
    problem, task, part = h.problem, pair // count, pair % count
    batch, head, tile = _place(h, task)
    first, start = pair * problem.tile, tile * problem.tile
    out = View(shares.sums, first, stride=h.width)
    operands = replace(h.operands(buffers, batch, head, start, out), best=best)
    chunks = problem.chunks

    def emit(queries: int) -> None:
        work = declare_tile(problem, operands, start, queries)
        work.begin()
        work.clear()
        work.add_chunks(part * chunks // count, (part + 1) * chunks // count)
        with loops(queries) as (i,):
            T.buffer_store(shares.top, work.top[i], [first + i])
            T.buffer_store(shares.total, work.total[i], [first + i])

    emit_ragged(problem, tile, emit)


def _emit_merge(h: Heads, buffers: dict, shares: _Shares, task: Expr, count: int) -> None:
    """Scale the shares of a tile to their common maximum, add them up and divide."""
    problem = h.problem
    batch, head, tile = _place(h, task)
    start = tile * problem.tile
    top, total = _scratch(1), _scratch(1)
    scale = _scratch(count)
    with loops(T.min(i64(problem.tile), h.query_length - start)) as (i,):
        at = lambda part: (task * count + part) * problem.tile + i  # noqa: E731
        T.buffer_store(top, T.float32(-inf), [0])
        with loops(count) as (part,):
            T.buffer_store(top, T.max(top[0], shares.top[at(part)]), [0])
        # -inf - -inf were NaN: where every key is hidden, any finite maximum gives zeros.
        T.buffer_store(top, T.Select(top[0] == T.float32(-inf), T.float32(0), top[0]), [0])
        T.buffer_store(total, T.float32(0), [0])
        with loops(count) as (part,):
            T.buffer_store(scale, vector_math.exp(shares.top[at(part)] - top[0]), [part])
            value = total[0] + scale[part] * shares.total[at(part)]
            T.buffer_store(total, value, [0])
        none = total[0] == T.float32(0)
        share = T.Select(none, T.float32(0), T.float32(1) / total[0])
        for first, n in pieces(h.width, problem.isa.lanes):
            sums = View(shares.sums, stride=h.width)
            out = View(buffers["out"], batch * h.query_length + start, head * h.width)
            out.store(spread(T.float32(0), n), i, first, n)
            with loops(count) as (part,):
                value = out.load(i, first, n)
                value = value + sums.load(at(part), first, n) * spread(scale[part] * share, n)
                out.store(value, i, first, n)
