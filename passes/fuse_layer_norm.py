"""Replace layer normalisation over the last axis by its kernel, however the graph spells it."""

from __future__ import annotations

import math

import numpy as np
from tvm import relax

from tvmstruct import compat
from tvmstruct.layers import LayerNorm, LayerTable
from tvmstruct.rewrite import Graph, Reject

R = relax.op


class FuseLayerNorm:
    """Send ``nn.layer_norm`` with constant scale and shift to the layer norm kernel."""

    name = "fuse_layer_norm"

    def __init__(self, table: LayerTable) -> None:
        self.table = table

    def rewrite(self, graph: Graph, call: relax.Call) -> relax.Expr | Reject | None:
        """Return the kernel call on rows, or why it stays a generic kernel."""
        if compat.op_name(call) != "relax.nn.layer_norm":
            return None
        x, gamma, beta = call.args
        shape = compat.static_shape(x)
        if shape is None or compat.dtype_of(x) != "float32":
            return Reject("layer_norm", f"shape {shape}, dtype {compat.dtype_of(x)}")
        axes = [int(a) % len(shape) for a in call.attrs.axes]
        if axes != [len(shape) - 1]:
            return Reject("layer_norm", f"normalises axes {axes} of {len(shape)}, want the last")
        n, rows = shape[-1], math.prod(shape[:-1])
        gamma = gamma if call.attrs.scale else relax.const(np.ones(n, "float32"))
        beta = beta if call.attrs.center else relax.const(np.zeros(n, "float32"))
        node = LayerNorm(n, float(call.attrs.epsilon))
        y = self.table.call(node, [R.reshape(x, (rows, n)), gamma, beta], (rows, n))
        return R.reshape(y, shape)
