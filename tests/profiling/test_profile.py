"""Profiles of a small model: what they hold, how they are written, what is refused."""

import csv
import io
import json
import math

import numpy as np
import pytest
from onnx import TensorProto, helper, numpy_helper

import tvmstruct
from tvmstruct.errors import InputError, ProfilingError
from tvmstruct.models import config
from tvmstruct.profiling import events
from tvmstruct.profiling.result import Profile, to_csv
from tvmstruct.profiling.run import make_rows
from tvmstruct.profiling.steps import Step

BERT = config("bert", layers=1, seq=16, hidden=64, heads=4, ffn=128, vocabulary=100)


@pytest.fixture(scope="module")
def model():
    source = tvmstruct.models.source(BERT)
    compiled = tvmstruct.compile(source, buckets="exact", threads=1)
    compiled.compile_bucket(BERT.shapes())
    return compiled


@pytest.fixture
def profile(model):
    return tvmstruct.profile(model, runs=3)


def small_model(weight):
    """Return ``tanh(x @ weight) + x`` as ONNX, for x of (batch, 8)."""
    nodes = [
        helper.make_node("MatMul", ["x", "w"], ["h"]),
        helper.make_node("Tanh", ["h"], ["t"]),
        helper.make_node("Sub", ["t", "x"], ["y"]),
    ]
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", 8])
    y = helper.make_tensor_value_info("y", TensorProto.FLOAT, ["batch", 8])
    arrays = [numpy_helper.from_array(weight.astype(np.float32), "w")]
    graph = helper.make_graph(nodes, "small", [x], [y], arrays)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


def test_rows_of_a_bert(profile):
    names = ["embedding (fused)", "Q/K/V-Gen", "attention (fused)", "attention FC"]
    names += ["linear 1", "activation", "linear 2", "LayerNorm", "other"]
    assert [row.name for row in profile.rows] == names
    assert profile.shapes == BERT.shapes()
    assert profile.runs == 3
    linear = profile.row("linear 1")
    assert linear.calls == 1
    assert linear.gflops == pytest.approx(2 * 16 * 64 * 128 / linear.seconds / 1e9)
    assert linear.bytes == 4 * (16 * 64 + 64 * 128 + 128 + 16 * 128)


def test_limits_of_this_machine(fixed_limits):
    peak, bandwidth = fixed_limits(tvmstruct.resolve_target("host"), 1, 1 << 14)
    assert peak > 0
    assert bandwidth > 0


def test_shares_sum_to_1(profile):
    assert sum(row.share for row in profile.rows) == pytest.approx(1)
    assert profile.overhead == pytest.approx(profile.seconds - profile.kernel_seconds)


def test_roofline_by_hand():
    """The first step is bound by 40 us of arithmetic, the second by 60 us of reading."""
    steps = [
        Step("tvmstruct_a", None, (None,), 1, flops=4e6, bytes=1000),
        Step("tvmstruct_b", None, (None,), 1, flops=100, bytes=600_000),
    ]
    (row,) = make_rows(steps, [80e-6, 120e-6], (100.0, 10.0), {"cycles": np.array([1.0, 2.0])})
    assert row.percent_of_roofline == pytest.approx(50)
    assert row.intensity == pytest.approx(4_000_100 / 601_000)
    assert row.events == {"cycles": 3.0}


def test_a_renamed_tensor_is_no_call():
    steps = [Step("reshape", None, (None,), 1, flops=0, bytes=64)] * 2
    (row,) = make_rows(steps, [math.nan, 1e-6], (1.0, 1.0), {"cycles": np.array([math.nan, 5.0])})
    assert (row.calls, row.bytes, row.share, row.events["cycles"]) == (1, 64, 1.0, 5.0)


def test_json_round_trip(profile):
    assert Profile.from_json(profile.to_json()) == profile
    assert json.loads(profile.to_json())["overhead"] == profile.overhead


def test_csv_round_trip(profile):
    rows = list(csv.DictReader(io.StringIO(to_csv([profile, profile]))))
    assert len(rows) == 2 * len(profile.rows)
    assert [row["class"] for row in rows[: len(profile.rows)]] == [r.name for r in profile.rows]
    assert [float(row["seconds"]) for row in rows[: len(profile.rows)]] == [
        row.seconds for row in profile.rows
    ]


def test_table_in_80_columns(profile):
    from rich.console import Console

    text = io.StringIO()
    profile.show(Console(file=text, width=80))
    assert "Q/K/V-Gen" in text.getvalue()
    assert "VM, Python and instrumentation" in text.getvalue()
    assert "…" not in text.getvalue()


def test_denormals_are_counted_and_named():
    source = tvmstruct.from_onnx(small_model(np.eye(8) * 1e-39))
    with pytest.warns(RuntimeWarning, match=r"denormal numbers in the results of .*\bw\b"):
        found = tvmstruct.profile(source, {"x": (2, 8)}, runs=1, threads=1)
    assert found.denormals == {"w": 16}
    assert found.model == "small"
    assert any("denormal" in line for line in found.remarks())


def test_software_events_count_every_thread(model):
    try:
        found = tvmstruct.profile(model, mode="custom", events=["task-clock"], runs=1)
    except ProfilingError as error:
        pytest.skip(str(error))
    assert found.events == ("task-clock",)
    assert sum(row.events["task-clock"] for row in found.rows) > 0


@pytest.mark.parametrize("code", [1, 2, 13, 38])
def test_a_kernel_that_does_not_count(model, code, monkeypatch, tmp_path):
    level = tmp_path / "paranoid"
    level.write_text("7\n")
    monkeypatch.setattr(events, "PARANOID", level)
    monkeypatch.setattr(events.ctypes, "get_errno", lambda: code)
    monkeypatch.setattr(events.ctypes, "CDLL", lambda *_, **__: _Refusing())
    with pytest.raises(ProfilingError, match=r"perf_event_paranoid is 7.*--cachegrind"):
        tvmstruct.profile(model, mode="cachestat")


class _Refusing:
    def syscall(self, *_):
        return -1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"mode": "fast"}, r"mode='fast' is unknown; known: default, cachestat, custom"),
        ({"mode": "custom"}, r"needs events; known: cycles, instructions"),
        ({"events": ["cycles"]}, r"events are for mode 'custom'"),
        ({"mode": "custom", "events": ["cyles"]}, r"unknown event 'cyles'; known: cycles"),
        ({"runs": 0}, r"runs=0; want 1 or more"),
        ({"threads": 2}, r"threads=2 cannot change a compiled model"),
        ({"precision": "bf16"}, r"precision='bf16' cannot change a compiled model"),
    ],
    ids=str,
)
def test_options_that_do_not_fit(model, options, message):
    with pytest.raises(InputError, match=message):
        tvmstruct.profile(model, **options)


def test_a_loaded_model_has_no_graph(model, tmp_path):
    model.save(tmp_path / "model.tvms")
    with pytest.raises(InputError, match="no graph"):
        tvmstruct.profile(tvmstruct.load(tmp_path / "model.tvms"))
