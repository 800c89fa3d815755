"""A tile of queries with the queries on the vector axis: what attention of many queries takes.

Scores live transposed, ``scores[key, query]``: maximum, exp and sum are then vertical, k and v
are read in place by broadcast and by vector, and only the small query tile is transposed, in
registers.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import inf

from tvm import tirx
from tvm.ir import Expr
from tvm.script.ir_builder import tirx as T

from tvmstruct.schedules import vector_math
from tvmstruct.schedules.builder import i64
from tvmstruct.schedules.x86 import skipping
from tvmstruct.schedules.x86.attention_tile import (
    Index,
    Operands,
    Problem,
    Tile,
    View,
    fewest_lanes,
    near_divisor,
    pieces,
    ramp,
    reduce_lanes,
    registers,
    scratch,
    splat,
    spread,
)
from tvmstruct.schedules.x86.skipping import Keys
from tvmstruct.schedules.x86.transpose import Load, transpose_square
from tvmstruct.targets import Isa


@dataclass(frozen=True)
class WideTile(Tile):
    """One tile of queries: where it is, and its scratch memory.

    ``start`` is its first query and ``queries`` how many are real; further lanes repeat the
    last. ``top`` and ``total`` are the running maximum and sum of each query.
    """

    problem: Problem
    at: Operands
    start: Index
    queries: int
    lanes: int
    vectors: int
    query: tirx.Buffer  # (head_dim, queries): the transposed tile
    scores: View  # (chunk, queries)
    mask: tirx.Buffer | None  # (chunk, queries), only for masks that differ by query
    top: tirx.Buffer
    total: tirx.Buffer
    shrink: tirx.Buffer  # factor for what an older maximum scaled
    keys: Keys  # that a query of the tile weighs, only with zero skipping
    chosen: Keys  # that a query of a register tile weighs
    counts: View | None = None  # (1, chunk): how many queries weigh a key, where that is asked for

    @classmethod
    def declare(
        cls,
        problem: Problem,
        at: Operands,
        start: Index,
        queries: int,
        scores: View | None = None,
        counts: View | None = None,
    ) -> WideTile:
        """Allocate the scratch memory of a tile, but for what outlives it."""
        lanes = fewest_lanes(queries, problem.isa)
        vectors = -(-queries // lanes)
        width = lanes * vectors
        return cls(
            problem, at, start, queries, lanes, vectors,
            query=scratch(problem.head_dim, width),
            scores=scores or View(scratch(problem.chunk, width)),
            mask=scratch(problem.chunk, width) if problem.by_query else None,
            top=scratch(width), total=scratch(width), shrink=scratch(width),
            keys=Keys(problem.chunk if problem.skip else 1),
            chosen=Keys(problem.chunk if problem.skip else 1),
            counts=counts,
        )  # fmt: skip

    @property
    def width(self) -> int:
        """Queries with the repeated ones."""
        return self.lanes * self.vectors

    def vector(self, index: int) -> Expr:
        """Return the columns of vector ``index`` of the tile."""
        return T.ramp(index * self.lanes, 1, self.lanes)

    def begin(self) -> None:
        """Transpose the queries and start with no key seen."""
        last = self.queries - 1
        _transpose(
            lambda i, c, n: self.at.q.load(min(i, last), c, n),
            self.query, self, self.problem.head_dim // self.lanes, self.problem.head_dim,
        )  # fmt: skip
        for v in range(self.vectors):
            T.buffer_store(self.top, splat(-inf, self.lanes), [self.vector(v)])
            T.buffer_store(self.total, splat(0.0, self.lanes), [self.vector(v)])

    def add_chunk(self, key: Expr, count: Expr) -> None:
        """Emit scores, softmax and weighted sum over ``count`` keys from ``key`` on."""
        self.add_weights(key, count)
        self.add_values(key, count)

    def add_weights(self, key: Expr, count: Expr) -> None:
        """Emit scores and softmax over ``count`` keys from ``key`` on."""
        if self.mask is not None:
            self._transpose_mask(key, count)
        old = registers(self.lanes, self.vectors)
        for v in range(self.vectors):
            T.buffer_store(old[v], self.top[self.vector(v)], [ramp(0, self.lanes)])
        self._emit_scores(key, count)
        self._emit_weights(count, old)

    def _transpose_mask(self, key: Expr, count: Expr) -> None:
        mask, last = self.at.mask, self.queries - 1
        assert mask is not None
        assert self.mask is not None
        _transpose(
            lambda i, c, n: mask.load(min(i, last), key + c, n),
            self.mask, self, count // self.lanes, self.problem.key_length, first=key,
        )  # fmt: skip

    def _emit_scores(self, key: Expr, count: Expr) -> None:
        """Emit ``scores[key, query]`` and the maximum, a register tile of keys at a time."""
        p = self.problem
        size, rest = p.key_tile, p.key_length % p.key_tile
        with T.serial(T.int64(0), count // size) as i:
            self._emit_score_tile(key, i * size, size)
        if rest and p.one_chunk:
            self._emit_score_tile(key, count // size * size, rest)
        elif rest:
            with T.If(key + count == p.key_length), T.Then():
                self._emit_score_tile(key, count // size * size, rest)

    def _emit_score_tile(self, key: Expr, local: Expr, size: int) -> None:
        """Emit the scores of ``size`` keys: one register for each key and query vector."""
        p, lanes, k = self.problem, self.lanes, self.at.k
        sums = [registers(lanes, size) for _ in range(self.vectors)]
        for v in range(self.vectors):
            for i in range(size):
                T.buffer_store(sums[v][i], splat(0.0, lanes), [ramp(0, lanes)])
        with T.serial(T.int64(0), T.int64(p.head_dim)) as d:
            for i in range(size):
                for v in range(self.vectors):
                    weight = T.broadcast(k.load(key + local + i, d), lanes)
                    value = vector_math.fma(
                        weight, self.query[d, self.vector(v)], sums[v][i][ramp(0, lanes)]
                    )
                    T.buffer_store(sums[v][i], value, [ramp(0, lanes)])
        for i in range(size):
            for v in range(self.vectors):
                score = sums[v][i][ramp(0, lanes)] * splat(p.scale, lanes)
                score = self._masked(score, key, local + i, v)
                self.scores.store(score, local + i, v * lanes, lanes)
                stored = self.scores.load(local + i, v * lanes, lanes)
                top = self.top[self.vector(v)]
                # NaN is no maximum: it shows up again in the sum.
                T.buffer_store(self.top, T.Select(stored > top, stored, top), [self.vector(v)])

    def _masked(self, score: Expr, key: Expr, local: Expr, v: int) -> Expr:
        """Return the score with the mask added and, if causal, later keys hidden."""
        p = self.problem
        if self.mask is not None:
            score = score + self.mask[local, self.vector(v)]
        elif self.at.mask is not None:
            score = score + T.broadcast(self.at.mask.load(0, key + local), self.lanes)
        if p.causal:
            query = T.ramp(T.cast(i64(self.start), "int32") + v * self.lanes, 1, self.lanes)
            hidden = T.broadcast(T.cast(key + local, "int32"), self.lanes) > query
            score = T.Select(hidden, splat(-inf, self.lanes), score)
        return score

    def _emit_weights(self, count: Expr, old: list[tirx.Buffer]) -> None:
        """Turn scores into weights ``exp(score - maximum)`` and add them up."""
        lanes, every = self.lanes, range(self.vectors)
        top, total = registers(lanes, self.vectors), registers(lanes, self.vectors)
        whole = [ramp(0, lanes)]
        for v in every:
            T.buffer_store(top[v], self._finite_top(v), whole)
            shrink = vector_math.exp(old[v][whole[0]] - top[v][whole[0]])
            T.buffer_store(self.shrink, shrink, [self.vector(v)])
            rescaled = self.total[self.vector(v)] * self.shrink[self.vector(v)]
            T.buffer_store(total[v], rescaled, whole)
        if self.problem.skip is not None:
            self._emit_skipped_weights(count, top, total)
            return
        with T.serial(T.int64(0), count) as key:
            for v in every:
                shifted = self.scores.load(key, v * lanes, lanes) - top[v][whole[0]]
                self.scores.store(vector_math.exp(shifted), key, v * lanes, lanes)
                weight = self.scores.load(key, v * lanes, lanes)
                T.buffer_store(total[v], total[v][whole[0]] + weight, whole)
        for v in every:
            T.buffer_store(self.total, total[v][whole[0]], [self.vector(v)])

    def _emit_skipped_weights(
        self, count: Expr, top: list[tirx.Buffer], total: list[tirx.Buffer]
    ) -> None:
        """List the keys that some query weighs, and turn their scores into weights."""
        lanes, every, whole = self.lanes, range(self.vectors), [ramp(0, self.lanes)]
        bounds = registers(lanes, self.vectors)
        for v in every:
            bound = skipping.limit(self.problem, top[v][whole[0]], lanes)
            T.buffer_store(bounds[v], bound, whole)
        self.keys.clear()
        with T.serial(T.int64(0), count) as key:
            flags = [
                skipping.above(self.scores.load(key, v * lanes, lanes), bounds[v][whole[0]], lanes)
                for v in every
            ]
            self.keys.add(key, self._wanted(key, flags))
        with T.serial(T.int64(0), self.keys.count) as i:
            key = self.keys.at(i)
            for v in every:
                score = self.scores.load(key, v * lanes, lanes)
                value = skipping.weight(score, top[v][whole[0]], bounds[v][whole[0]], lanes)
                self.scores.store(value, key, v * lanes, lanes)
                added = total[v][whole[0]] + self.scores.load(key, v * lanes, lanes)
                T.buffer_store(total[v], added, whole)
        for v in every:
            T.buffer_store(self.total, total[v][whole[0]], [self.vector(v)])

    def _wanted(self, key: Expr, flags: list[Expr]) -> Expr:
        """Return whether a query weighs the key, one flag for each; count those that do."""
        if self.counts is None:
            return skipping.any_lane(flags[0] if len(flags) == 1 else T.max(*flags), self.lanes)
        rest = self.queries % self.lanes
        if rest:  # further lanes repeat the last query
            real = T.ramp(0, 1, self.lanes) < T.broadcast(T.int32(rest), self.lanes)
            flags[-1] = T.Select(real, flags[-1], splat(0.0, self.lanes))
        number = reduce_lanes(sum(flags[1:], flags[0]), self.lanes, lambda a, b: a + b)
        self.counts.store(T.cast(number, "int32"), 0, key)
        return self.counts.load(0, key) > 0

    def _finite_top(self, v: int) -> Expr:
        """Return the maximum, 0 for a row that is all -inf so far: -inf - -inf were NaN."""
        new = self.top[self.vector(v)]
        return T.Select(new == splat(-inf, self.lanes), splat(0.0, self.lanes), new)

    def add_values(self, key: Expr, count: Expr) -> None:
        """Emit ``sum_key weight[query, key] * v[key]``, a few queries at a time."""
        for size, group in self._sum_groups():
            full, rest = divmod(self.queries, size)
            with T.serial(0, full) as i:
                self._emit_sum_tile(key, count, i * size, size, group)
            if rest:
                self._emit_sum_tile(key, count, T.int64(full * size), rest, group)

    def _sum_groups(self) -> list[tuple[int, list[tuple[int, int]]]]:
        """Return the columns of each register tile of the sums, and its queries."""
        isa = self.problem.isa
        columns = pieces(self.problem.value_dim, isa.lanes)
        groups = -(-len(columns) // _most_columns(isa))
        wide, longer = divmod(len(columns), groups)
        found = []
        for n in range(groups):
            group = columns[n * wide + min(n, longer) : (n + 1) * wide + min(n + 1, longer)]
            size = near_divisor(self.queries, _most_queries(isa, len(group)))
            found.append((size, group))
        return found

    def _emit_sum_tile(
        self, key: Expr, count: Expr, query: Expr, size: int, columns: list[tuple[int, int]]
    ) -> None:
        """Emit ``size`` queries times a few vectors of the value, all in registers."""
        p, v = self.problem, self.at.v
        sums = [registers(n, size) for _, n in columns]
        for i in range(size):
            for (first, n), totals in zip(columns, sums, strict=True):
                start = splat(0.0, n)
                if not p.one_chunk:
                    shrink = spread(self.shrink[query + i], n)
                    start = self.at.out.load(query + i, first, n) * shrink
                T.buffer_store(totals[i], start, [ramp(0, n)])
        if p.skip is not None:
            self._list_keys(query, size)
            count = self.chosen.count
        with T.serial(T.int64(0), count) as step:
            j = step if p.skip is None else self.chosen.at(step)
            for i in range(size):
                for (first, n), totals in zip(columns, sums, strict=True):
                    weight = spread(self.scores.load(j, query + i), n)
                    value = vector_math.fma(
                        weight, v.load(key + j, first, n), totals[i][ramp(0, n)]
                    )
                    T.buffer_store(totals[i], value, [ramp(0, n)])
        for i in range(size):
            for (first, n), totals in zip(columns, sums, strict=True):
                value = totals[i][ramp(0, n)]
                if p.one_chunk:
                    self.finish(query + i, first, value, n)
                else:
                    self.at.out.store(value, query + i, first, n)

    def _list_keys(self, query: Expr, size: int) -> None:
        """List the keys that one of ``size`` queries weighs."""
        self.chosen.clear()
        with T.serial(T.int64(0), self.keys.count) as i:
            key = self.keys.at(i)
            weights = self.scores.load(key, query)
            for other in range(1, size):
                weights = weights + self.scores.load(key, query + other)
            # Weights are not negative, and NaN compares as wanted: neither is left out.
            self.chosen.add(key, T.Not(weights <= T.float32(0)))


def group_size(problem: Problem) -> int:
    """Return the queries of a register tile of the weighted sum."""
    columns = min(len(pieces(problem.value_dim, problem.isa.lanes)), _most_columns(problem.isa))
    return near_divisor(problem.tile, _most_queries(problem.isa, columns))


def _most_columns(isa: Isa) -> int:
    return 4 if isa.registers == 32 else 3


def _most_queries(isa: Isa, columns: int) -> int:
    """Return how many queries fit in registers beside the operands of a product."""
    return min((isa.registers - columns - 1 - (not isa.fma)) // columns, 12)


def _transpose(
    load: Load, to: tirx.Buffer, tile: WideTile, blocks: Index, columns: int, first: Index = 0
) -> None:
    """Write the tile's rows into the columns of ``to``: ``blocks`` blocks of ``lanes`` columns.

    The ragged end goes in smaller blocks; it is left out unless the block range ends there.
    """
    lanes = tile.lanes

    def block(column: Expr, size: int) -> None:
        for row in range(0, tile.width, size):
            transpose_square(load, to, row, column, size)

    def rest() -> None:
        at = columns % lanes
        for offset, size in pieces(at, lanes):
            block(blocks * lanes + offset, size)

    with T.serial(T.int64(0), blocks) as i:
        block(i * lanes, lanes)
    if columns % lanes == 0:
        return
    if isinstance(first, int) or tile.problem.one_chunk:
        rest()
        return
    with T.If(first + tile.problem.chunk >= columns), T.Then():
        rest()
