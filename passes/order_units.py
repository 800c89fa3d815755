"""Keep the units of a recurrent layer in the order in which its hidden matrix yields them.

AntMan's shuffle deals the outputs of each group out over all units, the four gates of a unit from
one group. In the order of groups every group is a dense block that yields its own units, and the
shuffle is how the next step reads its inputs. The input product, which meets the sums, is brought
into that order once, when it is compiled.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
from tvm import relax

from tvmstruct import compat, ops
from tvmstruct.layers import Layer, LayerTable, RecurrentCells, arguments
from tvmstruct.passes.fuse_epilogue import producer
from tvmstruct.rewrite import Graph
from tvmstruct.schedules.compute.low_precision import DYNAMIC


class OrderUnits:
    """Relabel the units of recurrent layers whose hidden matrices end in a shuffle."""

    name = "order_units"

    def __init__(self, table: LayerTable) -> None:
        self.table = table

    def rewrite(self, graph: Graph, call: relax.Call) -> relax.Expr | None:
        """Return the layer with its units in another order, or None where none is better."""
        node = self.table.node(call)
        if not isinstance(node, RecurrentCells) or any(node.orders):
            return None
        args, states = arguments(call), node.states
        hidden, orders, holes = list(node.hidden), [], list(node.peepholes)
        for k, layer in enumerate(node.hidden):
            groups = _groups(layer.op, node.h)
            source, old = producer(graph, self.table, args[states + k])
            known = isinstance(source, Layer) and source.precision != DYNAMIC  # scales keep order
            if groups < 2 or not known or source.activation != "none":
                orders.append(0)
                continue
            shape = compat.static_shape(args[states + k])
            assert shape is not None
            gates = node.cells[k].gates
            made = _reordered(source, gates, node.h, groups)
            rows = compat.static_shape(old)
            assert rows is not None
            args[states + k] = relax.op.reshape(self.table.call(made, arguments(old), rows), shape)
            hidden[k] = _sorted(layer, gates, node.h, groups)
            if (array := holes[k]) is not None:
                holes[k] = _permute(array.reshape(-1), 3, node.h, groups).reshape(3, -1)
            orders.append(groups)
        if not any(orders):
            return None
        node = replace(node, hidden=tuple(hidden), peepholes=tuple(holes), orders=tuple(orders))
        return self.table.call(node, args, *compat.result_shapes(call))


def _groups(op: ops.Op, h: int) -> int:
    """Return the groups of LGP-shuffle that keep the gates of a unit together, else 0."""
    match op:
        case ops.Product((ops.BlockDiag(w), ops.Permute(dims, (1, 0)))):
            return w.shape[0] if dims[0] == w.shape[0] and h % w.shape[0] == 0 else 0
        case _:
            return 0


def _order(gates: int, h: int, groups: int) -> ops.Permute:
    """Return how features of all gates get from the natural order into that of groups."""
    return ops.Permute((gates, h // groups, groups), (0, 2, 1))


def _permute(array: np.ndarray, gates: int, h: int, groups: int) -> np.ndarray:
    return _order(gates, h, groups).apply(array)


def _reordered(layer: Layer, gates: int, h: int, groups: int) -> Layer:
    """Return the input's layer with its outputs in the order of groups."""
    order = _order(gates, h, groups)
    if isinstance(layer.op, ops.Dense):
        op: ops.Op = ops.Dense(order.apply(layer.op.w))
    else:
        op = ops.product(layer.op, order)
    bias = None if layer.bias is None else order.apply(layer.bias)
    return replace(layer, op=op, bias=bias, variant=f"{layer.variant}/units{groups}")


def _sorted(layer: Layer, gates: int, h: int, groups: int) -> Layer:
    """Return the hidden layer as blocks without their shuffle, its bias in the order of groups."""
    assert isinstance(layer.op, ops.Product)
    bias = None if layer.bias is None else _permute(layer.bias, gates, h, groups)
    return replace(
        layer, op=layer.op.factors[0], bias=bias, variant=f"{layer.variant}/units{groups}"
    )
