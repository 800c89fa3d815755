"""Compute the projections of one input as a single layer: queries, keys and values.

The three weights of self-attention read the same rows; side by side in one matrix they stream
once and fill the register tile better, and the attention kernel reads its heads out of the
merged rows through offsets, so nothing is copied.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
from tvm import relax

from tvmstruct import compat, ops
from tvmstruct.layers import Attention, Layer, LayerTable, arguments
from tvmstruct.rewrite import Graph


class MergeSharedInput:
    """Merge the dense layers that feed one attention and read the same rows."""

    name = "merge_shared_input"

    def __init__(self, table: LayerTable) -> None:
        self.table = table

    def rewrite(self, graph: Graph, call: relax.Call) -> relax.Expr | None:
        """Return the attention on merged rows, or None where its inputs stay apart."""
        node = self.table.node(call)
        if not isinstance(node, Attention):
            return None
        args = arguments(call)
        sources = [graph.value(a) for a in args[:3]]
        layers = [self.table.layer(s) for s in sources]
        layouts = (node.q_layout, node.k_layout, node.v_layout)
        groups = _same_input(graph, args[:3], sources, layers, layouts)
        if len(groups) < 2:
            return None
        merged, width = self._merge(groups, sources, layers)
        changed, offset = {}, 0
        for i, name in enumerate(("q_layout", "k_layout", "v_layout")):
            if i in groups:
                changed[name] = (width, offset)
                args[i] = merged
                offset += layers[i].op.n_out
        shape = compat.static_shape(call)
        assert shape is not None
        return self.table.call(replace(node, **changed), args, shape)

    def _merge(self, groups: list[int], sources, layers) -> tuple[relax.Expr, int]:
        some = [layers[i] for i in groups]
        weights = np.concatenate([layer.op.w for layer in some], axis=1)
        biases = [
            np.zeros(layer.op.n_out, np.float32) if layer.bias is None else layer.bias
            for layer in some
        ]
        names = tuple(layer.key for layer in some)
        bias = None if all(layer.bias is None for layer in some) else np.concatenate(biases)
        first = sources[groups[0]]
        rows = compat.static_shape(first)
        assert rows is not None
        layer = Layer(
            names, ops.Dense(weights), bias=bias, parts=tuple(some), precision=some[0].precision
        )
        call = self.table.call(layer, arguments(first), (rows[0], weights.shape[1]))
        return call, weights.shape[1]


def _same_input(graph: Graph, args, sources, layers, layouts) -> list[int]:
    """Return which of q, k and v are plain dense layers of the rows that most of them read.

    What is a slice of a layer stays as it is.
    """
    plain = [
        i
        for i, (arg, layer, layout) in enumerate(zip(args, layers, layouts, strict=True))
        if layer is not None
        and isinstance(layer.op, ops.Dense)
        and layout == (layer.op.n_out, 0)
        and layer.activation == "none"
        and not layer.residual
        and graph.single(arg)
    ]
    rows = {i: arguments(sources[i])[0] for i in plain}
    groups = [
        [
            j
            for j in plain
            if layers[i].precision == layers[j].precision and _same_rows(graph, rows[i], rows[j])
        ]
        for i in plain
    ]
    return max(groups, key=len, default=[])


def _same_rows(graph: Graph, a: relax.Expr, b: relax.Expr) -> bool:
    same_shape = compat.static_shape(a) == compat.static_shape(b)
    return same_shape and _origin(graph, a).same_as(_origin(graph, b))


def _origin(graph: Graph, expr: relax.Expr) -> relax.Expr:
    while (reshape := graph.call(expr, "relax.reshape")) is not None:
        expr = reshape.args[0]
    return expr
