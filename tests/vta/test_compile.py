"""``compile(target="vta")`` with numpy in the place of VTA: calibration, reports, errors."""

import gc

import numpy as np
import pytest
import tvm_ffi

import tvmstruct
from tests import models
from tests.relax_modules import R, const, module
from tests.vta import numpy_vta
from tests.vta.numpy_vta import target
from tvmstruct.errors import InputError, TargetError
from tvmstruct.vta import simulated_kernel, sites
from tvmstruct.vta.calibration import Calibration, Samples
from tvmstruct.vta.scales import Options


@pytest.fixture(autouse=True, scope="module")
def in_numpy():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(simulated_kernel, "simulate", numpy_vta.simulate)
        yield


def encoder_batch(rows: int, length: int, seed: int = 0) -> dict[str, np.ndarray]:
    ids = np.random.default_rng(seed).integers(0, 50, (rows, length))
    return {"input_ids": ids, "attention_mask": np.ones_like(ids)}


def cosine(a, b) -> float:
    a, b = np.ravel(a).astype(float), np.ravel(b).astype(float)
    return float(a @ b / np.linalg.norm(a) / np.linalg.norm(b))


@pytest.fixture(scope="module")
def mlp():
    source = tvmstruct.from_onnx(models.dense_model())
    x = models.rng(1).normal(size=(200, 24)).astype(np.float32)
    return tvmstruct.compile(source, target(), calibration=x), tvmstruct.compile(source)


@pytest.fixture(scope="module")
def encoder():
    source = tvmstruct.from_onnx(models.encoder_model())
    batches = [encoder_batch(2, 9, seed) for seed in range(3)]
    return tvmstruct.compile(source, target(), calibration=batches), tvmstruct.compile(source)


def test_an_mlp_is_wholly_on_vta(mlp):
    model, exact = mlp
    x = models.rng(2).normal(size=(7, 24)).astype(np.float32)
    assert cosine(model(x), exact(x)) > 0.999
    assert model.run({"x": x})["y"].shape == (7, 12)
    np.testing.assert_array_equal(model(x), model(x))
    up, down = model.report().layers
    for record in (up, down):
        assert record.form == "dense vta"
        assert record.reason.startswith("int8 on VTA: 2 launches, ")
        assert 0.005 < record.error < 0.03
    assert "; scale of x 0.0" in up.reason
    assert "; y stays int8" in up.reason
    assert "; x is int8 already; of y 0.0" in down.reason
    assert up.error < down.error
    (bucket,) = [b for key, b in model.buckets.items() if key == ((7, 24),)]
    assert len(bucket.sites) == 1


def test_int8_against_float_is_in_the_report(mlp):
    (note,) = mlp[0].notes
    assert note.startswith("int8 against float on 1 calibration batch: cosine 0.999")
    notes = mlp[0].report().notes
    assert notes[0] == note
    assert any(n.startswith("VTA in the last: 2 launches, ") for n in notes)


def test_an_encoder_says_what_stays_on_the_cpu(encoder):
    model, exact = encoder
    batch = encoder_batch(3, 13, seed=5)
    for name, want in exact.run(batch).items():
        assert cosine(model.run(batch)[name], want) > 0.99
    reasons = {r.name: r.reason for r in model.report().layers}
    assert "int8 on VTA" in reasons["query.weight"]
    assert "on the CPU: VTA has no exponential" in reasons["attention.0"]
    assert "on the CPU: VTA gathers no rows" in reasons["words.weight"]


def test_lengths_are_padded_where_the_float_model_allows_it(encoder):
    model, _ = encoder
    model.run(encoder_batch(2, 11))
    assert any("length: padded" in note or "padded (a probe" in note for note in model.padder.notes)


def test_a_layer_that_does_not_fit_stays_on_the_cpu():
    source = tvmstruct.from_onnx(models.dense_model())
    x = models.rng(1).normal(size=(64, 24)).astype(np.float32)
    model = tvmstruct.compile(source, target(most=12), calibration=x)
    up, down = model.report().layers
    assert up.reason.startswith("on the CPU: 40 features do not fit; ")
    assert (up.form, down.form) == ("dense", "dense vta")
    assert cosine(model(x), tvmstruct.compile(source)(x)) > 0.999


def test_structured_layers_run_factor_by_factor():
    source = tvmstruct.from_onnx(models.dense_model())
    x = models.rng(1).normal(size=(64, 24)).astype(np.float32)
    plan = tvmstruct.Plan({"layer.0.weight": tvmstruct.LayerPlan("monarch", {"b": 4})})
    model = tvmstruct.compile(source, target(), plan=plan, calibration=x)
    exact = tvmstruct.compile(source, plan=plan)
    assert cosine(model(x), exact(x)) > 0.999
    first = model.report().layers[0]
    assert first.form.endswith(" vta")
    assert first.reason.startswith("int8 on VTA: 3 launches, ")


def test_sites_go_with_the_model():
    def body(emit, x):
        return emit(R.matmul(x, const(models.weight(8, 4))))

    x = models.rng().normal(size=(5, 8)).astype(np.float32)
    model = tvmstruct.compile(module(body, (5, 8)), target(), calibration=x)
    again = tvmstruct.compile(module(body, (5, 8)), target(), calibration=x)
    (bucket,), (other,) = model.buckets.values(), again.buckets.values()
    assert bucket.sites[0] is other.sites[0]  # equal sites are one
    symbol = bucket.sites[0].symbol
    del model, bucket
    gc.collect()
    np.testing.assert_array_equal(again(x), again(x))
    del again, other
    gc.collect()
    assert tvm_ffi.get_global_func(symbol, allow_missing=True) is None
    assert not [s for s in sites._LIVE if s == symbol]


def test_values_that_int8_cannot_hold_are_named(mlp):
    x = np.ones((3, 24), np.float32)
    x[1, 2] = np.nan
    with pytest.raises(InputError, match=r"the input of layer\.0\.weight.*has NaN"):
        mlp[0](x)
    with pytest.raises(InputError, match=r"calibration: the input of layer\.0\.weight"):
        tvmstruct.compile(tvmstruct.from_onnx(models.dense_model()), target(), calibration=x)
    assert np.isfinite(mlp[0](np.ones((3, 24), np.float32))).all()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, r"pass calibration=a list of what the model is called with"),
        ({"calibration": []}, "calibration has no batches"),
        ({"calibration": 3}, "calibration is a int; want a list"),
        ({"calibration": ["x"]}, "a batch is a str"),
        ({"calibration": {"z": np.ones((2, 24), np.float32)}}, "unknown input 'z'"),
        ({"calibration": np.ones((2, 25), np.float32)}, "is 25 but must be 24"),
        ({"calibration": np.ones((2, 24), np.float32), "precision": "bf16"}, 'precision="bf16"'),
        ({"calibration": np.ones((2, 24), np.float32), "memory": "minimal"}, 'memory="minimal"'),
    ],
)
def test_what_vta_cannot_be_asked_for(options, message):
    source = tvmstruct.from_onnx(models.dense_model())
    with pytest.raises(InputError, match=message):
        tvmstruct.compile(source, "vta", **options)


def test_calibration_is_refused_without_vta():
    source = tvmstruct.from_onnx(models.dense_model())
    with pytest.raises(InputError, match='calibration is for target="vta"'):
        tvmstruct.compile(source, calibration=np.ones((2, 24), np.float32))


def test_ways_to_give_batches():
    a = np.ones((2, 3), np.float32)
    for given in (a, [a], {"x": a}, [{"x": a}], iter([(a,)]), Calibration((a,), Options("minmax"))):
        assert len(Calibration.of(given).batches) == 1
    with pytest.raises(InputError, match="rows=0"):
        Calibration((a,), rows=0)


def test_public_names():
    assert tvmstruct.vta.Calibration is Calibration
    for name in tvmstruct.vta.__all__:
        assert getattr(tvmstruct.vta, name).__name__ == name
    with pytest.raises(AttributeError, match="no attribute 'simulat'"):
        tvmstruct.vta.simulat  # noqa: B018


def test_samples_are_drawn_from_all_rows():
    samples = Samples(100)
    for start in range(0, 10_000, 130):
        samples.add(np.arange(start, start + 130, dtype=np.float32)[:, None])
    rows = samples.array()[:, 0]
    assert rows.shape == (101,)
    assert rows[-1] == 10_000 // 130 * 130 + 129  # the largest
    assert 3500 < rows[:-1].mean() < 6500
    few = Samples(100)
    few.add(np.ones((3, 2), np.float32))
    assert few.array().shape == (4, 2)


def test_what_measures_a_cpu_refuses_vta(mlp):
    source = tvmstruct.from_onnx(models.dense_model())
    for model, options in ((source, {"target": "vta"}), (mlp[0], {})):
        with pytest.raises(TargetError, match="profile measures code on a CPU"):
            tvmstruct.profile(model, {"x": (2, 24)}, **options)
