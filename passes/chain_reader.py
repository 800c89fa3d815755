"""Read off a graph what linear chains end in each variable (`tvmstruct.passes.linear`)."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import replace

import numpy as np
from tvm import relax

from tvmstruct import compat, ops
from tvmstruct.passes import linear
from tvmstruct.passes.constant_values import evaluate, names_of, number
from tvmstruct.passes.factors import size_of
from tvmstruct.passes.linear import Linear
from tvmstruct.passes.slices import slice_of
from tvmstruct.passes.views import RESHAPES, rearrange
from tvmstruct.rewrite import Graph

LAYOUT = (
    *RESHAPES,
    "relax.permute_dims",
    "relax.broadcast_to",
    "relax.repeat",
    "relax.tile",
    "relax.take",
    "relax.astype",
)
Chains = dict[relax.Var, Linear]  # by root, the longest first


class ChainReader:
    """Reads the chains that each variable ends, in the order of the graph."""

    def __init__(
        self, graph: Graph, names: Mapping[int, str], stops: Collection[relax.Var] = ()
    ) -> None:
        self.graph, self.names, self.stops = graph, names, stops
        self.chains: dict[relax.Var, Chains] = {}

    def read(self, var: relax.Var, value: relax.Expr) -> Chains:
        """Return the chains that end in ``var``."""
        out = self._read(var, value) if compat.dtype_of(var) == "float32" else {}
        self.chains[var] = out
        return out

    def _read(self, var: relax.Var, value: relax.Expr) -> Chains:
        name = compat.op_name(value)
        if (part := slice_of(self.graph, var)) is not None:
            found = self._each(part.source, lambda x: self._slice(x, part))
            if isinstance(value, relax.TupleGetItem) and isinstance(value.tuple_value, relax.Var):
                return {r: _through(x, value.tuple_value) for r, x in found.items()}
            return found
        if name == "relax.strided_slice":
            return self._each(value.args[0], lambda x: _strided(x, value))
        if name in LAYOUT:
            return self._each(value.args[0], lambda x: self._layout(x, value))
        if name in ("relax.add", "relax.subtract"):
            return self._sum(value, -1.0 if name == "relax.subtract" else 1.0)
        if name in ("relax.concat", "relax.stack"):
            return self._joined(value, name == "relax.stack")
        if name == "relax.nn.pad":
            return self._each(value.args[0], lambda x: _padded(x, value))
        if name == "relax.negative":
            return self._each(value.args[0], lambda x: linear.scale(x, np.float32([-1.0]), ()))
        if name in ("relax.multiply", "relax.divide"):
            return self._scaled(value, name == "relax.divide")
        return self._product(value) if name == "relax.matmul" else {}

    def of(self, expr: relax.Expr, *roots: relax.Var) -> Chains:
        """Return the chains to an operand; it is a root itself where chains have to stop."""
        if not isinstance(expr, relax.Var):
            return {}
        found = dict(self.chains.get(expr, {}))
        if expr in self.stops:
            own = linear.start(expr, next(iter(found.values()), None))
            return {} if own is None else {expr: own}
        if (not found or expr in roots) and (own := linear.start(expr)) is not None:
            found[expr] = own
        return found

    def _each(self, source: relax.Expr, step: Callable[[Linear], Linear | str | None]) -> Chains:
        """Extend the chains to an operand; if none can be, begin one there."""
        out: Chains = {}
        for root, x in self.of(source).items():
            if isinstance(made := step(x), Linear):
                out[root] = _through(made, source)
        if not out and isinstance(source, relax.Var) and (own := linear.start(source)) is not None:
            if isinstance(made := step(own), Linear):
                out[source] = made
        return out

    def _layout(self, x: Linear, call: relax.Call) -> Linear | None:
        axes = rearrange(self.graph, call, list(x.axes))
        return None if axes is None else replace(x, axes=axes)

    def _slice(self, x: Linear, part) -> Linear | str:
        out = linear.cut(x, part.axis, part.begin, 1, part.size)
        if part.drop and isinstance(out, Linear):
            axes = [*out.axes[: part.axis], *out.axes[part.axis + 1 :]]
            return replace(out, axes=axes)
        return out

    def _sum(self, call: relax.Call, sign: float) -> Chains:
        a, b = call.args
        shapes = [compat.static_shape(e) for e in (a, b, call)]
        if None in shapes or not (isinstance(a, relax.Var) and isinstance(b, relax.Var)):
            return {}
        left, right = self.of(a), self.of(b)
        left, right = self.of(a, *right), self.of(b, *left)
        out: Chains = {}
        for root in [r for r in left if r in right]:
            x, y = left[root], right[root]
            if not x.factors or not y.factors:
                continue  # a residual: the layer's epilogue adds it
            rank = max(len(x.axes), len(y.axes))
            x, y = (replace(t, axes=[()] * (rank - len(t.axes)) + t.axes) for t in (x, y))
            if sign < 0:
                y = y.then(ops.scaling(y.width, -1.0), axes=y.axes)
            x, y = _through(x, a), _through(y, b)
            if isinstance(made := linear.total([x, y]), Linear):
                out[root] = made
        return out

    def _joined(self, call: relax.Call, stacked: bool) -> Chains:
        fields = list(getattr(self.graph.value(call.args[0]), "fields", ()))
        rank = len(compat.static_shape(call) or ())
        if not fields or not rank:
            return {}
        axis = (0 if call.attrs.axis is None else int(call.attrs.axis)) % rank
        given = [f for f in fields if number(self.graph, f) != 0.0]
        if not given or not all(isinstance(f, relax.Var) for f in given):
            return {}
        every = [self.of(f) for f in given]
        every = [self.of(f, *(r for c in every for r in c)) for f in given]
        out: Chains = {}
        for root in [r for r in every[0] if all(r in c for c in every)]:
            terms: list[Linear | int] = []
            left = [_through(c[root], f) for c, f in zip(every, given, strict=True)]
            for f in fields:
                x = left.pop(0) if f in given else None
                if x is not None and stacked:
                    x = replace(x, axes=[*x.axes[:axis], (), *x.axes[axis:]])
                size = 1 if stacked else (compat.static_shape(f) or ())[axis]
                terms.append(size if x is None else x)
            if isinstance(made := linear.side_by_side(terms, axis), Linear):
                bound = isinstance(call.args[0], relax.Var)
                out[root] = _through(made, call.args[0]) if bound else made
        return out

    def _scaled(self, call: relax.Call, divided: bool) -> Chains:
        pairs = (tuple(call.args), tuple(reversed(call.args)))
        for x, c in pairs[: 1 if divided else 2]:
            by = evaluate(self.graph, c)
            if by is None or compat.static_shape(x) != compat.static_shape(call) or not by.size:
                continue
            by, names = (1 / by if divided else by), self._names(c)
            return self._each(x, lambda s, by=by, names=names: linear.scale(s, by, names))
        return {}

    def _product(self, call: relax.Call) -> Chains:
        x, w = call.args
        if (right := evaluate(self.graph, w)) is not None and right.ndim > 1:
            names = self._names(w)
            return self._each(x, lambda s: linear.multiply(s, right, names))
        left = evaluate(self.graph, x)
        if left is None or left.ndim < 2 or len(compat.static_shape(w) or ()) < 2:
            return {}
        turned, names = left.swapaxes(-1, -2), self._names(x)

        def step(s: Linear) -> Linear | str:
            made = linear.multiply(_turn(s), turned, names)
            return _turn(made) if isinstance(made, Linear) else made

        return self._each(w, step)

    def _names(self, expr: relax.Expr) -> list[str]:
        return names_of(self.graph, expr, self.names)


def _through(x: Linear, source: relax.Expr) -> Linear:
    """Count an operand among what is computed on the way."""
    if x.root is source or source.same_as(x.root):
        return x
    return replace(x, inside=x.inside | {source})


def _turn(x: Linear) -> Linear:
    return replace(x, axes=[*x.axes[:-2], x.axes[-1], x.axes[-2]])


def _strided(x: Linear, call: relax.Call) -> Linear | str:
    """Return a slice of one or more axes, with steps."""
    out, lists = compat.static_shape(call), []
    for arg in call.args[1:]:
        lists.append([getattr(n, "value", None) for n in getattr(arg, "fields", ())])
    if not out or len(lists) < 3 or any(n is None for part in lists for n in part):
        return "slices by numbers that are not constant"
    axes, begins, _ = lists[:3]
    steps = lists[3] if len(lists) > 3 and lists[3] else [1] * len(axes)
    made: Linear | str = x
    for axis, begin, step in zip(axes, begins, steps, strict=True):
        assert isinstance(made, Linear)
        at = int(axis) % len(out)
        begin = int(begin) + (size_of(made.axes[at]) if begin < 0 else 0)
        if step < 1:
            return f"slices with a step of {step}"
        made = linear.cut(made, at, begin, int(step), out[at])
        if isinstance(made, str):
            return made
    return made


def _padded(x: Linear, call: relax.Call) -> Linear | str:
    """Return a tensor with zeros before and after."""
    widths = [int(n) for n in call.attrs.pad_width]
    if call.attrs.pad_mode != "constant" or float(call.attrs.pad_value) or min(widths) < 0:
        return "pads with something else than zeros"
    made: Linear | str = x
    for axis in range(len(widths) // 2):
        before, after = widths[2 * axis : 2 * axis + 2]
        if (before or after) and isinstance(made, Linear):
            terms = [t for t in (before, made, after) if t != 0]
            made = linear.side_by_side(terms, axis)
    return made
