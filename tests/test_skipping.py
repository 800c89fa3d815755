"""``skip=``: what it takes and refuses."""

from __future__ import annotations

from functools import cache

import numpy as np
import pytest
from tvm import relax

import tvmstruct
from tests.attention_reference import as_rows, random_heads
from tvmstruct import models, skip_measure
from tvmstruct.errors import InputError
from tvmstruct.layers import Attention
from tvmstruct.skip_analysis import analyse
from tvmstruct.skipping import Skip

BERT = "bert?hidden=64&heads=4&ffn=96&layers=1&embeddings=false&seq=70"
SKIP = Skip(3)  # random weights make flat scores


@pytest.mark.parametrize(
    "value", [8, 8.0, np.float32(8), {"threshold": 8}, {"threshold": 8, "raw": False}, Skip(8)]
)
def test_one_skip_in_many_spellings(value):
    skip = Skip.of(value)
    assert skip == Skip(8)
    assert isinstance(skip, tvmstruct.Skip)
    assert isinstance(skip.threshold, float)


def test_none_is_none_and_raw_takes_any_number():
    assert Skip.of(None) is None
    assert Skip.of({"threshold": -2, "raw": True}) == Skip(-2.0, raw=True)
    assert str(Skip(8)) == "scores more than 8 below the maximum"
    assert "at most -2" in str(Skip(-2, raw=True))


def test_the_ratio_of_zeros_is_that_of_the_paper_unless_given():
    assert Skip.of(8).zero_ratio == 0.99
    assert Skip.of({"threshold": 8, "zero_ratio": 1}) == Skip(8, zero_ratio=1.0)
    assert "over 0.9 of the queries" in Skip(8, zero_ratio=0.9).unmade
    assert "no query weighs" in Skip(8, zero_ratio=1).unmade


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (0, "threshold is 0.0, want a positive distance .* raw=True"),
        (-1, "threshold is -1.0, want a positive"),
        (1e-60, "threshold is 1e-60, want a positive"),
        (float("inf"), "threshold is inf; want a finite"),
        (float("nan"), "threshold is nan; want a finite"),
        ({"threshold": 1e39, "raw": True}, r"threshold is 1e\+39; want a finite"),
        ({"threshold": "8"}, "threshold is '8'; want a number"),
        ({"threshold": True}, "threshold is True; want a number"),
        ({"threshold": 8, "raw": 1}, "raw is 1; want True or False"),
        ({"raw": True}, "skip={'raw': True}; want a number such as 8"),
        ({"threshold": 8, "zero_ratio": 1.01}, "zero_ratio is 1.01; want a share of the queries"),
        ({"threshold": 8, "zero_ratio": -0.1}, "zero_ratio is -0.1; want a share"),
        ({"threshold": 8, "zero_ratio": float("nan")}, "zero_ratio is nan; want a share"),
        ({"threshold": 8, "zero_ratio": True}, "zero_ratio is True; want a share"),
        ({"threshold": 8, "zero_ratio": "0.9"}, "zero_ratio is '0.9'; want a share"),
        ({"threshold": 8, "raws": True}, "skip={'threshold': 8, 'raws': True}; want a number"),
        (True, "skip=True; want a number"),
        ("8", "skip='8'; want a number"),
    ],
)
def test_what_is_no_skip_is_refused(value, message):
    with pytest.raises(InputError, match=message):
        Skip.of(value)


def test_a_memory_that_cannot_skip_is_refused():
    source = models.source(models.parse(BERT))
    with pytest.raises(InputError, match=r'memory="baseline" and skip=8: .*skip nothing; choose'):
        tvmstruct.compile(source, memory="baseline", skip=8)


@cache
def bert() -> tvmstruct.CompiledModel:
    return tvmstruct.compile(models.source(models.parse(BERT)), skip=SKIP)


def test_measuring_says_what_the_attention_of_a_bert_skips():
    model, inputs = bert(), models.parse(BERT).inputs(batch=2)
    (record,) = attention_records(model)
    assert f"skip: {SKIP}" in record.reason
    assert "heads side by side" in record.reason
    assert "zero" not in record.reason
    found = model.measure_skip(inputs, threads=3)
    assert list(found) == [record.name] == ["attention.0"]
    got = found["attention.0"]
    padded = 1 - inputs["attention_mask"].mean()
    assert padded <= got.zeros < 1
    assert 0 < got.executed <= 1
    assert 0 < got.error < 1
    assert got.threads == 3
    (record,) = attention_records(model)
    assert record.reason.endswith(f"; skip: {SKIP}; skip: {got}")


def attention_records(model: tvmstruct.CompiledModel):
    return [r for r in model.report().layers if r.form == "attention"]


def test_the_measured_operands_are_those_of_the_kernel(monkeypatch):
    model, inputs = bert(), models.parse(BERT).inputs(batch=2)
    seen = []

    def watch(q, k, v, **options):
        seen.append((q, k, v, options))
        return analyse(q, k, v, **options)

    monkeypatch.setattr(skip_measure, "analyse", watch)
    model.measure_skip(inputs)
    ((q, k, v, options),) = seen
    assert q.shape == k.shape == v.shape == (2, 4, 70, 16)
    assert options["threads"] == model.spec.threads
    assert options["skip"] == SKIP
    chunk, tile, group = (options[name] for name in ("chunk", "tile", "group"))
    assert min(chunk, tile, group) >= 1
    hidden = np.broadcast_to(options["mask"], (2, 4, 70, 70))[:, 0, 0] < -1e30
    np.testing.assert_array_equal(hidden, inputs["attention_mask"] == 0)


def test_operands_are_cut_out_of_rows():
    q, k, v = random_heads((2, 6, 3, 4), (2, 2, 5, 4), (2, 2, 5, 7))
    mask = np.zeros((2, 5), np.float32)
    rows = np.concatenate([np.full((10, 3), 9, np.float32), as_rows(k), as_rows(v)], axis=1)
    node = Attention(
        6, 4, 7, 3, 5, 0.5, (24, 0), (25, 3), (25, 11), mask="keys", mask_dims=("batch",),
        kv_heads=2,
    )  # fmt: skip
    out = np.empty((6, 42), np.float32)
    got = skip_measure.operands(node, [as_rows(q), rows, rows, mask, out])
    for a, b in zip(got, (q, k, v, mask[:, None, None]), strict=True):
        np.testing.assert_array_equal(a, b)


def test_what_cannot_be_measured_is_refused(tmp_path):
    inputs = models.parse(BERT).inputs()
    with pytest.raises(InputError, match=r"this model skips nothing; compile.*skip=8"):
        tvmstruct.compile(models.source(models.parse(BERT))).measure_skip(inputs)
    with pytest.raises(InputError, match="threads=0; want a positive number"):
        bert().measure_skip(inputs, threads=0)
    with pytest.raises(InputError, match="unknown input 'pixels'"):
        bert().measure_skip({"pixels": inputs["attention_mask"]})
    bert().save(tmp_path / "bert.tvms")
    with pytest.raises(InputError, match="a loaded model does not know its attention"):
        tvmstruct.load(tmp_path / "bert.tvms").measure_skip(inputs)


def test_a_model_without_attention_has_nothing_to_measure():
    x = relax.Var("x", relax.TensorType((2, 8), "float32"))
    builder = relax.BlockBuilder()
    with builder.function("main", [x]):
        builder.emit_func_output(builder.emit(relax.op.nn.relu(x)))
    model = tvmstruct.compile(builder.get(), skip=SKIP)
    with pytest.raises(InputError, match="no attention of this model is a kernel that skips"):
        model.measure_skip({"x": np.ones((2, 8), np.float32)})


def test_an_error_of_the_analysis_comes_out_as_it_is(monkeypatch):
    def fail(*operands, **options):
        raise InputError("queries on strike")

    monkeypatch.setattr(skip_measure, "analyse", fail)
    with pytest.raises(InputError, match="queries on strike"):
        bert().measure_skip(models.parse(BERT).inputs())
