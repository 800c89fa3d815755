"""Fold what follows a layer into it: bias, activation, residual; tables have no activation.

Looks through reshapes, since layers live on rows while the graph around them has batch and
length. Only a value that nothing else reads is folded.
"""

from __future__ import annotations

import math
from collections.abc import Collection
from dataclasses import replace

import numpy as np
from tvm import relax

from tvmstruct import compat
from tvmstruct.layers import HashTables, Layer, LayerTable, arguments
from tvmstruct.passes.activations import Activation, find_activation
from tvmstruct.rewrite import Graph

R = relax.op


class FuseEpilogue:
    """Fold add, activation and residual into the layer before them.

    ``activations`` are those that its kernel has, None for all; ``residual`` says whether it can
    add rows that are no constant.
    """

    name = "fuse_epilogue"

    def __init__(
        self,
        table: LayerTable,
        activations: Collection[str] | None = None,
        *,
        residual: bool = True,
    ) -> None:
        self.table, self.activations, self.residual = table, activations, residual

    def rewrite(self, graph: Graph, call: relax.Call) -> relax.Expr | None:
        """Return the layer with one more step in its epilogue, or None."""
        if (found := find_activation(graph, call)) is not None:
            return self._activation(graph, call, found)
        if compat.op_name(call) == "relax.add":
            for a, b in (call.args, reversed(call.args)):
                if (out := self._add(graph, call, a, b)) is not None:
                    return out
        return None

    def _activation(self, graph: Graph, call, found: Activation) -> relax.Expr | None:
        if self.activations is not None and found.name not in self.activations:
            return None
        layer, old = producer(graph, self.table, found.x, uses=found.uses)
        if not isinstance(layer, Layer) or layer.activation != "none" or layer.residual:
            return None
        return self._replace(replace(layer, activation=found.name), old, [], call)

    def _add(self, graph: Graph, call, y, other) -> relax.Expr | None:
        layer, old = producer(graph, self.table, y)
        if layer is None or layer.residual:
            return None
        value = graph.value(other)
        if compat.is_constant(value):
            return self._bias(layer, old, compat.constant_array(value), call)
        shape = compat.static_shape(call)
        if not self.residual:
            return None
        shapes = {shape, compat.static_shape(y), compat.static_shape(other)}
        if len(shapes) > 1 or compat.dtype_of(other) != "float32":
            return None  # one of the two is broadcast to the other
        rows = R.reshape(other, compat.static_shape(old))
        return self._replace(replace(layer, residual=True), old, [rows], call)

    def _bias(self, layer: Layer | HashTables, old, bias: np.ndarray, call) -> relax.Expr | None:
        shape = compat.static_shape(call)
        if layer.epilogue.activation != "none" or shape is None or shape[-1] != layer.n_out:
            return None
        if bias.ndim > len(shape) or (bias.ndim and bias.size != bias.shape[-1]):
            return None
        if bias.size not in (1, layer.n_out) or bias.dtype != np.float32:
            return None
        bias = np.broadcast_to(bias.reshape(-1), (layer.n_out,))
        total = bias if layer.bias is None else layer.bias + bias
        return self._replace(replace(layer, bias=total), old, [], call)

    def _replace(self, layer: Layer | HashTables, old, extra: list, call) -> relax.Expr:
        rows = compat.static_shape(old)
        assert rows is not None
        y = self.table.call(layer, [*arguments(old), *extra], rows)
        shape = compat.static_shape(call)
        assert shape is not None
        assert math.prod(shape) == math.prod(rows)
        return R.reshape(y, shape)


def producer(
    graph: Graph, table: LayerTable, expr, *, uses: int = 1
) -> tuple[Layer | HashTables | None, relax.Expr | None]:
    """Return the node whose rows ``expr`` reshapes and its call, if nothing else reads them."""
    first = True
    while isinstance(expr, relax.Var):
        if graph.uses[expr] != (uses if first else 1):
            return None, None
        first = False
        value = graph.bound.get(expr)
        node = table.node(value)
        if isinstance(node, Layer | HashTables):
            width = (compat.static_shape(value) or (0,))[-1]
            return (node, value) if width == node.n_out else (None, None)
        if compat.op_name(value) != "relax.reshape" or not _keeps_last_axis(value):
            return None, None
        expr = value.args[0]
    return None, None


def _keeps_last_axis(reshape: relax.Call) -> bool:
    before, after = compat.static_shape(reshape.args[0]), compat.static_shape(reshape)
    return bool(before and after) and before[-1] == after[-1]
