"""Zero and V-Gen skipping in `minimal_attention`: values that hardly a query weighs are not made.

NLP-Fast, section III-C, 1. For every chunk of keys come first the weights of all queries, which
count for each key the queries that it is zero for; then the rows of v that are wanted, gathered
from x; then the weighted sum over those. A key without a value stays in the sum of weights: as in
the paper its probability is computed, and times a value of zero.
"""

from __future__ import annotations

from dataclasses import replace

from tvm.ir import Expr
from tvm.script.ir_builder import tirx as T

from tvmstruct.schedules.builder import loops
from tvmstruct.schedules.x86.attention_tile import Operands, View, scratch
from tvmstruct.schedules.x86.minimal_element import Element
from tvmstruct.schedules.x86.skipping import Keys
from tvmstruct.schedules.x86.wide_tile import WideTile


class SkippingElement(Element):
    """Code for one element of the batch that makes a chunk of values once it has its weights."""

    def __post_init__(self) -> None:
        super().__post_init__()
        p = self.problem
        self.kept["shrink"] = scratch(self.tiles * p.tile)
        self.weights = scratch(self.tiles, p.chunk, p.tile)
        self.counts = T.alloc_buffer((self.tiles, p.chunk), "int32", scope="global")
        self.needed = T.alloc_buffer((p.chunk,), "int32", scope="global")
        self.rows = Keys(p.chunk)

    def _add_keys(self, head: Expr, first: Expr, count: Expr) -> None:
        self._generate("k", head, first, count)
        self._weigh(head, first, count)
        self._choose(first, count)
        self._generate("v", head, first, self.rows.count, self.rows)
        self._sum(head, first, count)

    def _weigh(self, head: Expr, first: Expr, count: Expr) -> None:
        """Compute the weights of a chunk of keys, and count the queries of a tile that have one."""

        def emit(t: Expr, at: Operands, start: Expr, queries: int) -> None:
            with T.If(self._seen(first, start, queries)):
                with T.Then():
                    tile = self._tile(t, at, start, queries)
                    tile.begin()
                    self._exchange(tile, start, "top", "total", load=True)
                    tile.add_weights(first, count)
                    self._exchange(tile, start, "top", "total", "shrink", load=False)
                with T.Else(), loops(count) as (key,):
                    T.buffer_store(self.counts, T.int32(0), [t, key])

        self._each_tile(head, first, emit)

    def _choose(self, first: Expr, count: Expr) -> None:
        """List the keys whose values are made."""
        h, needed = self.sizes.h, self.needed
        with loops(count) as (key,):
            T.buffer_store(needed, T.int32(0), [key])
        with loops(self.tiles, count) as (t, key):
            T.buffer_store(needed, needed[key] + self.counts[t, key], [key])
        self.rows.clear()
        with loops(count) as (key,):
            see = T.int64(h.query_length)
            if h.causal:
                see = T.max(see - first - key, T.int64(0))
            zeros = see - T.cast(needed[key], "int64")
            most = T.float64(self.sizes.zero_ratio) * T.cast(see, "float64")
            few = T.cast(zeros, "float64") <= most
            self.rows.add(key, T.And(needed[key] > 0, few))

    def _sum(self, head: Expr, first: Expr, count: Expr) -> None:
        """Add the values that were made, weighted, to every tile of queries."""

        def emit(t: Expr, at: Operands, start: Expr, queries: int) -> None:
            tile = self._tile(t, replace(at, v=self.made["v"]), start, queries)
            self._exchange(tile, start, "total", "shrink", load=True)
            with T.If(self._seen(first, start, queries)), T.Then():
                tile.keys.clear()
                with loops(self.rows.count) as (i,):
                    key = self.rows.at(i)
                    tile.keys.add(key, self.counts[t, key] > 0)
                tile.add_values(T.int64(0), count)
            self._divide(tile, first + count)

        self._each_tile(head, first, emit)

    def _tile(self, t: Expr, at: Operands, start: Expr, queries: int) -> WideTile:
        weights = View(self.weights, lead=(t,))
        counts = View(self.counts, t)
        return WideTile.declare(self.problem, at, start, queries, weights, counts)

    def _seen(self, first: Expr, start: Expr, queries: int) -> Expr:
        """Return whether the last query of a tile sees the key ``first``."""
        return first < start + queries if self.sizes.h.causal else T.bool(True)
