"""Give dense and structured layers to an accelerator: with bias and ReLU, without anything else."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from tvm import relax

from tvmstruct import compat
from tvmstruct.layers import HashTables, Layer, LayerTable, Offloaded, arguments
from tvmstruct.rewrite import Graph, Reject

ON_ACCELERATOR = frozenset({"none", "relu"})  # activations that need no more than a maximum


class OffloadDense:
    """Replace the call of a layer by that of one layer offloaded, where nothing is against it.

    ``obstacle`` says why the accelerator cannot have a layer, or None.
    """

    name = "offload_dense"

    def __init__(self, table: LayerTable, obstacle: Callable[[Layer], str | None]) -> None:
        self.table, self.obstacle = table, obstacle
        self._graph: Graph | None = None
        self._hashed: set[relax.Expr] = set()

    def rewrite(self, graph: Graph, call: relax.Call) -> relax.Expr | Reject | None:
        """Return the offloaded layer, or why it stays on the CPU."""
        layer = self.table.layer(call)
        if layer is None:
            return None
        if (why := self.obstacle(layer)) is not None:
            return Reject(layer.names[0], why)
        if layer.activation not in ON_ACCELERATOR or layer.residual or layer.norm is not None:
            return Reject(layer.names[0], "its kernel on the CPU does more than bias and ReLU")
        if call in self._hashes(graph):
            return Reject(layer.names[0], "its signs are hash codes, which rounding would flip")
        shape = compat.static_shape(call)
        assert shape is not None
        return self.table.call(Offloaded((layer,)), arguments(call), shape)

    def _hashes(self, graph: Graph) -> set[relax.Expr]:
        """Return the calls whose rows hash tables read."""
        if self._graph is not graph:
            self._graph, self._hashed = graph, set()
            for value in graph.bound.values():
                if isinstance(self.table.node(value), HashTables):
                    self._hashed.add(_origin(graph, arguments(value)[0]))
        return self._hashed


class ChainOffloaded:
    """Let offloaded layers hand their rows on where nothing else reads them."""

    name = "chain_offloaded"

    def __init__(self, table: LayerTable, chains: Callable[[Layer], bool]) -> None:
        self.table, self.chains = table, chains

    def rewrite(self, graph: Graph, call: relax.Call) -> relax.Expr | None:
        """Return the call with all layers before it that only it reads, or None."""
        node = self.table.node(call)
        if not isinstance(node, Offloaded):
            return None
        last, made = call, node
        while (before := self._before(graph, made, last)) is not None:
            last = before
            first = self.table.node(before)
            assert isinstance(first, Offloaded)
            made = replace(made, layers=(*first.layers, *made.layers))
        if made is node:
            return None
        shape = compat.static_shape(call)
        assert shape is not None
        return self.table.call(made, arguments(last), shape)

    def _before(self, graph: Graph, node: Offloaded, call: relax.Call) -> relax.Call | None:
        """Return the offloaded call whose rows only ``call`` reads."""
        expr, rows = arguments(call)[0], compat.static_shape(arguments(call)[0])
        while isinstance(expr, relax.Var) and expr in graph.bound:
            if graph.uses[expr] != 1:
                return None
            value = graph.bound[expr]
            if isinstance(first := self.table.node(value), Offloaded):
                chained = (*first.layers, *node.layers)
                same = compat.static_shape(value) == rows
                return value if same and all(map(self.chains, chained)) else None
            expr = value.args[0] if compat.op_name(value) == "relax.reshape" else value
        return None


def _origin(graph: Graph, expr: relax.Expr) -> relax.Expr:
    """Return what makes rows, seen through reshapes."""
    value = graph.value(expr)
    while compat.op_name(value) == "relax.reshape":
        value = graph.value(value.args[0])
    return value
