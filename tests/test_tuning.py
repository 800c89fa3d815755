"""Tuning: every choice computes the same, records survive kills and damage, compile uses them."""

from __future__ import annotations

import json
import os
import resource
import signal
import socket
import subprocess
import sys
import time
import warnings
from dataclasses import replace

import numpy as np
import pytest

import tvmstruct
from tests import models
from tests.kernels import build, call, every_isa, finish, random_picks
from tvmstruct import cli, database, tuning
from tvmstruct.database import Database, Record, TuningWarning, Workload, recorded
from tvmstruct.errors import TargetError, TuningError
from tvmstruct.schedules.compute.dense import Epilogue, pack
from tvmstruct.schedules.x86 import X86Kernels
from tvmstruct.schedules.x86.packed_dense import choose_nest
from tvmstruct.targets import ISAS
from tvmstruct.testing import tolerance

ROWS, K, N = 12, 32, 64
SHAPES = {"x": (ROWS, K)}
TRIALS = 4


def one_layer():
    """Return ``x @ w`` as a source, and w."""
    w = models.weight(K, N, seed=3)
    nodes = [models.helper.make_node("MatMul", ["x", "w"], ["y"], name="only")]
    inputs, outputs = [models.value("x", ["batch", K])], [models.value("y", ["batch", N])]
    return tvmstruct.from_onnx(models.make_model(nodes, inputs, outputs, {"w": w})), w


def tune(folder, **options):
    return tvmstruct.tune(one_layer()[0], shapes=SHAPES, database=folder, progress=False, **options)


def workload():
    spec = tvmstruct.resolve_target("host")
    kernels = X86Kernels(spec.isa, spec.threads)
    shapes = ((ROWS, K), (-(-N // kernels.panel_width), K, kernels.panel_width), (ROWS, N))
    kernel = kernels.packed_dense(N, K, Epilogue(), ROWS)
    return Workload.of(kernel, shapes, ["float32"] * 3, spec)


def record(seconds=1e-6, choices=None, **changes):
    return replace(Record(workload(), choices, seconds, database.machine()), **changes)


@pytest.fixture(scope="module")
def tuned(tmp_path_factory):
    """Return a folder and the report of a real, short search."""
    folder = tmp_path_factory.mktemp("tuned")
    with pytest.MonkeyPatch.context() as patch:
        for name, few in (("ROUNDS", 2), ("WINDOWS", 3), ("MAX_BUILDERS", 1)):
            patch.setattr(tuning, name, few)
        return folder, tune(folder, trials=TRIALS)


# choices


@every_isa
@pytest.mark.parametrize(
    ("rows", "n", "k", "epilogue"),
    [
        (24, 96, 128, Epilogue(True, "gelu", True)),
        (17, 70, 33, Epilogue()),
        (1, 100, 256, Epilogue(bias=True)),
        (12, 64, 1, Epilogue()),
    ],
    ids=str,
)
def test_every_choice_computes_the_same(isa, rows, n, k, epilogue, rng):
    kernels = X86Kernels(isa)
    space = kernels.packed_dense(n, k, epilogue, rows).space
    x, w = rng.normal(size=(rows, k)), rng.normal(size=(k, n)) / np.sqrt(k)
    x, w = x.astype(np.float32), w.astype(np.float32)
    bias, residual = rng.normal(size=n), rng.normal(size=(rows, n))

    picks = random_picks(rng, 5)
    library = build(isa, {f"k{i}": space.build(rows, p) for i, p in enumerate(picks)})
    arrays = [x, pack(w, kernels.panel_width)]
    arrays += [bias] * epilogue.bias + [residual] * epilogue.residual
    want = finish(x.astype(np.float64) @ w, epilogue, bias, residual)
    for i in range(len(picks)):
        found = call(library[f"k{i}"], arrays, rows, n)
        np.testing.assert_allclose(found, want, **tolerance("float32", k))


# a search, and what compile does with it


def test_a_search_measures_default_and_distinct_choices(tuned):
    folder, report = tuned
    (row,) = report.rows
    assert (row.trials, row.new_trials, row.calls) == (TRIALS, TRIALS, 1)
    assert row.default_seconds > 0
    assert row.best_seconds > 0
    (path,) = folder.iterdir()
    assert path.name == workload().file
    found = Database(folder).records(workload())
    assert len({r.key for r in found}) == TRIALS + 1
    assert json.loads(report.to_json())["rows"][0]["gain"] > 0


def test_a_second_search_goes_on_where_the_first_stopped(tuned):
    folder, _ = tuned
    before = len(Database(folder).records(workload()))
    (row,) = tune(folder, trials=TRIALS).rows
    assert (row.trials, row.new_trials) == (TRIALS, 0)
    assert len(Database(folder).records(workload())) == before


def compiled_symbols(folder, rows):
    source, w = one_layer()
    model = tvmstruct.compile(source, database=folder, buckets=[{"batch": rows}])
    x = models.rng(1).normal(size=(rows, K)).astype(np.float32)
    np.testing.assert_allclose(model(x), x @ w, **tolerance("float32", K))
    (bucket,) = model.buckets.values()
    (layer,) = model.report().layers
    symbols = set(bucket.lowered.kernels)
    spec = tvmstruct.resolve_target("host")
    default = X86Kernels(spec.isa, spec.threads).packed_dense(N, K, Epilogue(), rows)
    assert (f"tuned for {rows} rows" in layer.reason) == (symbols != {default.symbol})
    return symbols


def test_compile_uses_the_best_record_for_exactly_its_rows(tmp_path):
    folder = Database(tmp_path)
    default = compiled_symbols(None, ROWS)
    choices = {"height": 5, "block": 6, "depth": 32, "blocks_first": 1, "parallel": 0}
    folder.append(record(2e-6))
    folder.append(record(3e-6, choices | {"unroll": 4}))
    assert compiled_symbols(tmp_path, ROWS) == default, "the default is the fastest record"
    folder.append(record(1e-6, choices | {"unroll": 2}))
    assert compiled_symbols(tmp_path, ROWS) != default
    folder.append(record(1e-6, choices | {"unroll": 2}, gain=0.9))
    assert compiled_symbols(tmp_path, ROWS) == default, "measured in turns, the default won"
    folder.append(record(3e-6, choices | {"unroll": 4}, gain=1.2))
    assert compiled_symbols(tmp_path, ROWS) != default
    assert compiled_symbols(tmp_path, ROWS + 1) == compiled_symbols(None, ROWS + 1)


def test_records_of_this_machine_come_before_those_of_others(tmp_path):
    folder, here = Database(tmp_path), database.machine()
    folder.append(record(1e-6, machine="other"))
    folder.append(record(1e-9, {"height": 3}, machine="other"))
    assert folder.best(workload(), here).choices == {"height": 3}
    folder.append(record(1e-6))
    folder.append(record(9e-7, {"height": 4}))
    assert folder.best(workload(), here).choices == {"height": 4}


def test_a_choice_that_is_no_option_is_named_and_the_default_used(tmp_path):
    Database(tmp_path).append(record(1e-6, {"height": 1000}))
    with pytest.warns(TuningWarning, match="height=1000 is no option"):
        assert compiled_symbols(tmp_path, ROWS) == compiled_symbols(None, ROWS)


# records that are damaged, foreign, interrupted, or find no room


def damage(path):
    lines = path.read_bytes().splitlines(keepends=True)
    foreign = json.loads(lines[0])
    foreign["record"]["versions"]["apache-tvm"] = "0.1"
    foreign["checksum"] = database._checksum(foreign["record"])
    wrong = lines[0].replace(b"1e-06", b"1e-09")
    with path.open("ab") as file:
        file.write(b"\x00\xff garbage\n[1, 2]\n{}\nnull\n" + b"[" * 100_000 + b"\n")
        file.write(json.dumps(foreign).encode() + b"\n" + wrong + lines[0][:40])


def test_damaged_and_foreign_lines_are_named_once_and_left_alone(tmp_path):
    folder, path = Database(tmp_path), tmp_path / workload().file
    folder.append(record())
    damage(path)
    before = path.read_bytes()
    folder.append(record(2e-6, {"height": 3}))
    assert path.read_bytes().startswith(before + b"\n")
    with pytest.warns(TuningWarning, match=rf"{path.name}: skipped line 2 .* and 5 more") as seen:
        assert [r.seconds for r in folder.records(workload())] == [1e-6, 2e-6]
    assert len(seen) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert len(folder.records(workload())) == 2


@pytest.mark.parametrize("seconds", [-1.0, 0.0, float("inf"), float("nan"), "fast"])
def test_times_that_cannot_be_are_refused(tmp_path, seconds):
    folder = Database(tmp_path)
    folder.append(record(seconds))
    with pytest.warns(TuningWarning, match="has seconds"):
        assert folder.records(workload()) == []


KILLED = """
import sys
from tests import test_tuning
test_tuning.tune(sys.argv[1], trials=200)
"""


@pytest.mark.slow
def test_a_killed_search_loses_nothing_and_resumes(tmp_path):
    process = subprocess.Popen(
        [sys.executable, "-c", KILLED, tmp_path], stderr=subprocess.DEVNULL, process_group=0
    )
    path, deadline = tmp_path / workload().file, time.monotonic() + 120
    while not (path.exists() and path.read_bytes().count(b"\n") >= 3):
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.02)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = Database(tmp_path).records(workload())
    assert len(found) >= 3
    known = len({r.key for r in found} - {None})
    (row,) = tune(tmp_path, trials=known + 1).rows
    assert (row.trials, row.new_trials) == (known + 1, 1)
    assert path.read_bytes().count(b"\n") > len(found)


def test_a_full_disk_is_an_error_and_earlier_records_are_intact(tmp_path):
    folder, path = Database(tmp_path), tmp_path / workload().file
    folder.append(record())
    before = path.read_bytes()
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(before) + 50, hard))
    try:
        with pytest.raises(TuningError, match=r"cannot be written: .*earlier records are intact"):
            folder.append(record(2e-6))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert path.read_bytes() == before
    folder.append(record(2e-6))
    assert [r.seconds for r in folder.records(workload())] == [1e-6, 2e-6]


def test_a_database_that_is_no_folder(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(TuningError, match="file cannot be written"):
        tune(tmp_path / "file", trials=1)
    with pytest.raises(TuningError, match=r"there is no such folder; tvmstruct\.tune writes one"):
        tvmstruct.compile(one_layer()[0], database=tmp_path / "missing")


# wrong wishes


@pytest.mark.parametrize("trials", [0, -3, 2.5, True])
def test_trials_are_checked(tmp_path, trials):
    with pytest.raises(TuningError, match=f"trials={trials!r}; want a whole number"):
        tune(tmp_path / "new", trials=trials)
    assert not (tmp_path / "new").exists()


def test_a_target_that_this_machine_cannot_run_needs_rpc(tmp_path, monkeypatch):
    monkeypatch.setattr(tuning, "host_features", lambda: frozenset({"64bit", "sse2"}))
    with pytest.raises(TargetError, match=r"avx2.* this CPU does not have; measure on a machine"):
        tune(tmp_path, trials=1, target="llvm -mcpu=x86-64-v3")


def test_a_tracker_that_does_not_answer_is_named(tmp_path):
    pytest.importorskip("tornado", reason="RPC needs tornado")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
        with pytest.raises(TuningError, match=rf"tracker 127\.0\.0\.1:{port} cannot be reached"):
            tune(tmp_path, trials=1, rpc=("127.0.0.1", port, "key"))


def test_a_port_that_is_mute_is_named(tmp_path, monkeypatch):
    pytest.importorskip("tornado", reason="RPC needs tornado")
    monkeypatch.setattr(tuning, "PATIENCE", 0.2)
    with socket.create_server(("127.0.0.1", 0)) as mute:
        address = mute.getsockname()
        with pytest.raises(TuningError, match=rf":{address[1]} cannot be reached \(timed out\)"):
            tune(tmp_path, trials=1, rpc=(*address, "key"))


@pytest.mark.slow
def test_tuning_over_a_tracker(tmp_path):
    pytest.importorskip("tornado", reason="RPC needs tornado")
    from tvm.rpc.server import Server
    from tvm.rpc.tracker import Tracker

    loopback = "127.0.0.1"
    tracker = Tracker(loopback, port=9190, port_end=9990, silent=True)
    server = None
    try:
        with pytest.raises(TuningError, match="has no server with the key 'x86'"):
            tune(tmp_path, trials=1, rpc=(loopback, tracker.port, "x86"))
        address = (loopback, tracker.port)
        server = Server(
            loopback, port=9190, port_end=9990, tracker_addr=address, key="x86", silent=True
        )
        (row,) = tune(tmp_path, trials=2, rpc=(loopback, tracker.port, "x86")).rows
        assert row.new_trials == 2
        assert row.best_seconds is not None
        assert {r.machine for r in Database(tmp_path).records(workload())} == {"rpc x86"}
    finally:
        if server is not None:
            server.terminate()
        tracker.terminate()


# the command line


TRACKERS = ("--rpc-tracker here:1", "--rpc-key x", "--rpc-tracker 1 --rpc-key x")


@pytest.mark.parametrize("text", TRACKERS)
def test_tracker_and_key_come_together(tmp_path, text, capsys):
    path = tmp_path / "model.onnx"
    path.write_bytes(models.dense_model().SerializeToString())
    with pytest.raises(SystemExit) as stop:
        cli.main(["tune", str(path), *text.split()])
    assert stop.value.code == cli.MISUSED
    assert "--rpc-tracker HOST:PORT and --rpc-key KEY" in " ".join(capsys.readouterr().err.split())


def test_the_command_tunes(tmp_path, monkeypatch, capsys):
    path, seen = tmp_path / "model.onnx", {}
    path.write_bytes(models.dense_model().SerializeToString())

    def fake(source, target, **options):
        seen.update(options)
        return tuning.TuneReport((), ("chain",), "db", 1.0)

    monkeypatch.setattr(tvmstruct, "tune", fake, raising=False)
    words = "--shape x=8x24 --precision bf16 --trials 7 --database db"
    words += " --rpc-tracker far:9190 --rpc-key x86"
    with pytest.raises(SystemExit) as stop:
        cli.main(["tune", str(path), *words.split()])
    assert stop.value.code == 0
    assert seen["shapes"] == [{"x": (8, 24)}]
    assert (seen["trials"], seen["rpc"]) == (7, ("far", 9190, "x86"))
    assert seen["precision"] == "bf16"
    out = capsys.readouterr().out
    assert "no choices to tune: chain" in out
    assert "compile(..., precision='bf16', database='db')" in out


# what is shipped


def test_shipped_records_are_valid_here():
    paths = sorted(database.SHIPPED.glob("*.jsonl"))
    assert paths
    shipped = Database(database.SHIPPED)
    for path in paths:
        lines = path.read_bytes().splitlines()
        fields = json.loads(lines[0])["record"]["workload"]
        what = Workload(**fields | {"shapes": tuple(map(tuple, fields["shapes"]))})
        assert path.name == what.file
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert len(shipped.records(what)) == len(lines)
        best = shipped.best(what, "no such machine")
        isa = next(isa for isa in ISAS if isa.name == what.isa)
        (_, k), (_, n) = what.shapes[0], what.shapes[-1]
        if best is not None:
            choose_nest(isa, (what.rows, n, k), recorded(best.choices or {}, what))
