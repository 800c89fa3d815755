"""A model on VTA from the command line: compile, report, run, export a launch and run it."""

import json

import numpy as np
import onnx
import pytest

import tvmstruct
from tests import models
from tvmstruct import cli
from tvmstruct.vta.package import package_launches


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A package of an MLP compiled for 5 rows, beside its source and an input."""
    folder = tmp_path_factory.mktemp("vta")
    onnx.save(models.dense_model(), folder / "model.onnx")
    rng = models.rng(1)
    np.savez(folder / "batch.npz", x=rng.normal(size=(64, 24)).astype(np.float32))
    np.save(folder / "x.npy", rng.normal(size=(5, 24)).astype(np.float32))
    options = ["--target", "vta", "--calibration", folder / "batch.npz", "--shape", "x=5x24"]
    assert call("compile", folder / "model.onnx", "-o", folder / "model.zip", *options) == 0
    return folder


def call(*arguments) -> int | str | None:
    with pytest.raises(SystemExit) as done:
        cli.main([str(a) for a in arguments])
    return done.value.code


def test_report_says_what_runs_where(folder, capsys):
    assert call("report", folder / "model.zip", "--json") == 0
    found = json.loads(capsys.readouterr().out)
    assert [layer["form"] for layer in found["layers"]] == ["dense vta", "dense vta"]
    assert all(layer["reason"].startswith("int8 on VTA: 1 launch") for layer in found["layers"])
    assert any(note.startswith("int8 against float") for note in found["notes"])


def test_run_takes_a_package_and_a_source(folder, capsys):
    given = ["--input", f"x={folder / 'x.npy'}", "-o"]
    assert call("run", folder / "model.zip", *given, folder / "a.npz") == 0
    options = ["--target", "vta", "--calibration", folder / "batch.npz"]
    assert call("run", folder / "model.onnx", *given, folder / "b.npz", *options) == 0
    a, b = np.load(folder / "a.npz")["y"], np.load(folder / "b.npz")["y"]
    np.testing.assert_array_equal(a, b)
    want = tvmstruct.compile(tvmstruct.from_onnx(folder / "model.onnx"))(np.load(folder / "x.npy"))
    assert np.linalg.norm(a - want) < 0.03 * np.linalg.norm(want)


def test_a_package_is_not_compiled_again(folder):
    assert call("compile", folder / "model.zip", "-o", folder / "again.zip") == 2
    assert not (folder / "again.zip").exists()


def test_compile_without_calibration_says_what_to_pass(folder, capsys):
    code = call("compile", folder / "model.onnx", "-o", folder / "n.zip", "--target", "vta")
    assert code == 1
    assert "pass calibration=" in capsys.readouterr().err


def test_an_exported_launch_runs(folder, capsys):
    assert call("vta", "export", folder / "model.zip", "--json") == 0
    rows = json.loads(capsys.readouterr().out)["launches"]
    number = next(row["launch"] for row in rows if row["x"] == "5x24")
    np.save(folder / "q.npy", np.arange(-60, 60, dtype=np.int8).reshape(5, 24))
    files = ["--insn", folder / "p.bin", "--dram", folder / "p.dram"]
    given = ["--launch", number, *files, "--input", folder / "q.npy", "--json"]
    assert call("vta", "export", folder / "model.zip", *given) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["option"] == ""
    command = ["vta", "run", *files, "--base", found["base"], "--out", folder / "p.out"]
    assert call(*command) == 0
    after = np.fromfile(folder / "p.out", np.uint8)
    launch = package_launches(folder / "model.zip")[number]
    model = tvmstruct.load(folder / "model.zip")
    (site,) = model.buckets[(5, 24),].sites
    (step,) = site.layers.programs[0].steps
    want = step.run(np.load(folder / "q.npy"))
    np.testing.assert_array_equal(launch.result(after), want)


def test_export_as_text_and_its_misuse(folder, capsys):
    assert call("vta", "export", folder / "model.zip") == 0
    assert "instructions" in capsys.readouterr().out
    files = ["--insn", folder / "p.bin", "--dram", folder / "p.dram"]
    assert call("vta", "export", folder / "model.zip", "--launch", 0, *files) == 0
    assert f"--base {0x1000} --out after.bin" in capsys.readouterr().out
    assert call("vta", "export", folder / "model.zip", "--launch", 0) == 2
    assert "needs --insn FILE and --dram FILE" in capsys.readouterr().err
    files[1] = folder / "none" / "p.bin"
    assert call("vta", "export", folder / "model.zip", "--launch", 0, *files) == 2
    assert call("vta", "export", folder / "model.onnx") == 1
    assert "no VTA package" in capsys.readouterr().err
