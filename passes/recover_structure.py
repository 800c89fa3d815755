"""Find structure that is exactly in the weights, and use it without being asked."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from tvm import relax

from tvmstruct import compat, ops
from tvmstruct.layers import Form, Layer, LayerTable, arguments
from tvmstruct.recovery import recover
from tvmstruct.rewrite import Graph, Reject


class RecoverStructure:
    """Replace a dense layer whose weight is exactly a member of a family."""

    name = "recover_structure"

    def __init__(
        self, table: LayerTable, forms: dict[str, Form], stored_dtypes: Mapping[str, str]
    ) -> None:
        self.table, self.forms, self.stored = table, forms, stored_dtypes

    def rewrite(self, graph: Graph, call: relax.Call) -> relax.Expr | Reject | None:
        """Return the structured layer, or why the weight stays dense."""
        layer = self.table.layer(call)
        if layer is None or not isinstance(layer.op, ops.Dense):
            return None
        form = self.forms.get(layer.key)
        if form is None:
            form = self.forms[layer.key] = self._search(layer)
        if form.form == "dense":
            return Reject(layer.names[0], form.reason)
        shape = compat.static_shape(call)
        assert shape is not None
        return self.table.call(replace(layer, op=form.op), arguments(call), shape)

    def _search(self, layer: Layer) -> Form:
        assert isinstance(layer.op, ops.Dense)
        found = recover(layer.op.w, stored_dtype=self.stored.get(layer.names[0], "float32"))
        if found.fit is None:
            return Form(layer.op, reason=found.why)
        fit = found.fit
        return Form(fit.op, fit.family, fit.parameters, fit.error, "exactly in the weight")
