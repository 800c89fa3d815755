"""Multiply each head with its rows of the output projection at once: partial-head update."""

from __future__ import annotations

from tvm import relax

from tvmstruct import compat, ops
from tvmstruct.layers import Attention, LayerTable, ProjectedAttention, arguments
from tvmstruct.rewrite import Graph
from tvmstruct.schedules import Kernels


class ProjectAttention:
    """Fuse attention and the dense layer that reads it where the target says that it pays."""

    name = "project_attention"

    def __init__(self, table: LayerTable, kernels: Kernels) -> None:
        self.table, self.kernels = table, kernels

    def rewrite(self, graph: Graph, call: relax.Call) -> relax.Expr | None:
        """Return the fused call, or None where attention and projection stay apart."""
        layer = self.table.layer(call)
        if layer is None or not isinstance(layer.op, ops.Dense):
            return None
        if layer.precision != "f32" or layer.activation != "none":
            return None
        heads, *more = arguments(call)
        producer = graph.value(heads)
        attention = self.table.node(producer)
        if not isinstance(attention, Attention) or not graph.single(heads):
            return None
        shape = compat.static_shape(call)
        assert shape is not None
        if not self.kernels.projects_attention(attention, *reversed(shape)):
            return None
        node = ProjectedAttention(attention, layer)
        return self.table.call(node, [*arguments(producer), *more], shape)
