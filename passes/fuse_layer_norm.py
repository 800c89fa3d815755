"""Let the layer before a layer normalisation compute it, else give it a kernel of its own.

The rows that a layer has just written are still in cache, and one kernel call less is a wake-up
of threads less.
"""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
from tvm import relax

from tvmstruct import compat
from tvmstruct.layers import LayerNorm, LayerTable, arguments
from tvmstruct.passes.fuse_epilogue import producer
from tvmstruct.rewrite import Graph, Reject

R = relax.op


class FuseLayerNorm:
    """Send ``nn.layer_norm`` over the last axis to the layer before it, or to its kernel."""

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
        epsilon = float(call.attrs.epsilon)
        layer, old = producer(graph, self.table, x)
        if layer is not None and old is not None and compat.static_shape(old) == (rows, n):
            node, args = replace(layer, norm=epsilon), arguments(old)
        else:
            node, args = LayerNorm(n, epsilon), [R.reshape(x, (rows, n))]
        return R.reshape(self.table.call(node, [*args, gamma, beta], (rows, n)), shape)
