"""Turn every layer call into the call of a scheduled kernel with its packed weights."""

from __future__ import annotations

from dataclasses import dataclass
from functools import singledispatchmethod

import numpy as np
from tvm import relax

from tvmstruct import compat, ops
from tvmstruct.layers import Attention, FeedForward, Layer, LayerNorm, LayerTable, Node, arguments
from tvmstruct.rewrite import Graph
from tvmstruct.schedules import Kernels
from tvmstruct.schedules.compute.dense import pack
from tvmstruct.schedules.registry import Kernel
from tvmstruct.weights import WeightStore


@dataclass(frozen=True)
class KernelCall:
    """A kernel as one node calls it: the shapes of its float32 arguments, output last."""

    node: Node
    symbol: str
    shapes: tuple[tuple[int, ...], ...]


class EmitKernels:
    """Choose the kernel of each node for the rows at hand, and collect the kernels used."""

    name = "emit_kernels"

    def __init__(self, table: LayerTable, kernels: Kernels, store: WeightStore) -> None:
        self.table, self.kernels, self.store = table, kernels, store
        self.used: dict[str, Kernel] = {}
        self.calls: list[KernelCall] = []

    def rewrite(self, graph: Graph, call: relax.Call) -> relax.Expr | None:
        """Return the kernel call of a node."""
        node = self.table.node(call)
        if node is None:
            return None
        shape = compat.static_shape(call)
        assert shape is not None
        kernel, args = self._kernel(node, arguments(call), shape)
        self.used[kernel.symbol] = kernel
        shapes = [s for a in args if (s := compat.static_shape(a)) is not None]
        self.calls.append(KernelCall(node, kernel.symbol, (*shapes, shape)))
        return relax.call_dps_packed(kernel.symbol, args, compat.tensor_type(shape, "float32"))

    @singledispatchmethod
    def _kernel(
        self, node: Node, args: list[relax.Expr], shape: tuple[int, ...]
    ) -> tuple[Kernel, list[relax.Expr]]:
        raise TypeError(f"no kernel for {type(node).__name__}")

    @_kernel.register
    def _(self, node: Layer, args, shape):
        x, *residual = args
        if isinstance(node.op, ops.Dense):
            n_in, n_out = node.op.w.shape
            kernel = self.kernels.packed_dense(n_out, n_in, node.epilogue, shape[0])
            return kernel, [x, *self._packed(node), *residual]
        program = self.store.program(node.key, node.op, self.kernels.lanes)
        kernel = self.kernels.chain(program, node.epilogue, shape[0], node.op.macs)
        weights = [
            self.store.tensor(f"{node.key}#stage{i}", lambda w=w: w)
            for i, w in enumerate(program.weights)
        ]
        return kernel, [x, *map(relax.const, weights), *self._bias(node), *residual]

    @_kernel.register
    def _(self, node: FeedForward, args, shape):
        x, *residual = args
        up, down = node.up, node.down
        sizes = (up.op.n_in, up.op.n_out, down.op.n_out)
        flags = (up.bias is not None, down.bias is not None, down.residual)
        kernel = self.kernels.feed_forward(sizes, up.activation, flags, shape[0])
        return kernel, [x, *self._packed(up), *self._packed(down), *residual]

    def _packed(self, layer: Layer) -> list[relax.Expr]:
        """Return the packed weight of a dense layer and its bias."""
        assert isinstance(layer.op, ops.Dense)
        width, w = self.kernels.panel_width, layer.op.w
        tensor = self.store.tensor(f"{layer.key}#packed{width}", lambda: pack(w, width))
        return [relax.const(tensor), *self._bias(layer)]

    def _bias(self, layer: Layer) -> list[relax.Expr]:
        if layer.bias is None:
            return []
        return [relax.const(self.store.small("bias", np.asarray(layer.bias, np.float32)))]

    @_kernel.register
    def _(self, node: Attention, args, shape):
        return self.kernels.attention(node, shape[0]), args

    @_kernel.register
    def _(self, node: LayerNorm, args, shape):
        return self.kernels.layer_norm(node.n, node.epsilon), args
