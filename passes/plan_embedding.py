"""Give each embedding table the form that the plan asks for, or that came with the source."""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np
from tvm import relax

from tvmstruct import compat
from tvmstruct.embeddings import TABLE_FAMILIES
from tvmstruct.layers import Embedding, LayerTable, TableForm
from tvmstruct.planning import LayerPlan, Plan, apply_table
from tvmstruct.rewrite import Graph, Reject
from tvmstruct.schedules.compute.embedding import EmbeddingSum, tensors_of

R = relax.op
ID_TYPES = ("int32", "int64")


class PlanEmbedding:
    """Replace take from such a table by a lookup that makes only the rows asked for."""

    name = "plan_embedding"

    def __init__(
        self, table: LayerTable, tables: dict[str, TableForm], plan: Plan, names: Mapping[int, str]
    ) -> None:
        self.table, self.tables, self.plan, self.names = table, tables, plan, names

    def rewrite(self, graph: Graph, call: relax.Call) -> relax.Expr | Reject | None:
        """Return the lookup, or why the table stays dense."""
        if compat.op_name(call) != "relax.take" or not compat.is_constant(call.args[0]):
            return None
        name = self.names.get(compat.address(compat.constant_tensor(call.args[0])), "")
        entry, form = self.plan.lookup(name), self.tables.get(name)
        if entry is None and form is None:
            return None
        shape, ids = compat.static_shape(call), call.args[1]
        if why := refusal(call) or (_no_table(entry) if entry is not None else ""):
            return Reject(name, why)
        assert shape is not None
        if form is None:
            assert entry is not None
            form = self.tables[name] = _fitted(entry, compat.constant_array(call.args[0]))
        term = tensors_of(form.table, compat.dtype_of(ids))
        node = Embedding(EmbeddingSum(shape[-1], (term,)), (name,), form.table)
        rows = math.prod(shape[:-1])
        y = self.table.call(node, [R.reshape(ids, (rows,))], (rows, shape[-1]))
        return R.reshape(y, shape)


def _fitted(entry: LayerPlan, w: np.ndarray) -> TableForm:
    made, fit = apply_table(entry, w)
    return TableForm(made, fit.family, fit.parameters, fit.error, "planned", w)


def refusal(take: relax.Call) -> str:
    """Return why a gather is no lookup of embedding rows, or an empty string."""
    table, ids = take.args
    shape, rows = compat.static_shape(table), compat.static_shape(take)
    axis = take.attrs.axis
    if shape is None or len(shape) != 2 or axis is None or int(axis) != 0:
        return f"gathers along axis {axis} of {shape}; only rows of a matrix are looked up"
    if compat.dtype_of(table) != "float32" or compat.dtype_of(ids) not in ID_TYPES:
        return (
            f"a table of {compat.dtype_of(table)} and ids of {compat.dtype_of(ids)}; "
            f"want float32 and one of {', '.join(ID_TYPES)}"
        )
    if rows is None or not math.prod(rows):
        return "the shape of the ids is not static in this bucket, or empty"
    return ""


def _no_table(entry: LayerPlan) -> str:
    if entry.family in TABLE_FAMILIES:
        return ""
    return (
        f"single rows cannot be looked up in the form {entry.family}; "
        f"plan one of {', '.join(TABLE_FAMILIES)}"
    )
