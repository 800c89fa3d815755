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
from tvmstruct.folding import fold
from tvmstruct.layers import Form, HashTables, Layer, LayerTable, RecurrentCells, arguments
from tvmstruct.recurrent import Cell
from tvmstruct.rewrite import Graph, Reject
from tvmstruct.rounding import BYTES, EACH, HALVES, pays
from tvmstruct.schedules import Kernels
from tvmstruct.schedules.compute.low_precision import (
    DYNAMIC,
    round_bf16,
    rounded_blocks,
    stored_error,
)

TABLES = {"bf16": "bf16", "bf16-weights": "bf16", "int8": "int8"}  # what tables are stored as
NOTES = {  # of the forms of `rounding`
    BYTES: "x and what is between products rounded to int8, a scale for each row, exact sums",
    HALVES: "x and what is between products rounded to bf16, f32 sums",
}
NO_MATRIX = "it has no matrix to round"
PROBES = 64  # random rows for the error of a structured operator


class ChoosePrecision:
    """Mark what a precision can hold, and what gains from it."""

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
        if not isinstance(layer.op, ops.Dense):
            return "structured products with the state have kernels in f32 only"
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
        arrays = self._rounded_arrays(layer.op)
        if not arrays:
            sizes = _blocks(layer.op)
            return f"{_sizes(sizes)} are too small to gain from int8" if sizes else NO_MATRIX
        if self.precision == "int8":
            self.kernels.precision("int8")  # raises where the CPU has no such products
        for w in arrays:
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
            error = self._rounding_error(layer.op)
            note = self._note(layer.op)
            form.reason = f"{form.reason}; {note}" if form.reason else note
        form.error = math.hypot(form.error, error)
        form.bytes = self._bytes(layer.op, self.precision)

    def _note(self, op: ops.Op) -> str:
        """Return what a structured operator is stored as, and what is not."""
        form = self.kernels.product_form(self.precision)
        if form not in EACH:
            return "weights in bf16, x and arithmetic in f32"
        note = NOTES[form]
        rest = [size for size in _blocks(op) if not pays(form, *size)]
        if len(rest) == len(_blocks(op)):
            return f"weights in bf16, x and arithmetic in f32: {_sizes(rest)} too small to gain"
        if rest:
            note += f"; x of {_sizes(rest)}, too small to gain, in f32"
        return note

    def _bytes(self, op: ops.Op, precision: str) -> int:
        if precision == DYNAMIC:
            return op.params + 8 * op.n_out
        rounded = self._rounded_arrays(op)
        if precision != "int8":
            return 4 * op.params - 2 * sum(w.size for w in rounded)
        stored = sum(w.size + 8 * (w.size // w.shape[-2]) for w in rounded)
        return stored + 4 * (op.params - sum(w.size for w in rounded))

    def _rounded_arrays(self, op: ops.Op) -> list[np.ndarray]:
        """Return the arrays that the precision rounds: diagonals are vectors and stay in f32."""
        return [w for w in op.arrays() if self._rounds(w, dense=isinstance(op, ops.Dense))]

    def _rounds(self, w: np.ndarray, *, dense: bool = False) -> bool:
        if w.ndim == 1:
            return False
        return dense or self.precision != "int8" or pays(BYTES, *w.shape[-2:])

    def _rounding_error(self, op: ops.Op) -> float:
        """Return the relative Frobenius error of an operator, estimated on random rows.

        Never dense: that may be a thousand times larger.
        """

        def stored(w: np.ndarray) -> np.ndarray:
            if not self._rounds(w):
                return w
            return rounded_blocks(w) if self.precision == "int8" else round_bf16(w).astype(float)

        x = np.random.default_rng(0).standard_normal((PROBES, op.n_in))
        y = op.apply(x)
        norm = float(np.linalg.norm(y))
        kept = op if self.precision != "int8" else fold(op)  # scales are those of folded weights
        found = ops.map_arrays(kept, stored).apply(x)
        return float(np.linalg.norm(found - y)) / norm if norm else 0.0


def _blocks(op: ops.Op) -> list[tuple[int, int]]:
    """Return the different sizes of the blocks of an operator."""
    return sorted({(w.shape[-2], w.shape[-1]) for w in op.arrays() if w.ndim > 1})


def _sizes(blocks: list[tuple[int, int]]) -> str:
    return "blocks of " + ", ".join(f"{p} by {q}" for p, q in blocks)
