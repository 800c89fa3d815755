"""Compute a feed-forward block in chunks of hidden features: both matrices in one kernel."""

from __future__ import annotations

from dataclasses import dataclass
from math import prod

from tvm import relax

from tvmstruct import compat, ops
from tvmstruct.layers import FeedForward, Layer, LayerTable, arguments
from tvmstruct.rewrite import Graph, Reject
from tvmstruct.schedules import Kernels

STEPS = 6  # operators that an unknown activation is spelled with, at most


@dataclass(frozen=True)
class _Hidden:
    """Where the hidden features come from, and what stands between if it is no known activation."""

    layer: Layer
    call: relax.Call
    between: str = ""


class SplitFeedForward:
    """Fuse two dense layers in a row where the target says that it pays."""

    name = "split_feed_forward"

    def __init__(self, table: LayerTable, kernels: Kernels) -> None:
        self.table, self.kernels = table, kernels

    def rewrite(self, graph: Graph, call: relax.Call) -> relax.Expr | Reject | None:
        """Return the fused call, or why two layers for which it pays stay apart."""
        down = self.table.layer(call)
        if down is None:
            return None
        hidden, *more = arguments(call)
        found = self._up(graph, hidden)
        if found is None:
            return None
        up, shape = found.layer, compat.static_shape(call)
        assert shape is not None
        sizes = (up.op.n_in, up.op.n_out, down.op.n_out)
        if up.op.n_out != down.op.n_in or not self.kernels.splits_feed_forward(sizes, shape[0]):
            return None
        if why := _refusal(graph, found, down, hidden):
            activated = up.activation != "none" or found.between
            return Reject(f"feed_forward.{up.names[0]}", why) if activated else None
        return self.table.call(FeedForward(up, down), [arguments(found.call)[0], *more], shape)

    def _up(self, graph: Graph, hidden: relax.Expr) -> _Hidden | None:
        """Follow operators that keep every element back to a layer."""
        size, between, front = _elements(hidden), "", [hidden]
        for _ in range(STEPS):
            values = [graph.value(e) for e in front]
            for value in values:
                if (layer := self.table.layer(value)) is not None:
                    return _Hidden(layer, value, between)
            calls = [v for v in values if isinstance(v, relax.Call) and self.table.node(v) is None]
            names = [compat.op_name(c) for c in calls]
            between = between or next((n for n in names if n != "relax.reshape"), "")
            front = [
                a
                for c in calls
                for a in c.args
                if isinstance(a, relax.Var) and _elements(a) == size
            ]
        return None


def _elements(expr: relax.Expr) -> tuple[int, int] | None:
    """Return number of elements and of features, which elementwise operators keep."""
    shape = compat.static_shape(expr)
    return (prod(shape), shape[-1]) if shape else None


def _refusal(graph: Graph, found: _Hidden, down: Layer, hidden: relax.Expr) -> str:
    """Return why two layers cannot be one kernel, or an empty string."""
    up = found.layer
    for layer in (up, down):
        if not isinstance(layer.op, ops.Dense) or layer.precision != "f32":
            kind = type(layer.op).__name__
            return f"{layer.names[0]} is {kind} {layer.precision}, want Dense f32"
    if found.between:
        return f"{found.between} stands between {up.names[0]} and {down.names[0]}"
    if up.epilogue.joins_rows:
        return f"a residual or a normalisation follows {up.names[0]}"
    if down.activation != "none":
        return f"{down.activation} follows {down.names[0]}, want no activation"
    if not graph.single(hidden):
        return "the hidden features are read elsewhere too"
    return ""
