"""The leaves of a tensor product combined up to the two subtrees of its root, on x86.

The root itself is never made here: a row is the outer product of its subtrees, summed over terms
while it is written. Where the root is normalised, its mean and variance follow from those of the
subtrees: ``E[uv] = E[u] E[v]`` and ``Var[uv] = Var[u] E[v^2] + E[u]^2 Var[v]``, sums of positive
terms, so nothing cancels.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import prod

from tvm import tirx
from tvm.ir import Expr
from tvm.script.ir_builder import tirx as T

from tvmstruct.schedules.builder import i64, loops
from tvmstruct.schedules.compute.embedding import SLACK, Tensors
from tvmstruct.schedules.compute.layer_norm import emit_sum

At = Expr | int
Load = Callable[[At, At, int], Expr]  # (term of the sum, first feature, lanes)


@dataclass(frozen=True)
class Vectors:
    """``width`` features of each term of the sum, wherever they lie."""

    width: int
    load: Load


class Halves:
    """The subtrees of the root for the row at hand; scratch is allocated once for all rows."""

    def __init__(self, lanes: int, term: Tensors, tables: Sequence[tirx.Buffer]) -> None:
        self.lanes, self.term, self.tables = lanes, term, tables
        self.starts = T.alloc_buffer((len(tables),), "int64", scope="global")
        self.stored: dict[tuple[int, int], tirx.Buffer] = {}
        self._allocate(0, term.middle)
        self._allocate(term.middle, len(term.sides))
        self.shift = _scalar() if term.norm is not None else None  # what the root's mean takes off

    def _allocate(self, first: int, last: int, *, root: bool = True) -> None:
        sides = self.term.sides[first:last]
        left_of_norm = root and first == 0 and self.term.norm is not None
        if len(sides) > 1:
            middle = first + len(sides) // 2
            self._allocate(first, middle, root=False)
            self._allocate(middle, last, root=False)
        if len(sides) > 1 or left_of_norm:  # the left subtree is scaled by the root's deviation
            self.stored[first, last] = _flat(self.term.rank * prod(sides) + 2 * SLACK)

    def emit(self, row: Expr) -> tuple[Vectors, Vectors]:
        """Combine the leaves of ``row``, which is inside the table, up to both subtrees."""
        rest = row
        for j in reversed(range(len(self.tables))):
            last = j == 0  # the most significant digit is what is left
            digit = rest if last else T.truncmod(rest, i64(self.term.digits[j]))
            T.buffer_store(self.starts, digit * self.term.steps[j] + SLACK, [j])
            rest = rest if last else T.truncdiv(rest, i64(self.term.digits[j]))
        left = self._subtree(0, self.term.middle)
        right = self._subtree(self.term.middle, len(self.term.sides))
        return (self._normalise_root(left, right) if self.term.norm else left), right

    def _leaf(self, j: int) -> Vectors:
        sides, apart = self.term.sides, bool(self.term.digits)
        own, before = (j, 0) if apart else (0, sum(sides[:j]))
        step = sides[j] if apart else sum(sides)

        def load(r: At, k: At, lanes: int) -> Expr:
            return self.tables[own][ramp(self.starts[own] + r * step + before + k, lanes)]

        return Vectors(sides[j], load)

    def _subtree(self, first: int, last: int) -> Vectors:
        if last - first == 1:
            return self._leaf(first)
        middle = first + (last - first) // 2
        left, right = self._subtree(first, middle), self._subtree(middle, last)
        made = self._stored(first, last)
        store = self.stored[first, last]
        with loops(self.term.rank) as (r,):
            with loops(left.width) as (i,):
                for at, lanes in cover(right.width, self.lanes):
                    value = spread(left.load(r, i, 1), lanes) * right.load(r, at, lanes)
                    place = SLACK + r * made.width + i * right.width + at
                    T.buffer_store(store, value, [ramp(place, lanes)])
            if self.term.norm is not None:
                self._normalise(store, made, r)
        return made

    def _stored(self, first: int, last: int) -> Vectors:
        store, width = self.stored[first, last], prod(self.term.sides[first:last])
        return Vectors(width, lambda r, k, lanes: store[ramp(SLACK + r * width + k, lanes)])

    def _normalise(self, store: tirx.Buffer, node: Vectors, r: Expr) -> None:
        """Bring one term of a node to mean 0 and variance 1."""
        mean, variance = self._moments(node, r)
        factor = T.float32(1) / T.sqrt(variance + T.float32(self.term.norm))
        scale = _scalar()
        T.buffer_store(scale, factor, [0])
        self._over(store, node, r, lambda x, n: (x - spread(mean, n)) * spread(scale[0], n))

    def _normalise_root(self, left: Vectors, right: Vectors) -> Vectors:
        """Divide the left subtree by the root's deviation, and sum up the means in ``shift``."""
        assert self.shift is not None
        store, held = self.stored[0, self.term.middle], self._stored(0, self.term.middle)
        T.buffer_store(self.shift, T.float32(0), [0])
        scale = _scalar()
        with loops(self.term.rank) as (r,):
            mean, variance = self._moments(left, r)
            other, spread_of = self._moments(right, r)
            total = variance * (spread_of + other * other) + mean * mean * spread_of
            factor = T.float32(1) / T.sqrt(total + T.float32(self.term.norm))
            T.buffer_store(scale, factor, [0])
            T.buffer_store(self.shift, self.shift[0] + mean * other * scale[0], [0])
            self._over(store, left, r, lambda x, n: x * spread(scale[0], n))
        return held

    def _moments(self, node: Vectors, r: Expr) -> tuple[Expr, Expr]:
        """Emit mean and variance of one term, each held in a register."""
        count = T.float32(node.width)
        mean, variance = _scalar(), _scalar()
        total = emit_sum(self.lanes, node.width, lambda k, n: node.load(r, k, n), squared=False)
        T.buffer_store(mean, total / count, [0])
        centred = lambda k, n: node.load(r, k, n) - spread(mean[0], n)  # noqa: E731
        squares = emit_sum(self.lanes, node.width, centred, squared=True)
        T.buffer_store(variance, squares / count, [0])
        return mean[0], variance[0]

    def _over(
        self, store: tirx.Buffer, node: Vectors, r: Expr, step: Callable[[Expr, int], Expr]
    ) -> None:
        """Store ``step`` of every feature of one term, in place: vectors must not overlap."""
        first = 0
        for size in (n for n in (16, 8, 4, 1) if n <= self.lanes):
            count = (node.width - first) // size
            if count:
                with loops(count) as (i,):
                    at = first + i * size
                    value = step(node.load(r, at, size), size)
                    T.buffer_store(store, value, [ramp(SLACK + r * node.width + at, size)])
                first += count * size


def cover(width: int, lanes: int) -> list[tuple[int, int]]:
    """Return equal vectors (first, lanes) that cover ``width``; the last may lie over another."""
    while lanes > width:
        lanes //= 2
    firsts = [*range(0, width - lanes + 1, lanes)]
    if firsts[-1] + lanes < width:
        firsts.append(width - lanes)
    return [(first, lanes) for first in firsts]


def ramp(first: At, lanes: int) -> At:
    """Return the index of ``lanes`` consecutive elements."""
    return first if lanes == 1 else T.ramp(first, 1, lanes)


def spread(value: Expr, lanes: int) -> Expr:
    """Return a vector of equal elements."""
    return value if lanes == 1 else T.broadcast(value, lanes)


def _flat(size: int) -> tirx.Buffer:
    return T.alloc_buffer((size,), "float32", scope="global")


def _scalar() -> tirx.Buffer:
    return _flat(1)
