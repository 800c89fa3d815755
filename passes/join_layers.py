"""Join small layers in a row: one team of threads takes a few rows through all of them.

Every kernel of its own costs a call and the waking of threads, a microsecond or two, which is as
long as a structured layer computes for one row.
"""

from __future__ import annotations

from collections import Counter

from tvm import relax

from tvmstruct import compat
from tvmstruct.layers import Layer, LayerSequence, LayerTable, arguments
from tvmstruct.rewrite import Graph, operands
from tvmstruct.schedules import Kernels

MOST = 16  # layers: by then the share of each in the cost of a call is small, and code still is


class JoinLayers:
    """Turn a layer and those that only feed it into one sequence, where the target joins them.

    Every layer becomes the end of a sequence; of these the graph keeps those that are still read.
    """

    name = "join_layers"

    def __init__(self, table: LayerTable, kernels: Kernels) -> None:
        self.table, self.kernels = table, kernels

    def rewrite(self, graph: Graph, call: relax.Call) -> relax.Expr | None:
        """Return the sequence that ends with this call, or None where the layer stays alone."""
        shape = compat.static_shape(call) if self.table.layer(call) is not None else None
        if shape is None or not self._joins(call, shape[0]):
            return None
        calls = self._members(graph, call, shape[0])
        if len(calls) < 2:
            return None
        wanted = [a for c in calls for a in arguments(c)]
        given = list(dict.fromkeys(a for a in wanted if graph.value(a) not in calls))
        numbers = {a: i for i, a in enumerate(given)}
        for a in wanted:
            if a not in numbers:
                numbers[a] = len(given) + calls.index(graph.value(a))
        reads = tuple(tuple(numbers[a] for a in arguments(c)) for c in calls)
        return self.table.call(LayerSequence(tuple(map(self._layer, calls)), reads), given, shape)

    def _members(self, graph: Graph, last: relax.Call, rows: int) -> list[relax.Call]:
        """Return calls in an order to compute them in; nothing else reads any but the last."""
        found = [last]
        read = Counter(operands(last))
        waiting = list(read)
        while waiting and len(found) < MOST:
            var = waiting.pop(0)
            value = graph.value(var)
            if read[var] == graph.uses[var] and value not in found and self._joins(value, rows):
                found.append(value)
                more = list(operands(value))
                read.update(more)
                waiting += more
        return found[::-1]

    def _joins(self, value: relax.Expr, rows: int) -> bool:
        layer = self.table.layer(value)
        shape = compat.static_shape(value) if layer is not None else None
        if layer is None or shape is None or shape[0] != rows:
            return False
        return self.kernels.joins(layer.op, layer.precision, rows)

    def _layer(self, call: relax.Call) -> Layer:
        layer = self.table.layer(call)
        assert layer is not None
        return layer
