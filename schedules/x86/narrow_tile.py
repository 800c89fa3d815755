"""A tile of very few queries, with the keys on the vector axis: memory networks, one token a step.

A product of a query with a key is a sum over the features in a vector; the sums of as many keys
as a vector has lanes fold into one vector of scores. k and v stream through once, which is what
limits attention of few queries: with the queries on the vector axis most lanes would be idle.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
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
    ramp,
    reduce_lanes,
    registers,
    scratch,
    splat,
    spread,
)
from tvmstruct.schedules.x86.intrinsics import fetch
from tvmstruct.schedules.x86.packed_dense import LINE
from tvmstruct.schedules.x86.skipping import Keys, raise_best

Sums = list[tuple[int, tirx.Buffer]]  # a column of the value, and the vector of sums from there


@dataclass(frozen=True)
class NarrowTile(Tile):
    """One tile of few queries: where it is, and its scratch memory."""

    problem: Problem
    at: Operands
    start: Index
    queries: int
    scores: tirx.Buffer  # (queries * chunk), flat
    top: tirx.Buffer
    total: tirx.Buffer
    shrink: tirx.Buffer  # factor for what an older maximum scaled
    chosen: Keys  # that a query weighs, only with zero skipping

    @classmethod
    def declare(cls, problem: Problem, at: Operands, start: Index, queries: int) -> NarrowTile:
        """Allocate the scratch memory of a tile."""
        return cls(
            problem, at, start, queries, scratch(queries * problem.chunk),
            scratch(queries), scratch(queries), scratch(queries),
            Keys(problem.chunk if problem.skip else 1),
        )  # fmt: skip

    @property
    def lanes(self) -> int:
        """Keys in a vector."""
        return self.problem.isa.lanes

    def begin(self) -> None:
        """Start with no key seen."""
        for i in range(self.queries):
            T.buffer_store(self.top, T.float32(-inf), [i])
            T.buffer_store(self.total, T.float32(0), [i])

    def add_chunk(self, key: Expr, count: Expr) -> None:
        """Emit scores, softmax and weighted sum over ``count`` keys from ``key`` on."""
        self._emit_all_scores(key, count)
        groups = (count + self.lanes - 1) // self.lanes
        for i in range(self.queries):
            self._emit_weights(i, groups)
        for i in range(self.queries):
            self._emit_weighted_sum(i, key, count)

    def _emit_all_scores(self, key: Expr, count: Expr) -> None:
        """Emit the scores of ``count`` keys, a vector of keys at a time."""
        with T.serial(T.int64(0), count // self.lanes) as group:
            self._between_scores(group, count // self.lanes)
            self._emit_scores(key, group * self.lanes, None)
        if self.problem.key_length % self.lanes:
            with T.If(count % self.lanes > 0), T.Then():
                self._emit_scores(key, count // self.lanes * self.lanes, count)

    def _between_scores(self, group: Expr, groups: Expr) -> None:
        """Emit what is to happen before vector ``group`` of ``groups`` of keys: nothing here."""

    def _emit_scores(self, key: Expr, local: Expr, count: Expr | None) -> None:
        """Emit the scores of a vector of keys; those from ``count`` on are none."""
        p, lanes, whole = self.problem, self.lanes, [ramp(0, self.lanes)]
        if p.streamed and count is None:
            self._fetch_page(self.at.k, key + local, p.head_dim)
        for i in range(self.queries):
            rows = [key + local + j for j in range(lanes)]
            if count is not None:
                rows = [T.min(row, i64(p.key_length - 1)) for row in rows]
            sums = self._emit_products(i, rows)
            score = _fold([total[whole[0]] for total in sums], lanes) * splat(p.scale, lanes)
            score = self._masked(score, i, key, local)
            if count is not None:
                place = T.ramp(T.cast(local, "int32"), 1, lanes)
                there = place < T.broadcast(T.cast(count, "int32"), lanes)
                score = T.Select(there, score, splat(-inf, lanes))
            T.buffer_store(self.scores, score, [ramp(i * p.chunk + local, lanes)])

    def _emit_products(self, query: int, rows: list[Expr]) -> list[tirx.Buffer]:
        """Return for each key a vector of partial sums, one key after the other as they lie.

        Feature by feature would need fewer loads of the query, but no prefetcher follows it.
        """
        p, lanes, whole = self.problem, self.lanes, [ramp(0, self.lanes)]
        sums = registers(lanes, len(rows))

        def add(row: Expr, total: tirx.Buffer, column: Index) -> None:
            left = self.at.q.load(query, column, lanes)
            right = self.at.k.load(row, column, lanes)
            T.buffer_store(total, vector_math.fma(left, right, total[whole[0]]), whole)

        for row, total in zip(rows, sums, strict=True):
            T.buffer_store(total, splat(0.0, lanes), whole)
            if p.head_dim <= UNROLLED * lanes:
                for column in range(0, p.head_dim, lanes):
                    add(row, total, column)
            else:
                with T.serial(T.int64(0), T.int64(p.head_dim // lanes)) as d:
                    add(row, total, d * lanes)
        return sums

    def _fetch_page(self, view: View, key: Expr, width: int) -> None:
        """Fetch where each page of a later vector of keys begins: prefetchers stop at its end."""
        for element in range(0, self.lanes * width, PAGE):
            for line in range(element, element + LINES * LINE, LINE):
                row, column = divmod(line, width)
                fetch(view.buffer[tuple(view.at(key + self.lanes + row, column))])

    def _masked(self, score: Expr, query: int, key: Expr, local: Expr) -> Expr:
        p, lanes, mask = self.problem, self.lanes, self.at.mask
        if mask is not None:
            row, last = query if p.by_query else 0, p.key_length - lanes
            if p.key_length % lanes == 0:
                added = mask.load(row, key + local, lanes)
            else:  # the last vector would reach over the end: one after the other
                added = _gathered(mask, row, key + local, lanes, last + lanes - 1)
            score = score + added
        if p.causal:
            place = T.ramp(T.cast(key + local, "int32"), 1, lanes)
            hidden = place > T.broadcast(T.cast(i64(self.start) + query, "int32"), lanes)
            score = T.Select(hidden, splat(-inf, lanes), score)
        return score

    def _emit_weights(self, query: int, groups: Expr) -> None:
        """Turn the scores of a query into weights ``exp(score - maximum)`` and add them up."""
        lanes, whole = self.lanes, [ramp(0, self.lanes)]
        at = lambda group: ramp(query * self.problem.chunk + group * lanes, lanes)  # noqa: E731
        (best,), (total,), top = registers(lanes, 1), registers(lanes, 1), scratch(1)
        T.buffer_store(best, splat(-inf, lanes), whole)
        with T.serial(T.int64(0), groups) as group:
            score = self.scores[at(group)]
            # NaN is no maximum: it shows up again in the sum.
            larger = T.Select(score > best[whole[0]], score, best[whole[0]])
            T.buffer_store(best, larger, whole)
        old = self.top[query]
        T.buffer_store(top, T.max(reduce_lanes(best[whole[0]], lanes, T.max), old), [0])
        if self.at.best is not None:
            T.buffer_store(top, raise_best(self.at.best, query, top[0]), [0])
        # A row that is all -inf so far: -inf - 0 is -inf, where -inf - -inf were NaN.
        finite = T.Select(top[0] == T.float32(-inf), T.float32(0), top[0])
        T.buffer_store(self.shrink, vector_math.exp(old - finite), [query])
        T.buffer_store(self.top, top[0], [query])
        T.buffer_store(top, finite, [0])
        T.buffer_store(total, splat(0.0, lanes), whole)
        bound = scratch(1)
        if self.problem.skip is not None:
            T.buffer_store(bound, skipping.limit(self.problem, top[0], 1), [0])
        with T.serial(T.int64(0), groups) as group:
            score, spread_top = self.scores[at(group)], spread(top[0], lanes)
            if self.problem.skip is None:
                weight = vector_math.exp(score - spread_top)
            else:
                weight = skipping.weight(score, spread_top, spread(bound[0], lanes), lanes)
            T.buffer_store(self.scores, weight, [at(group)])
            T.buffer_store(total, total[whole[0]] + self.scores[at(group)], whole)
        added = reduce_lanes(total[whole[0]], lanes, lambda a, b: a + b)
        rescaled = self.total[query] * self.shrink[query] + added
        T.buffer_store(self.total, rescaled, [query])

    def _emit_weighted_sum(self, query: int, key: Expr, count: Expr) -> None:
        """Emit ``sum_key weight[key] * v[key]``."""
        if self.problem.skip is not None:
            self._list_keys(query, key, count)
        for sums in self._sums(query):
            self._for_keys(key, count, partial(self._add_key, query, key, sums))

    def _sums(self, query: int) -> Iterator[Sums]:
        """Yield a few vectors of the value at a time, scaled from what was, and store them."""
        p, lanes = self.problem, self.lanes
        columns, whole = list(range(0, p.value_dim, lanes)), [ramp(0, lanes)]
        for first in range(0, len(columns), WIDE):
            group = columns[first : first + WIDE]
            sums = list(zip(group, registers(lanes, len(group)), strict=True))
            for column, total in sums:
                start = splat(0.0, lanes)
                if not p.one_chunk:
                    older = spread(self.shrink[query], lanes)
                    start = self.at.out.load(query, column, lanes) * older
                T.buffer_store(total, start, whole)
            yield sums
            for column, total in sums:
                if p.one_chunk:
                    self.finish(query, column, total[whole[0]], lanes)
                else:
                    self.at.out.store(total[whole[0]], query, column, lanes)

    def _add_key(self, query: int, key: Expr, sums: Sums, j: Expr) -> None:
        self._add_row(sums, self.scores[query * self.problem.chunk + j], key + j)

    def _add_row(self, sums: Sums, weight: Expr, row: Expr) -> None:
        """Add some columns of a row of v times its weight."""
        whole = [ramp(0, self.lanes)]
        for column, total in sums:
            value = self.at.v.load(row, column, self.lanes)
            product = vector_math.fma(spread(weight, self.lanes), value, total[whole[0]])
            T.buffer_store(total, product, whole)

    def _for_keys(self, key: Expr, count: Expr, add: Callable[[Expr], None]) -> None:
        """Emit ``add(j)`` for the keys of a chunk that are weighed."""
        if self.problem.skip is not None:
            with T.serial(T.int64(0), self.chosen.count) as step:
                add(self.chosen.at(step))
            return
        done = T.int64(0)
        if self.problem.streamed:
            done = count // self.lanes * self.lanes
            with T.serial(T.int64(0), count // self.lanes) as group:
                self._fetch_page(self.at.v, key + group * self.lanes, self.problem.value_dim)
                with T.serial(T.int64(0), T.int64(self.lanes)) as j:
                    add(group * self.lanes + j)
        with T.serial(done, count) as j:
            add(j)

    def _list_keys(self, query: int, key: Expr, count: Expr) -> None:
        """List the keys that the query weighs."""
        self.chosen.clear()
        with T.serial(T.int64(0), count) as j:
            weight = self.scores[query * self.problem.chunk + j]
            self.chosen.add(j, T.Not(weight <= T.float32(0)))  # NaN is not left out


PAGE = 1024  # floats
LINES = 4  # of a page that are fetched: by then the prefetchers know where it goes
UNROLLED = 16  # vectors of a key at most
WIDE = 8  # vectors of a value at a time: enough sums under way to hide the latency of an FMA


def _fold(sums: list, lanes: int) -> Expr:
    """Return the sums over each of ``lanes`` vectors as one vector, in their order."""
    size = lanes
    while len(sums) > 1:
        half, count = size // 2, lanes // size
        low = [s * size + i for s in range(count) for i in range(half)]
        high = [i + half for i in low]
        pairs = zip(sums[: len(sums) // 2], sums[len(sums) // 2 :], strict=True)
        folded = []
        for a, b in pairs:
            both = [_pick(a, b, part, half, lanes) for part in (low, high)]
            (total,) = registers(lanes, 1)
            T.buffer_store(total, both[0] + both[1], [ramp(0, lanes)])
            folded.append(total[ramp(0, lanes)])
        sums, size = folded, half
    return sums[0]


def _pick(a: Expr, b: Expr, part: list[int], half: int, lanes: int) -> Expr:
    """Return the segments ``part`` of a and b, of ``half`` lanes each, in turns."""
    picks = []
    for s in range(0, len(part), half):
        picks += part[s : s + half] + [lanes + i for i in part[s : s + half]]
    return tirx.Shuffle([a, b], picks)


def _gathered(mask, row: int, key: Expr, lanes: int, last: int) -> Expr:
    """Return a vector of the mask whose lanes past the last key repeat it."""
    (held,) = registers(lanes, 1)
    for i in range(lanes):
        T.buffer_store(held, mask.load(row, T.min(key + i, i64(last))), [i])
    return held[ramp(0, lanes)]
