"""Read the calls that frontends write for recurrent layers as nodes with hidden layers."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence

import numpy as np
from tvm import relax

from tvmstruct import compat, ops
from tvmstruct.frontends.recurrent import SYMBOL, Recurrence, read_hidden
from tvmstruct.known_forms import known_form
from tvmstruct.layers import Form, Layer, LayerTable, RecurrentCells
from tvmstruct.rewrite import Graph


class RecognizeRecurrence:
    """Replace the external call of a recurrence by a node that passes and kernels know."""

    name = "recognize_recurrence"

    def __init__(self, table: LayerTable, forms: dict[str, Form], names: Mapping[int, str]) -> None:
        self.table, self.forms, self.names = table, forms, names

    def rewrite(self, graph: Graph, call: relax.Call) -> relax.Expr | None:
        """Return the node's call, or None for any other call; ModelError for a damaged one."""
        symbol = compat.external_symbol(call)
        if symbol is None or not symbol.startswith(SYMBOL):
            return None
        found = Recurrence.read(symbol)
        states = found.lengths + 1 + found.lstm
        args, rest = list(call.args[1].fields), iter(call.args[1].fields[states:])
        kept, hidden, holes = args[:states], [], []
        for k, count in enumerate(found.arrays):
            kept.append(next(rest))
            tensors = [graph.value(next(rest)) for _ in range(count)]
            bias = _array(graph, rest) if found.biases[k] else None
            holes.append(_array(graph, rest) if found.peepholes[k] else None)
            hidden.append(self._layer(found, k, tensors, bias))
        node = RecurrentCells(
            found.cells, tuple(hidden), tuple(holes), found.steps, found.batch, found.lengths
        )
        return self.table.call(node, kept, *compat.result_shapes(call))

    def _layer(
        self, found: Recurrence, side: int, tensors: Sequence[relax.Expr], bias: np.ndarray | None
    ) -> Layer:
        """Return the hidden layer of a side; what is structured already keeps its form."""
        op = read_hidden(found, side, [compat.constant_array(t) for t in tensors])
        names = tensors if found.projected else tensors[:1]
        layer = Layer(tuple(dict.fromkeys(map(self._name, names))), op, bias=bias)
        if not isinstance(op, ops.Dense) and layer.key not in self.forms:
            known = known_form(op)
            reason = "as the source has it"
            self.forms[layer.key] = Form(known.op, known.name, known.parameters, reason=reason)
        return layer

    def _name(self, tensor: relax.Expr) -> str:
        found = self.names.get(compat.address(compat.constant_tensor(tensor)))
        if found is not None:
            return found
        content = np.ascontiguousarray(compat.constant_array(tensor)).tobytes()
        return f"constant_{hashlib.sha256(content).hexdigest()[:16]}"


def _array(graph: Graph, rest) -> np.ndarray:
    return compat.constant_array(graph.value(next(rest)))
