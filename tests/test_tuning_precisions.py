"""Tuning of kernels other than f32 dense: true dtypes, records that compile finds again."""

from __future__ import annotations

import warnings

import numpy as np
import pytest
from tvm.s_tir import meta_schedule as ms

import tvmstruct
from tests import models
from tests.kernels import activate
from tests.low_precision import target
from tests.schedules.test_bf16_dense import rounded
from tests.schedules.test_int8_dense import reference
from tests.test_tuning import ROWS, SHAPES, K, N, one_layer
from tvmstruct import tuning, tuning_worker
from tvmstruct.database import Database, Record, Workload, machine
from tvmstruct.errors import InputError, TargetError
from tvmstruct.testing import tolerance

WORDS = ("float32", "int32", "float32")
QUANTIZED = ("float32", "int32", "int32", "float32", "float32")
AVX2 = tvmstruct.resolve_target({"kind": "llvm", "mcpu": "x86-64-v3", "num-cores": 2})
KERNELS = [  # precision, ISA, kernel, dtypes of its arguments
    pytest.param("bf16-weights", "avx2", "bf16_weight_dense", WORDS, marks=pytest.mark.isa("avx2")),
    pytest.param("bf16", "avx512", "bf16_dense", WORDS, marks=pytest.mark.isa("avx512bf16")),
    pytest.param("int8", "avx512", "int8_dense", QUANTIZED, marks=pytest.mark.isa("avx512vnni")),
]


class Runner:
    """Measures nothing: says that the first of a batch, the default, takes twice as long."""

    def __init__(self) -> None:
        self.dtypes: list[tuple[str, ...]] = []

    def run(self, inputs):
        """Return the results of a batch."""
        self.dtypes += [tuple(str(info.dtype) for info in i.args_info) for i in inputs]
        seconds = [2e-6, *[1e-6] * (len(inputs) - 1)]
        return [_Done(ms.runner.RunnerResult([s], None)) for s in seconds]


class BuilderHere:
    """Builds as `tuning.Builder` does, without processes that first have to import TVM."""

    def __init__(self, processes: int) -> None:
        assert processes >= 1

    def build(self, jobs):
        """Return the library's path and no error for each job."""
        return [(tuning_worker.build(job), "") for job in jobs]


class _Done:
    def __init__(self, found) -> None:
        self.result = lambda: found


def tune(folder, spec, source=None, shapes=SHAPES, **options):
    runner, source = Runner(), source or one_layer()[0]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tuning, "Builder", BuilderHere)
        report = tvmstruct.tune(
            source, spec, shapes=shapes, database=folder, runner=runner, progress=False, **options
        )
    return report, runner


def compiled(folder, spec, precision):
    """Return the symbols of a compiled layer and what it computes."""
    model = tvmstruct.compile(
        one_layer()[0], spec, database=folder, precision=precision, buckets=[{"batch": ROWS}]
    )
    x = models.rng(1).normal(size=(ROWS, K)).astype(np.float32)
    (bucket,) = model.buckets.values()
    return set(bucket.lowered.kernels), x, model(x)


@pytest.mark.parametrize(("precision", "isa", "kernel", "dtypes"), KERNELS)
def test_a_search_is_recorded_and_compile_uses_it(tmp_path, precision, isa, kernel, dtypes):
    spec, w = AVX2 if isa == "avx2" else target(isa), one_layer()[1]
    default, *_ = compiled(None, spec, precision)
    report, runner = tune(tmp_path, spec, precision=precision, trials=3)
    (row,) = report.rows
    assert (row.workload.kernel, row.workload.dtypes, row.trials) == (kernel, dtypes, 3)
    assert set(runner.dtypes) == {dtypes}
    found, x, y = compiled(tmp_path, spec, precision)
    assert found != default
    want = {
        "bf16-weights": lambda: x.astype(np.float64) @ rounded(w),
        "bf16": lambda: rounded(x) @ rounded(w),
        "int8": lambda: reference(x, w),
    }[precision]()
    np.testing.assert_allclose(y, want, **tolerance("float32", K))


@pytest.mark.slow
@pytest.mark.isa("avx2")
def test_a_record_of_another_precision_is_not_used(tmp_path):
    spec = AVX2
    choices = {"height": 3, "block": 6, "blocks_first": 0, "parallel": 0}
    for precision in ("f32", "bf16-weights"):
        report, _ = tune(tmp_path / precision, spec, precision=precision, trials=1)
        record = Record(report.rows[0].workload, choices, 1e-9, machine(), gain=9.0)
        Database(tmp_path / precision).append(record)
    for precision, other in (("f32", "bf16-weights"), ("bf16-weights", "f32")):
        default = compiled(None, spec, precision)[0]
        assert compiled(tmp_path / other, spec, precision)[0] == default
        assert compiled(tmp_path / precision, spec, precision)[0] != default


def test_the_dtypes_are_part_of_a_workload():
    mixed = Workload("int8_dense", "64 32 none", ((12, 32),) * 5, ",".join(QUANTIZED), "avx2", 2)
    assert mixed.dtypes == QUANTIZED
    same = Workload("packed_dense", "64 32 none", ((12, 32),) * 3, "float32", "avx2", 2)
    assert same.dtypes == ("float32",) * 3
    assert "float32_int32_int32_float32_float32" in mixed.file


@pytest.mark.parametrize("precision", ["bf16", pytest.param("int8", marks=pytest.mark.slow)])
def test_amx_is_tuned_for_another_machine(tmp_path, precision):
    spec = tvmstruct.resolve_target("llvm -mcpu=sapphirerapids")
    report, runner = tune(tmp_path, spec, precision=precision, trials=2)
    assert report.rows[0].workload.kernel == f"amx_{precision}_dense"
    assert set(runner.dtypes) == {WORDS if precision == "bf16" else QUANTIZED}


def test_a_search_really_measures_words(tmp_path, monkeypatch):
    for name, few in (("ROUNDS", 1), ("WINDOWS", 2), ("MAX_BUILDERS", 1)):
        monkeypatch.setattr(tuning, name, few)
    report = tvmstruct.tune(
        one_layer()[0],
        shapes=SHAPES,
        precision="bf16-weights",
        trials=2,
        database=tmp_path,
        progress=False,
    )
    (row,) = report.rows
    assert row.workload.dtypes == WORDS
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = Database(tmp_path).records(row.workload)
    assert {r.key for r in found if r.seconds} == {r.key for r in found}
    assert len({r.key for r in found}) == 3


def feed_forward_layer(hidden=128):
    """Return ``relu(x @ w1) @ w2`` as a source, and its weights."""
    w1, w2 = models.weight(K, hidden, seed=5), models.weight(hidden, N, seed=6)
    nodes = [
        models.helper.make_node("MatMul", ["x", "w1"], ["h"], name="up"),
        models.helper.make_node("Relu", ["h"], ["r"], name="relu"),
        models.helper.make_node("MatMul", ["r", "w2"], ["y"], name="down"),
    ]
    inputs, outputs = [models.value("x", ["batch", K])], [models.value("y", ["batch", N])]
    model = models.make_model(nodes, inputs, outputs, {"w1": w1, "w2": w2})
    return tvmstruct.from_onnx(model), w1, w2


@pytest.mark.isa("avx2")
def test_feed_forward_is_tuned_and_found(tmp_path):
    spec, rows = AVX2, 516
    source, w1, w2 = feed_forward_layer()
    report, _ = tune(tmp_path, spec, source, {"x": (rows, K)}, trials=2)
    assert [row.workload.kernel for row in report.rows] == ["feed_forward"]
    symbols = []
    for folder in (None, tmp_path):
        model = tvmstruct.compile(source, spec, database=folder, buckets=[{"batch": rows}])
        x = models.rng(1).normal(size=(rows, K)).astype(np.float32)
        want = activate("relu", x.astype(np.float64) @ w1) @ w2
        np.testing.assert_allclose(model(x), want, **tolerance("float32", 128))
        (bucket,) = model.buckets.values()
        symbols.append(set(bucket.lowered.kernels))
    assert symbols[0] != symbols[1]


@pytest.mark.parametrize("call", [tvmstruct.compile, tvmstruct.tune], ids=["compile", "tune"])
def test_wrong_precisions_say_the_same(call):
    source = one_layer()[0]
    with pytest.raises(InputError, match=r"precision='fp8' is unknown; known: f32, bf16"):
        call(source, precision="fp8")
    with pytest.raises(TargetError, match='precision="int8" needs avx512vnni or avxvnni'):
        call(source, "llvm -mcpu=x86-64", precision="int8")
