"""A tile of few queries that reads values here and there: zero skipping in a stream of keys.

Most values of a large memory are skipped, and those that are left lie in no order that a
prefetcher follows. So a chunk of keys only lists them, with their weights; the lines are fetched
between the scores of the next chunk, and by the end of that they are there.
"""

from __future__ import annotations

from dataclasses import dataclass

from tvm import tirx
from tvm.ir import Expr
from tvm.script.ir_builder import tirx as T

from tvmstruct.schedules.x86.attention_tile import Index, Operands, Problem, scratch
from tvmstruct.schedules.x86.intrinsics import fetch
from tvmstruct.schedules.x86.narrow_tile import NarrowTile
from tvmstruct.schedules.x86.packed_dense import LINE
from tvmstruct.schedules.x86.skipping import Keys


@dataclass(frozen=True)
class SkippingStream(NarrowTile):
    """One tile of few queries whose values lag a chunk behind; ``lists`` has one for each."""

    lists: tuple[Keys, ...] = ()
    weights: tuple[tirx.Buffer, ...] = ()  # of the listed keys

    @classmethod
    def declare(cls, problem: Problem, at: Operands, start: Index, queries: int) -> SkippingStream:
        """Allocate the scratch memory of a tile."""
        return cls(
            problem, at, start, queries, scratch(queries * problem.chunk),
            scratch(queries), scratch(queries), scratch(queries), Keys(1),
            tuple(Keys(problem.chunk) for _ in range(queries)),
            tuple(scratch(problem.chunk) for _ in range(queries)),
        )  # fmt: skip

    def begin(self) -> None:
        """Start with no key seen and none listed."""
        super().begin()
        for i in range(self.queries):
            T.buffer_store(self.shrink, T.float32(1), [i])
            self.lists[i].clear()

    def add_chunks(self, first: Expr, stop: Expr) -> None:
        """Add the chunks ``[first, stop)`` of keys."""
        super().add_chunks(first, stop)
        for i in range(self.queries):
            self._emit_listed_sum(i)

    def add_chunk(self, key: Expr, count: Expr) -> None:
        """Emit scores of this chunk, weighted sums of the one before, and lists for the next."""
        groups = (count + self.lanes - 1) // self.lanes
        self._emit_all_scores(key, count)
        for i in range(self.queries):
            self._emit_listed_sum(i)
            self._emit_weights(i, groups)
            self._list_weights(i, key, count)

    def _between_scores(self, group: Expr, groups: Expr) -> None:
        """Fetch an even share of the listed values."""
        v, width = self.at.v, self.problem.value_dim
        for listed in self.lists:
            share = [listed.count * turn // groups for turn in (group, group + 1)]
            with T.serial(*share) as i:
                for column in range(0, width, LINE):
                    fetch(v.buffer[tuple(v.at(listed.at(i), column))])

    def _emit_listed_sum(self, query: int) -> None:
        """Emit the weighted sum of the listed values."""
        listed, weights = self.lists[query], self.weights[query]
        for sums in self._sums(query):
            with T.serial(T.int64(0), listed.count) as i:
                self._add_row(sums, weights[i], listed.at(i))

    def _list_weights(self, query: int, key: Expr, count: Expr) -> None:
        """List the keys that the query weighs, and how much."""
        listed = self.lists[query]
        listed.clear()
        with T.serial(T.int64(0), count) as j:
            weight = self.scores[query * self.problem.chunk + j]
            T.buffer_store(self.weights[query], weight, [listed.count])
            listed.add(key + j, T.Not(weight <= T.float32(0)))  # NaN is not left out
