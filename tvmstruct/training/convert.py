"""Dense layers of a PyTorch model replaced by structured ones, by a plan."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from tvmstruct.embeddings import TABLE_FAMILIES, Word2KetXS
from tvmstruct.errors import PlanError
from tvmstruct.families.kronecker import factor_shapes
from tvmstruct.families.word2ket_xs import zero_factors
from tvmstruct.ops import Array, Dense, Op, zeros
from tvmstruct.planning import LayerPlan, Plan, apply_layer, apply_table
from tvmstruct.recurrent import Cell, Recurrent
from tvmstruct.recurrent_forms import Forms, zero_operator
from tvmstruct.training.embedding import StructuredEmbedding
from tvmstruct.training.initialise import DENSE_GAIN, initialise
from tvmstruct.training.linear import StructuredLinear, StructuredOperator, to_array
from tvmstruct.training.recurrent import StructuredGRU, StructuredLSTM, StructuredRecurrent

KINDS = (nn.Linear, nn.Embedding, nn.LSTM, nn.GRU)


@dataclass(frozen=True)
class Converted:
    """What became of one weight: its form and error, or ("dense") why it was left alone.

    ``error`` is the relative Frobenius distance to the trained weight, None without projection.
    """

    layer: str
    form: str
    params: int
    error: float | None = None
    reason: str = ""


def plan_recurrent(name: str, layers: int, forms: Forms) -> dict[str, LayerPlan]:
    """Return the plan of an ``nn.LSTM`` or ``nn.GRU`` called ``name``: one form for all layers.

    >>> plan_recurrent("lstm", 2, antman("lgp_shuffle", g_im=10, g_hm=10))
    """
    at = f"{name}." if name else ""
    return {
        f"{at}weight_{part}_l{k}": form
        for k in range(layers)
        for part, form in zip(("ih", "hh"), forms, strict=True)
        if form is not None
    }


def convert(
    model: nn.Module, plan: Plan | Mapping[str, LayerPlan], *, project: bool = True
) -> tuple[nn.Module, list[Converted]]:
    """Return a copy of ``model`` with the planned weights structured, and a row for each weight.

    A plan names weights as the state dict does: of ``nn.Linear``, ``nn.Embedding``, ``nn.LSTM``
    and ``nn.GRU``. With ``project`` a weight becomes the nearest member of its family, else it is
    drawn anew; biases and what the plan does not name keep their values. Raises PlanError where
    the plan names no such weight, or a form does not fit it.
    """
    model = copy.deepcopy(model)
    work = _Conversion(model, plan if isinstance(plan, Plan) else Plan(plan), project)
    for name, module in list(model.named_modules()):
        if isinstance(module, KINDS):
            new = work.replacement(name, module)
            if new is not None:
                model = _put(model, name, new.train(module.training))
    if unknown := set(work.plan) - {row.layer for row in work.rows}:
        known = ", ".join(row.layer for row in work.rows)
        raise PlanError(f"convert: no layer is called {sorted(unknown)}; the layers are: {known}")
    return model, work.rows


def _put(model: nn.Module, name: str, new: nn.Module) -> nn.Module:
    if not name:
        return new
    parent, _, leaf = name.rpartition(".")
    setattr(model.get_submodule(parent), leaf, new)
    return model


class _Conversion:
    """Makes the replacements and keeps a row for each weight."""

    def __init__(self, model: nn.Module, plan: Plan, project: bool) -> None:
        self.plan, self.project = plan, project
        self.rows: list[Converted] = []
        self.owners = Counter(id(p) for _, p in model.named_parameters(remove_duplicate=False))

    def replacement(self, name: str, module: nn.Module) -> nn.Module | None:
        """Return the structured layer, or None where the module stays."""
        at = f"{name}." if name else ""
        own = dict(module.named_parameters(recurse=False))
        weights = {at + n: p for n, p in own.items() if n.startswith("weight")}
        planned = [n for n in weights if n in self.plan]
        reason = self._refusal(module, weights) if planned else "not in the plan"
        if reason:
            asked = planned or weights
            for n, w in weights.items():
                why = reason if n in asked else "not in the plan"
                self.rows.append(Converted(n, "dense", w.numel(), reason=why))
            return None
        match module:
            case nn.Linear():
                return self._linear(at, module)
            case nn.Embedding():
                return self._embedding(at, module)
            case nn.LSTM():
                return self._recurrent(at, module, StructuredLSTM)
            case _:
                return self._recurrent(at, module, StructuredGRU)

    def _refusal(self, module: Any, weights: Mapping[str, Tensor]) -> str:
        """Return why a module that is planned must stay as it is, or nothing."""
        if type(module) not in KINDS:
            return f"a {type(module).__name__}: whoever owns it may read its weight directly"
        if any(self.owners[id(w)] > 1 for w in weights.values()):
            return "its weight belongs to another layer too"
        if isinstance(module, nn.Embedding):
            if module.padding_idx is not None or module.max_norm is not None:
                return "an embedding with padding_idx or max_norm"
        if isinstance(module, nn.LSTM | nn.GRU) and (module.bidirectional or module.proj_size):
            return "bidirectional, or with a projection of its state"
        return ""

    def _operator(self, name: str, weight: Tensor, gain: float = DENSE_GAIN) -> Op:
        """Return the operator of a weight (n_out, n_in) and write its row."""
        form, array = self.plan.lookup(name), to_array(weight).T
        if form is None:
            self.rows.append(Converted(name, "dense", weight.numel(), reason="not in the plan"))
            return Dense(array)
        error = None
        if self.project:
            fit = apply_layer(form, array)
            op, error = fit.op, fit.error
        else:
            fresh = StructuredOperator(zero_operator(*array.shape, form))
            initialise(fresh, gain)
            op = fresh.operator()
        self.rows.append(Converted(name, form.family, op.params, error))
        return op

    def _linear(self, at: str, module: nn.Linear) -> StructuredLinear:
        op = self._operator(f"{at}weight", module.weight)
        bias = dict(module.named_parameters()).get("bias")
        return StructuredLinear(op, False if bias is None else to_array(bias))

    def _embedding(self, at: str, module: nn.Embedding) -> StructuredEmbedding:
        name = f"{at}weight"
        form, array, error = self.plan[name], to_array(module.weight), None
        if form.family not in TABLE_FAMILIES:
            known = ", ".join(TABLE_FAMILIES)
            raise PlanError(f"convert: {name} is a table: {form.family} is none of {known}")
        if self.project:
            table, fit = apply_table(form, array)
            layer, error = StructuredEmbedding(table), fit.error
        else:
            layer = StructuredEmbedding(_zero_table(form, *array.shape))
            layer.initialise()
        params = sum(p.numel() for p in layer.parameters())
        self.rows.append(Converted(name, form.family, params, error))
        return layer

    def _recurrent(
        self, at: str, module: nn.LSTM | nn.GRU, kind: type[StructuredRecurrent]
    ) -> StructuredRecurrent:
        layers = []
        for k in range(module.num_layers):
            ih, hh = (getattr(module, f"weight_{part}_l{k}") for part in ("ih", "hh"))
            gain = ih.shape[1] / (3 * module.hidden_size)
            matrices = (
                self._operator(f"{at}weight_ih_l{k}", ih, gain),
                self._operator(f"{at}weight_hh_l{k}", hh),
            )
            biases: list[Array | None] = [None, None]
            if module.bias:
                biases = [to_array(getattr(module, f"bias_{part}_l{k}")) for part in ("ih", "hh")]
            layers.append(Recurrent(Cell(kind.kind), *matrices, *biases))
        return kind(layers, dropout=module.dropout, batch_first=module.batch_first)


def _zero_table(form: LayerPlan, vocabulary: int, dimension: int) -> Word2KetXS:
    try:
        if form.family == "kronecker":
            r = form.parameters["r"]
            shapes = factor_shapes(vocabulary, dimension, **form.parameters)
            factors = [zeros(r, *shape) for shape in shapes]
        else:
            sizes = {k: v for k, v in form.parameters.items() if k != "sweeps"}
            factors = zero_factors(vocabulary, dimension, **sizes)
    except ValueError as error:
        raise PlanError(f"plan, layer {form.layer!r}: {error}") from error
    return Word2KetXS(tuple(factors), vocabulary, dimension)
