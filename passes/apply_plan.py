"""Give each layer that the plan names the form that the plan asks for."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace

import numpy as np
from tvm import relax

from tvmstruct import ops
from tvmstruct.embeddings import Word2KetXS
from tvmstruct.layers import Form, Layer, LayerTable, TableForm
from tvmstruct.planning import Plan, apply_layer
from tvmstruct.rewrite import Graph


class ApplyPlan:
    """Replace a dense layer by the nearest member of its planned family."""

    name = "apply_plan"

    def __init__(
        self,
        table: LayerTable,
        forms: dict[str, Form],
        plan: Plan,
        tables: Mapping[str, TableForm] | None = None,
    ) -> None:
        self.table, self.forms, self.plan = table, forms, plan
        self.tables = {} if tables is None else tables

    def rewrite(self, graph: Graph, call: relax.Call) -> relax.Expr | None:
        """Return the structured layer, or None where the plan does not name it."""
        layers = self.table.weights(call)
        made = [self._planned(layer) for layer in layers]
        if all(new is old for new, old in zip(made, layers, strict=True)):
            return None
        return self.table.replaced(call, made)

    def _planned(self, layer: Layer) -> Layer:
        """Return a layer in the form that the plan asks for, or as it is."""
        if not isinstance(layer.op, ops.Dense):
            return layer
        form = self.forms.get(layer.key)
        if form is None or form.form == "dense":
            form = self._form(layer, layer.op.w)
            if form is None:
                return layer
            self.forms[layer.key] = form
        return replace(layer, op=form.op)

    def _form(self, layer: Layer, w: np.ndarray) -> Form | None:
        """Return what the plan asks for; of a table that is looked up too, what that became."""
        if (tied := self._tied(layer, w)) is not None:
            return tied
        entry = self.plan.lookup(layer.names[0])
        if entry is None:
            return None
        fit = apply_layer(entry, w)
        return Form(fit.op, fit.family, fit.parameters, fit.error, "planned")

    def _tied(self, layer: Layer, w: np.ndarray) -> Form | None:
        """Return the form of a weight that is a looked-up table, by name or as a copy of it."""
        form, flipped = self.tables.get(layer.names[0]), layer.transposed
        if form is None:
            form, flipped = next(self._copies(w), (None, False))
        if form is None or not isinstance(form.table, Word2KetXS):
            return None
        op = form.table.operator
        op = ops.transpose(op) if flipped else op
        if (op.n_in, op.n_out) != w.shape:
            return None  # the graph reshapes the table before it multiplies with it
        reason = f"{form.reason}; tied: the factors of the embedding"
        return Form(op, form.form, form.parameters, form.error, reason)

    def _copies(self, w: np.ndarray) -> Iterator[tuple[TableForm, bool]]:
        """Yield tables that ``w`` is a copy of, and whether it is transposed."""
        for form in self.tables.values():
            if form.dense is not None and np.array_equal(form.dense.T, w):
                yield form, True
            elif form.dense is not None and np.array_equal(form.dense, w):
                yield form, False
