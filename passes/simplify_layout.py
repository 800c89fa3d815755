"""Merge neighbouring reshapes and transposes, and drop those that change nothing."""

from __future__ import annotations

from tvm import relax

from tvmstruct import compat
from tvmstruct.rewrite import Graph

R = relax.op


class SimplifyLayout:
    """``reshape(reshape(x))`` is one reshape; permutations compose; identities vanish."""

    name = "simplify_layout"

    def rewrite(self, graph: Graph, call: relax.Call) -> relax.Expr | None:
        """Return a shorter way to the same value, or None."""
        name = compat.op_name(call)
        if name in ("relax.reshape", "relax.expand_dims", "relax.squeeze"):
            return self._reshape(graph, call)
        return self._permute(graph, call) if name == "relax.permute_dims" else None

    def _reshape(self, graph: Graph, call: relax.Call) -> relax.Expr | None:
        x, out = call.args[0], compat.static_shape(call)
        inner = x
        while (before := graph.call(inner, "relax.reshape")) is not None:
            inner = before.args[0]
        if out is None:
            return None
        if compat.static_shape(inner) == out and isinstance(inner, relax.Var):
            return inner
        return None if inner.same_as(x) else R.reshape(inner, out)

    def _permute(self, graph: Graph, call: relax.Call) -> relax.Expr | None:
        x, axes = call.args[0], _axes(call)
        if (before := graph.call(x, "relax.permute_dims")) is not None:
            first = _axes(before)
            axes, x = [first[a] for a in axes], before.args[0]
        if axes == sorted(axes) and isinstance(x, relax.Var):
            return x
        shape = compat.static_shape(x)
        if shape is not None and _moves_only_ones(shape, axes):
            return R.reshape(x, tuple(shape[a] for a in axes))
        if shape is not None and (joined := _joined(graph, x, axes, shape)) is not None:
            return joined
        return None if x.same_as(call.args[0]) else R.permute_dims(x, axes)


def _joined(
    graph: Graph, x: relax.Expr, axes: list[int], shape: tuple[int, ...]
) -> relax.Expr | None:
    """Return a transpose after one before it, where only axes of one came or went between."""
    middle = graph.call(x, "relax.reshape")
    first = None if middle is None else graph.call(middle.args[0], "relax.permute_dims")
    source = None if first is None else compat.static_shape(first.args[0])
    if first is None or source is None:
        return None
    before, then = _order(_axes(first), source), _order(axes, shape)
    small = tuple(n for n in source if n != 1)
    if tuple(small[a] for a in before) != tuple(n for n in shape if n != 1):
        return None
    both, out = [before[a] for a in then], tuple(shape[a] for a in axes)
    if both == sorted(both):
        return R.reshape(first.args[0], out)
    return R.reshape(R.permute_dims(R.reshape(first.args[0], small), both), out)


def _order(axes: list[int], shape: tuple[int, ...]) -> list[int]:
    """Return the order of the axes that are not one, numbered among themselves."""
    kept = [a for a in axes if shape[a] != 1]
    return [sorted(kept).index(a) for a in kept]


def _axes(call: relax.Call) -> list[int]:
    axes = call.attrs.axes
    rank = len(compat.static_shape(call) or compat.type_of(call).shape.values)
    return [int(a) for a in axes] if axes is not None else list(range(rank))[::-1]


def _moves_only_ones(shape: tuple[int, ...], axes: list[int]) -> bool:
    """Return whether a transpose leaves the order in memory alone."""
    moved = [a for a in axes if shape[a] != 1]
    return moved == sorted(moved)
