"""Layers of PyTorch models become structured ones; what stays says why."""

from __future__ import annotations

import numpy as np
import pytest

from tvmstruct.errors import PlanError
from tvmstruct.families import FAMILIES
from tvmstruct.planning import LayerPlan, Plan
from tvmstruct.recurrent_forms import antman
from tvmstruct.testing import tolerance

pytest.importorskip("torch")

import torch
from torch import nn

from tvmstruct.training import (
    StructuredEmbedding,
    StructuredGRU,
    StructuredLinear,
    StructuredLSTM,
    convert,
    plan_recurrent,
)


class Tagger(nn.Module):
    """An embedding, an LSTM and two dense layers."""

    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(49, 25)
        self.lstm = nn.LSTM(25, 18, 2, dropout=0.25, batch_first=True)
        self.head = nn.Sequential(nn.Linear(18, 30), nn.Tanh(), nn.Linear(30, 7, bias=False))

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        y, _ = self.lstm(self.words(ids))
        return self.head(y)


@pytest.fixture
def tagger() -> Tagger:
    torch.manual_seed(0)
    return Tagger().eval()


FORMS = antman("lgp_shuffle", g_im=4, g_hm=3)
IDS = torch.randint(49, (3, 5), generator=torch.Generator().manual_seed(0))


def test_projected_layers_are_the_nearest_members(tagger: Tagger) -> None:
    plan = {"head.0.weight": LayerPlan("monarch", {"b": 3})} | plan_recurrent("lstm", 2, FORMS)
    student, rows = convert(tagger, plan)
    by_name = {row.layer: row for row in rows}
    weights = dict(tagger.named_parameters())
    for name, form in plan.items():
        w = weights[name].detach().numpy().T
        fit = FAMILIES[form.family].nearest(w, **form.parameters)
        row = by_name[name]
        assert (row.form, row.params, row.error) == (form.family, fit.op.params, fit.error)
    assert isinstance(student.lstm, StructuredLSTM)
    hidden = student.lstm.layers[1].hidden.operator()
    want = FAMILIES["lgp_shuffle"].nearest(weights["lstm.weight_hh_l1"].detach().numpy().T, g=3)
    assert np.array_equal(hidden.to_dense(), want.op.to_dense())
    assert (student.lstm.dropout.p, student.lstm.batch_first) == (0.25, True)
    assert student(IDS).shape == (3, 5, 7)
    assert not student.training


def test_exact_forms_keep_the_function(tagger: Tagger) -> None:
    plan = {
        "head.0.weight": LayerPlan("low_rank", {"r": 18}),
        "head.2.weight": LayerPlan("low_rank", {"r": 7}),
        "words.weight": LayerPlan("word2ket_xs", {"order": 2, "r": 40}),
        "lstm.weight_ih_l1": LayerPlan("low_rank", {"r": 18}),
    }
    student, rows = convert(tagger, plan)
    assert isinstance(student.words, StructuredEmbedding)
    assert all(row.error < 1e-5 for row in rows if row.error is not None)
    bound = tolerance("float32", 100, scale=10)
    got, want = student(IDS).detach().numpy(), tagger(IDS).detach().numpy()
    np.testing.assert_allclose(got, want, **bound)


def test_the_original_stays_and_shares_nothing(tagger: Tagger) -> None:
    before = {n: p.clone() for n, p in tagger.named_parameters()}
    student, _ = convert(tagger, {"head.0.weight": LayerPlan("low_rank", {"r": 3})})
    with torch.no_grad():
        for p in student.parameters():
            p.zero_()
    assert isinstance(tagger.head[0], nn.Linear)
    assert all(torch.equal(before[n], p) for n, p in tagger.named_parameters())


def test_without_projection_weights_are_drawn_anew_with_the_right_spread() -> None:
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(120, 200), nn.GRU(200, 90))
    plan = {"0.weight": LayerPlan("lgp_shuffle", {"g": 5})}
    plan |= plan_recurrent("1", 1, antman("low_rank_lgp", g_im=5, g_hm=3, r_im=2, r_hm=2))
    student, rows = convert(model, plan, project=False)
    assert all(row.error is None for row in rows)
    assert isinstance(student[1], StructuredGRU)
    assert torch.equal(student[0].bias, model[0].bias)  # biases keep their values
    cell = student[1].layers[0]
    for op, gain in (
        (student[0].operator(), 1 / 3),
        (cell.input.operator(), 200 / (3 * 90)),
        (cell.hidden.operator(), 1 / 3),
    ):
        assert (op.to_dense() ** 2).sum() / op.n_out == pytest.approx(gain, rel=0.2)


def test_every_weight_has_a_row_and_a_reason(tagger: Tagger) -> None:
    plan = {"lstm.weight_hh_l0": LayerPlan("low_rank", {"r": 3})}
    _, rows = convert(tagger, plan)
    weights = [n for n, _ in tagger.named_parameters() if "weight" in n]
    assert [row.layer for row in rows] == weights
    left = {row.layer: row.reason for row in rows if row.form == "dense"}
    assert set(left) == set(weights) - set(plan)
    assert set(left.values()) == {"not in the plan"}


def _tied() -> nn.Module:
    model = nn.Module()
    model.words, model.out = nn.Embedding(20, 8), nn.Linear(8, 20)
    model.out.weight = model.words.weight
    return model


@pytest.mark.parametrize(
    ("model", "name", "reason"),
    [
        (_tied(), "out.weight", "another layer too"),
        (nn.MultiheadAttention(8, 2), "out_proj.weight", "whoever owns it"),
        (nn.Embedding(20, 8, padding_idx=0), "weight", "padding_idx"),
        (nn.LSTM(8, 8, bidirectional=True), "weight_hh_l0", "bidirectional"),
        (nn.LSTM(8, 8, proj_size=4), "weight_hh_l0", "projection of its state"),
    ],
)
def test_what_cannot_be_replaced_stays_and_says_why(
    model: nn.Module, name: str, reason: str
) -> None:
    same, rows = convert(model, {name: LayerPlan("low_rank", {"r": 2})})
    assert type(same) is type(model)
    (row,) = [row for row in rows if row.layer == name]
    assert row.form == "dense"
    assert reason in row.reason


@pytest.mark.parametrize(
    ("plan", "project", "message"),
    [
        ({"head.1.weight": LayerPlan("low_rank", {"r": 2})}, True, "no layer is called"),
        ({"head.0.weight": LayerPlan("low_rank", {"r": 99})}, True, "head.0.weight.*r=99"),
        ({"lstm.weight_hh_l0": LayerPlan("lgp_shuffle", {"g": 99})}, False, "weight_hh_l0.*g=99"),
        ({"words.weight": LayerPlan("vvma", {"k": 4})}, True, "is a table"),
        ({"words.weight": LayerPlan("word2ket_xs", {"order": 9, "r": 1})}, False, "order=9"),
    ],
)
def test_plans_that_do_not_fit(tagger: Tagger, plan, project: bool, message: str) -> None:
    with pytest.raises(PlanError, match=message):
        convert(tagger, Plan(plan), project=project)


@pytest.mark.parametrize("family", ["kronecker", "word2ket_xs"])
def test_a_table_drawn_anew(tagger: Tagger, family: str) -> None:
    parameters = {"r": 2} | ({"order": 2} if family == "word2ket_xs" else {})
    plan = {"words.weight": LayerPlan(family, parameters)}
    student, rows = convert(tagger, plan, project=False)
    row = next(row for row in rows if row.layer == "words.weight")
    assert row.params == student.words.table().params
    assert student(IDS).shape == (3, 5, 7)


def test_a_model_that_is_one_layer() -> None:
    student, _ = convert(nn.Linear(6, 4), {"weight": LayerPlan("low_rank", {"r": 2})})
    assert isinstance(student, StructuredLinear)
