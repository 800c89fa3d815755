"""``--calibration`` of the command line, and the size of what is written."""

from pathlib import Path

import numpy as np
import pytest
import typer

from tvmstruct import models
from tvmstruct.calibration_option import calibrated
from tvmstruct.commands.compile import size_of
from tvmstruct.errors import InputError
from tvmstruct.model_argument import ModelArgument, parse_model
from tvmstruct.vta import container

TINY = "random:bert?layers=1&hidden=8&heads=2&ffn=16&vocabulary=32&seq=4"


@pytest.fixture
def onnx_file(tmp_path):
    path = tmp_path / "model.onnx"
    path.write_bytes(b"")
    return ModelArgument(str(path))


def test_each_file_is_a_batch(onnx_file, tmp_path):
    files = [tmp_path / "a.npz", tmp_path / "b.npz"]
    for i, file in enumerate(files):
        np.savez(file, ids=np.full(3, i), mask=np.ones(3))
    batches = calibrated(onnx_file, "vta -config=c.json", files)["calibration"]
    assert [int(batch["ids"][0]) for batch in batches] == [0, 1]
    assert set(batches[0]) == {"ids", "mask"}


def test_without_files_compile_says_what_to_pass(onnx_file):
    assert calibrated(onnx_file, "vta", None) == {}
    assert calibrated(onnx_file, "host", None) == {}


def test_a_built_in_model_calibrates_on_its_own_inputs():
    model = parse_model(TINY)
    (batch,) = calibrated(model, "vta", None)["calibration"]
    assert set(batch) == set(models.parse(TINY.removeprefix("random:")).shapes())
    assert calibrated(model, "host", None) == {}


def test_misuse(onnx_file, tmp_path):
    files = [tmp_path / "a.npz"]
    with pytest.raises(typer.BadParameter, match="not with --target host"):
        calibrated(onnx_file, "host", files)
    with pytest.raises(typer.BadParameter, match="compiled already"):
        calibrated(ModelArgument("model.tvms"), "vta", files)


@pytest.mark.parametrize("content", [b"", b"no arrays", b"PK\x03\x04 no arrays"])
def test_a_file_without_arrays_is_named(onnx_file, tmp_path, content):
    (tmp_path / "a.npz").write_bytes(content)
    with pytest.raises(InputError, match=r"a\.npz is no \.npz file of arrays"):
        calibrated(onnx_file, "vta", [tmp_path / "a.npz"])


def test_one_array_has_no_name(onnx_file, tmp_path):
    np.save(tmp_path / "a.npy", np.ones(3))
    with pytest.raises(InputError, match=r"no \.npz file of arrays"):
        calibrated(onnx_file, "vta", [tmp_path / "a.npy"])


def test_a_package_is_a_compiled_model_as_large_as_its_files(tmp_path):
    path: Path = tmp_path / "package"
    blobs = container.Blobs()
    container.write(path, {"blob": blobs.put(b"123")}, blobs)
    assert ModelArgument(str(path)).compiled
    assert not ModelArgument(str(tmp_path)).compiled
    names = ("manifest.json", "manifest.sha256")
    assert size_of(path) == 3 + sum((path / name).stat().st_size for name in names)
