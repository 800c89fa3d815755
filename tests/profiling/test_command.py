"""``tvmstruct profile``: files, JSON, and exit codes of refusals."""

import json
from types import SimpleNamespace

import pytest

from tvmstruct import cli, models
from tvmstruct.errors import MissingDependencyError
from tvmstruct.profiling import cachegrind, plots

TINY = "random:bert?layers=1&seq=4&hidden=32&heads=2&ffn=48&vocabulary=50"
NETWORK = "random:memory-network?keys=20&hidden=8&answers=4&hops=1"


@pytest.fixture
def call(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")

    def run(*arguments):
        with pytest.raises(SystemExit) as exit_info:
            cli.main(["profile", *map(str, arguments)])
        captured = capsys.readouterr()
        return SimpleNamespace(code=exit_info.value.code, out=captured.out, err=captured.err)

    return run


def test_files_and_json(call, tmp_path):
    pytest.importorskip("matplotlib")
    png, html, csv = (tmp_path / f"out.{kind}" for kind in ("png", "html", "csv"))
    files = ["--plot", png, "--html", html, "--csv", csv]
    result = call(TINY, "--shape", "input_ids=2x4", "--runs", 1, "--threads", 1, "--json", *files)
    assert result.code == 0
    (profile,) = json.loads(result.out)["profiles"]
    assert profile["shapes"]["attention_mask"] == [2, 4]
    assert profile["threads"] == 1
    assert png.read_bytes().startswith(b"\x89PNG")
    assert "<table>" in html.read_text()
    assert len(csv.read_text().splitlines()) == 1 + len(profile["rows"])


def test_table(call):
    result = call(NETWORK, "--runs", 1, "--threads", 1)
    assert result.code == 0
    assert "attention (fused)" in result.out
    assert "VM, Python and instrumentation" in result.out


def test_cachegrind_prints_what_it_counted(call, monkeypatch):
    def simulate(model, shapes, *, cache, precision, memory):
        assert isinstance(model, models.MemoryNetwork)
        assert (cache, precision, memory) == ("4MB", "f32", "auto")
        return cachegrind.Simulation("m", {"x": (1, 2)}, 4 << 20, 100, 50, 10, 5)

    monkeypatch.setattr(cachegrind, "simulate", simulate)
    result = call(NETWORK, "--cachegrind", "--cache", "4MB")
    assert result.code == 0
    assert "LL data misses (4 MB)" in result.out
    assert "10.00%" in result.out
    found = json.loads(call(NETWORK, "--cachegrind", "--cache", "4MB", "--json").out)
    assert found["lld_misses"] == 5


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--sweep", "heads"], "unknown axis 'heads'; known: seq, hidden, ffn"),
        (["--mode", "fast"], "mode='fast' is unknown; known: default, cachestat, custom"),
        (["--mode", "custom"], "needs events"),
        (["--mode", "custom", "--events", "misses"], "unknown event 'misses'; known: cycles"),
        (["--cachegrind", "--sweep", "seq"], "--cachegrind only counts"),
        (["--cachegrind", "--threads", "2"], "--cachegrind only counts"),
        (["--shape", "x=1", "--shape", "x=2"], "profile takes one shape"),
        (["--csv", "missing/out.csv"], "there is no folder missing"),
        (["--factor", "1"], "Invalid value for '--factor'"),
    ],
    ids=str,
)
def test_misuse(call, options, message):
    result = call(TINY, *options)
    assert result.code == 2
    assert message in " ".join(result.err.split())


def test_hidden_of_a_trained_model(call, tmp_path):
    path = tmp_path / "model.onnx"
    path.write_bytes(models.build(models.parse(TINY.removeprefix("random:"))).SerializeToString())
    result = call(path, "--sweep", "hidden")
    assert result.code == 2
    assert "hidden size is fixed by this model's weights" in " ".join(result.err.split())


def test_a_compiled_model(call, tmp_path):
    path = tmp_path / "model.tvms"
    path.write_bytes(b"")
    result = call(path)
    assert result.code == 2
    assert "compiled already" in result.err


def test_plots_without_matplotlib(call, monkeypatch, tmp_path):
    def missing():
        raise MissingDependencyError('plots need matplotlib: pip install "tvmstruct[plot]"')

    monkeypatch.setattr(plots, "check_matplotlib", missing)
    result = call(TINY, "--plot", tmp_path / "out.png")
    assert result.code == 1
    assert "tvmstruct[plot]" in result.err
