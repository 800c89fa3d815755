"""Give each layer that the plan names the form that the plan asks for."""

from __future__ import annotations

from dataclasses import replace

from tvm import relax

from tvmstruct import compat, ops
from tvmstruct.layers import Form, LayerTable, arguments
from tvmstruct.planning import Plan, apply_layer
from tvmstruct.rewrite import Graph


class ApplyPlan:
    """Replace a dense layer by the nearest member of its planned family."""

    name = "apply_plan"

    def __init__(self, table: LayerTable, forms: dict[str, Form], plan: Plan) -> None:
        self.table, self.forms, self.plan = table, forms, plan

    def rewrite(self, graph: Graph, call: relax.Call) -> relax.Expr | None:
        """Return the structured layer, or None where the plan does not name it."""
        layer = self.table.layer(call)
        if layer is None or not isinstance(layer.op, ops.Dense):
            return None
        entry = self.plan.lookup(layer.names[0])
        if entry is None:
            return None
        form = self.forms.get(layer.key)
        if form is None:
            fit = apply_layer(entry, layer.op.w)
            form = Form(fit.op, fit.family, fit.parameters, fit.error, "planned")
            self.forms[layer.key] = form
        shape = compat.static_shape(call)
        assert shape is not None
        return self.table.call(replace(layer, op=form.op), arguments(call), shape)
