"""Find structure that is exactly in the weights, and use it without being asked."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from tvm import relax

from tvmstruct import ops
from tvmstruct.layers import Form, Layer, LayerTable
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
        layers = [la for la in self.table.weights(call) if isinstance(la.op, ops.Dense)]
        if not layers:
            return None
        for layer in layers:
            if layer.key not in self.forms:
                self.forms[layer.key] = self._search(layer)
        dense = [layer for layer in layers if self.forms[layer.key].form == "dense"]
        if len(dense) == len(layers):
            return Reject(dense[0].names[0], self.forms[dense[0].key].reason)
        made = [
            replace(layer, op=self.forms[layer.key].op) if layer in layers else layer
            for layer in self.table.weights(call)
        ]
        return self.table.replaced(call, made)

    def _search(self, layer: Layer) -> Form:
        assert isinstance(layer.op, ops.Dense)
        found = recover(layer.op.w, stored_dtype=self.stored.get(layer.names[0], "float32"))
        if found.fit is None:
            return Form(layer.op, reason=found.why)
        fit = found.fit
        return Form(fit.op, fit.family, fit.parameters, fit.error, "exactly in the weight")
