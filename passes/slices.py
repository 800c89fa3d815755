"""See through slices: one layer often computes queries, keys and values side by side."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod

from tvm import relax

from tvmstruct import compat
from tvmstruct.passes.factors import Axis, Factor, merge, size_of
from tvmstruct.rewrite import Graph


@dataclass(frozen=True)
class Slice:
    """``size`` positions of one axis of ``source`` from ``begin`` on; ``drop`` takes it away."""

    source: relax.Expr
    axis: int
    begin: int
    size: int
    drop: bool = False

    def cut(self, axis: Axis, name: str) -> tuple[Axis, int] | None:
        """Return the loops that are left and where they begin, or None for parts of a loop."""
        first, *rest = merge(axis) or [Factor(1)]
        inner = size_of(rest)
        if self.begin % inner or self.size % inner:
            return None
        count = self.size // inner
        left = ((Factor(count, first.strides),) if count > 1 else ()) + tuple(rest)
        return left, self.begin // inner * first.stride(name)


def slice_of(graph: Graph, expr: relax.Expr) -> Slice | None:
    """Return the slice of one axis that an expression is, or None."""
    value = graph.value(expr)
    if isinstance(value, relax.TupleGetItem):
        return _part(graph, value, expr)
    name = compat.op_name(value)
    if name == "relax.strided_slice":
        return _strided(value)
    if name == "relax.take" and value.attrs.axis is not None:
        at, shape = graph.constant(value.args[1]), compat.static_shape(value.args[0])
        if at is not None and at >= 0 and shape and not compat.static_shape(value.args[1]):
            return Slice(value.args[0], int(value.attrs.axis) % len(shape), int(at), 1, drop=True)
    return None


def _part(graph: Graph, item: relax.TupleGetItem, expr: relax.Expr) -> Slice | None:
    split = graph.call(item.tuple_value, "relax.split")
    shape = compat.static_shape(expr)
    if split is None or not shape:
        return None
    axis, cuts = int(split.attrs.axis) % len(shape), split.attrs.indices_or_sections
    even = hasattr(cuts, "value")
    begin = item.index * shape[axis] if even else [0, *map(int, cuts)][item.index]
    return Slice(split.args[0], axis, begin, shape[axis])


def _strided(call: relax.Call) -> Slice | None:
    out, shape = compat.static_shape(call), compat.static_shape(call.args[0])
    lists = [[getattr(n, "value", None) for n in getattr(a, "fields", ())] for a in call.args[1:]]
    if not out or not shape or len(lists) < 3 or [len(x) for x in lists[:2]] != [1, 1]:
        return None
    (axis,), (begin,), *_ = lists
    if axis is None or begin is None or lists[3:] not in ([], [[1]]):
        return None
    axis = int(axis) % len(shape)
    return Slice(call.args[0], axis, int(begin) % max(shape[axis], 1), out[axis])


def in_place(
    root: relax.Expr, name: str, offset: int, rows: Sequence[Factor], columns: Sequence[Factor]
) -> int | None:
    """Return the width of the rows of ``root`` of which tensor ``name`` is a slice, or None."""
    count, total = size_of(rows), prod(compat.static_shape(root) or ())
    if total % count:
        return None
    width = total // count
    for loops, stride in ((columns, 1), (rows, width)):
        for f in reversed(loops):
            if f.stride(name) != stride:
                return None
            stride *= f.size
    return width if offset + size_of(columns) <= width else None
