"""Store the weights of layers and the tables of lookups in the precision that was asked for.

Dense weights that the source has as integers, to be met by rounded activations, stay what they
are in every precision.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace

import numpy as np
from tvm import relax

from tvmstruct import compat, ops
from tvmstruct.layers import Form, HashTables, Layer, LayerTable, RecurrentCells, arguments
from tvmstruct.recurrent import Cell
from tvmstruct.rewrite import Graph, Reject
from tvmstruct.schedules import Kernels
from tvmstruct.schedules.compute.low_precision import DYNAMIC, round_bf16, stored_error

TABLES = {"bf16": "bf16", "bf16-weights": "bf16", "int8": "int8"}  # what tables are stored as
PROBES = 64  # random rows for the error of a structured operator


class ChoosePrecision:
    """Mark what a precision can hold; int8 leaves structured layers in f32, but not tables."""

    name = "choose_precision"

    def __init__(
        self,
        table: LayerTable,
        forms: dict[str, Form],
        kernels: Kernels,
        precision: str,
        errors: dict[str, float] | None = None,
        scales: Mapping[str, np.ndarray] | None = None,
    ) -> None:
        self.table, self.forms = table, forms
        self.errors = {} if errors is None else errors  # of lookup tables, by their names
        self.kernels, self.precision = kernels, precision
        self.scales = scales or {}  # of weights that came as integers, by their names

    def rewrite(self, graph: Graph, call: relax.Call) -> relax.Expr | Reject | None:
        """Return the layer in the precision, or why it stays in f32."""
        node = self.table.node(call)
        if isinstance(node, RecurrentCells):
            return self._hidden(call, node)
        layer = self.table.layer(call)
        if layer is not None and (made := self._integers(layer)) is not layer:
            return self._replaced(call, made)
        if self.precision == "f32":
            return None
        if isinstance(node, HashTables) and node.precision == "f32":
            return self._tables(call, node)
        if layer is None or layer.precision != "f32":
            return None
        form = self.forms[layer.key]
        if (why := self._obstacle(layer)) is not None:
            note = f"f32: {why}"
            if note not in form.reason:
                form.reason = f"{form.reason}; {note}" if form.reason else note
            return Reject(layer.names[0], why)
        if form.precision == "f32":
            self._store(layer, form)
        return self._replaced(call, replace(layer, precision=self.precision))

    def _replaced(self, call: relax.Call, layer: Layer) -> relax.Expr:
        shape = compat.static_shape(call)
        assert shape is not None
        return self.table.call(layer, arguments(call), shape)

    def _integers(self, layer: Layer) -> Layer:
        """Return a layer on the integers that the source has, itself where there are none."""
        known = layer.names[0] in self.scales and isinstance(layer.op, ops.Dense)
        if not known or layer.precision != "f32":
            return layer
        form = self.forms[layer.key]
        form.reason = self.kernels.precision(DYNAMIC).note
        form.precision, form.bytes = DYNAMIC, self._bytes(layer.op, DYNAMIC)
        return replace(layer, precision=DYNAMIC)

    def _hidden(self, call: relax.Call, node: RecurrentCells) -> relax.Expr | Reject | None:
        """Return a recurrent layer with its hidden matrices in int8, or why they stay in f32."""
        made, whys = [], []
        for cell, layer in zip(node.cells, map(self._integers, node.hidden), strict=True):
            form = self.forms[layer.key]
            if self.precision == "f32":
                pass
            elif layer.precision == "f32" and (why := self._state_obstacle(cell, layer)) is None:
                form.precision, form.bytes = "int8", self._bytes(layer.op, "int8")
                form.error = math.hypot(form.error, stored_error(form.op.w, "int8"))
                form.reason = "the state rounded to int8 in every step, exact int32 sums"
                layer = replace(layer, precision="int8")
            elif layer.precision == "f32":
                note = f"f32: {why}"
                if note not in form.reason:
                    form.reason = "; ".join(filter(None, (form.reason, note)))
                whys.append(Reject(layer.names[0], why))
            made.append(layer)
        if made == list(node.hidden):
            return whys[0] if whys else None
        return self.table.replaced(call, made)

    def _state_obstacle(self, cell: Cell, layer: Layer) -> str | None:
        """Return why a hidden matrix cannot be multiplied in int8, or None."""
        if self.precision != "int8":
            return "products with the state have kernels in f32 and int8 only"
        if (why := self._obstacle(layer)) is not None:
            return why
        if not cell.bounded or cell.split_reset:
            return "the state has no known bound, or the reset gate comes before the product"
        return None

    def _tables(self, call: relax.Call, node: HashTables) -> relax.Expr | Reject:
        """Return hash tables in the precision; scores and sums stay in f32."""
        made = replace(node, precision=TABLES[self.precision])
        name = "+".join(node.names)
        if name not in self.errors:
            self.errors[name] = made.static.error(node.tables)
        if not math.isfinite(self.errors[name]):
            return Reject(node.names[0], f"has values that {made.precision} cannot hold")
        shape = compat.static_shape(call)
        assert shape is not None
        return self.table.call(made, arguments(call), shape)

    def _obstacle(self, layer: Layer) -> str | None:
        dense = isinstance(layer.op, ops.Dense)
        if not dense and self.precision == "int8":
            return f'structured layers have no "{self.precision}" kernel'
        for w in _rounded_arrays(layer.op):
            stored = w if self.precision == "int8" else round_bf16(w)
            if not np.isfinite(stored.astype(np.float32)).all():
                return f"the weight has values that {self.precision} cannot hold"
        return None

    def _store(self, layer: Layer, form: Form) -> None:
        form.precision = self.precision
        if isinstance(layer.op, ops.Dense):
            error = stored_error(layer.op.w, self.precision)
            form.reason = self.kernels.precision(self.precision).note
        else:
            error = _rounding_error(layer.op)
            note = "weights in bf16, x and arithmetic in f32"
            form.reason = f"{form.reason}; {note}" if form.reason else note
        form.error = math.hypot(form.error, error)
        form.bytes = self._bytes(layer.op, self.precision)

    def _bytes(self, op: ops.Op, precision: str) -> int:
        if precision in ("int8", DYNAMIC):
            return op.params + 8 * op.n_out
        return 4 * op.params - 2 * sum(w.size for w in _rounded_arrays(op))


def _rounded_arrays(op: ops.Op) -> list[np.ndarray]:
    """Return the arrays that low precision rounds: diagonals are vectors and stay in f32."""
    return [w for w in op.arrays() if w.ndim > 1]


def _rounding_error(op: ops.Op) -> float:
    """Return the relative Frobenius error of an operator in bf16, estimated on random rows.

    Never dense: that may be a thousand times larger.
    """

    def stored(w: np.ndarray) -> np.ndarray:
        return w if w.ndim == 1 else round_bf16(w).astype(np.float64)

    x = np.random.default_rng(0).standard_normal((PROBES, op.n_in))
    y = op.apply(x)
    norm = float(np.linalg.norm(y))
    return float(np.linalg.norm(ops.map_arrays(op, stored).apply(x) - y)) / norm if norm else 0.0
