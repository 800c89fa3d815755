"""Store the weights of dense layers in the precision that the user asked for."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
from tvm import relax

from tvmstruct import compat, ops
from tvmstruct.layers import Form, Layer, LayerTable, arguments
from tvmstruct.rewrite import Graph, Reject
from tvmstruct.schedules import Kernels
from tvmstruct.schedules.compute.low_precision import round_bf16, stored_error


class ChoosePrecision:
    """Mark every dense layer whose weight a precision can hold; structured layers stay in f32."""

    name = "choose_precision"

    def __init__(
        self, table: LayerTable, forms: dict[str, Form], kernels: Kernels, precision: str
    ) -> None:
        self.table, self.forms = table, forms
        self.kernels, self.precision = kernels, precision

    def rewrite(self, graph: Graph, call: relax.Call) -> relax.Expr | Reject | None:
        """Return the layer in the precision, or why it stays in f32."""
        layer = self.table.layer(call)
        if layer is None or self.precision == "f32":
            return None
        form = self.forms[layer.key]
        if (why := self._obstacle(layer)) is not None:
            note = f"f32: {why}"
            if note not in form.reason:
                form.reason = f"{form.reason}; {note}" if form.reason else note
            return Reject(layer.names[0], why)
        if form.precision == "f32":
            self._store(layer, form)
        shape = compat.static_shape(call)
        assert shape is not None
        return self.table.call(replace(layer, precision=self.precision), arguments(call), shape)

    def _obstacle(self, layer: Layer) -> str | None:
        if not isinstance(layer.op, ops.Dense):
            return f'structured layers have no "{self.precision}" kernel'
        stored = layer.op.w if self.precision == "int8" else round_bf16(layer.op.w)
        if not np.isfinite(stored.astype(np.float32)).all():
            return f"the weight has values that {self.precision} cannot hold"
        return None

    def _store(self, layer: Layer, form: Form) -> None:
        assert isinstance(layer.op, ops.Dense)
        form.precision = self.precision
        form.error = stored_error(layer.op.w, self.precision)
        form.bytes = self._bytes(layer.op.n_out, layer.op.params)
        form.reason = self.kernels.precision(self.precision).note

    def _bytes(self, n_out: int, params: int) -> int:
        return params + 8 * n_out if self.precision == "int8" else 2 * params
