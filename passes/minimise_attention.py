"""Make queries, keys and values inside the attention kernel, head by head: least memory."""

from __future__ import annotations

from tvm import relax

from tvmstruct import compat, ops
from tvmstruct.layers import Attention, Layer, LayerTable, MinimalAttention, arguments
from tvmstruct.rewrite import Graph, Reject
from tvmstruct.schedules import Kernels


class MinimiseAttention:
    """Fuse attention with its output projection and with the layers that q, k and v come from."""

    name = "minimise_attention"

    def __init__(self, table: LayerTable, kernels: Kernels) -> None:
        self.table, self.kernels = table, kernels

    def rewrite(self, graph: Graph, call: relax.Call) -> relax.Expr | Reject | None:
        """Return the fused call, or why queries, keys or values stay in memory."""
        projection = self.table.layer(call)
        if projection is None:
            return None
        heads, *more = arguments(call)
        producer = graph.value(heads)
        attention = self.table.node(producer)
        if not isinstance(attention, Attention):
            return None
        inputs = arguments(producer)
        calls = [graph.value(a) for a in inputs[:3]]
        sources = [self.table.layer(c) for c in calls]
        shape = compat.static_shape(call)
        assert shape is not None
        why = _refusal(graph, attention, sources, inputs) or _plain(projection)
        if not why and not graph.single(heads):
            why = "the result of attention is read elsewhere too"
        if not why and not self.kernels.minimises_attention(shape[1]):
            why = f"the projection has {shape[1]} features, want whole panels"
        if why:
            return Reject(f"attention into {projection.names[0]}", why)
        q, k, v = (s for s in sources if s is not None)
        xs = [arguments(c)[0] for c in calls]
        node = MinimalAttention(attention, (q, k, v), projection)
        return self.table.call(node, [*xs, *inputs[3:], *more], shape)


def _plain(layer: Layer) -> str:
    """Return what keeps a layer from being multiplied inside the kernel, or nothing."""
    if not isinstance(layer.op, ops.Dense) or layer.precision != "f32":
        return f"{layer.names[0]} is {type(layer.op).__name__} {layer.precision}, want Dense f32"
    if layer.activation != "none":
        return f"{layer.activation} follows {layer.names[0]}"
    return ""


def _refusal(graph: Graph, attention: Attention, sources: list[Layer | None], inputs: list) -> str:
    layouts = (attention.q_layout, attention.k_layout, attention.v_layout)
    for name, layer, layout, rows in zip("qkv", sources, layouts, inputs, strict=False):
        if layer is None:
            return f"{name} does not come from a layer"
        if why := _plain(layer):
            return why
        if layer.epilogue.joins_rows:
            return f"a residual or a normalisation follows {layer.names[0]}"
        if layout != (layer.op.n_out, 0):
            return f"{name} is a slice {layout} of {layer.names[0]}"
        if not graph.single(rows):
            return f"{layer.names[0]} is read elsewhere too"
    return ""
