"""A model for VTA saved and loaded, with numpy in the place of the simulator; hostile packages."""

import json

import numpy as np
import pytest

import tvmstruct
from tests import models
from tests.vta import numpy_vta
from tests.vta.test_container import with_manifest
from tvmstruct.errors import ArtifactError, InputError
from tvmstruct.vta import container, simulated_kernel, sites
from tvmstruct.vta.container import MANIFEST
from tvmstruct.vta.export_command import export, listing, text
from tvmstruct.vta.package import load_package, package_launches

X = models.rng(2).normal(size=(5, 24)).astype(np.float32)


@pytest.fixture(autouse=True, scope="module")
def in_numpy():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(simulated_kernel, "simulate", numpy_vta.simulate)
        yield


@pytest.fixture(scope="module")
def model():
    """An MLP with a structured layer, so that features are moved too; compiled for 1 and 5 rows."""
    plan = tvmstruct.Plan({"layer.0.weight": tvmstruct.LayerPlan("monarch", {"b": 4})})
    source = tvmstruct.from_onnx(models.dense_model())
    x = models.rng(1).normal(size=(64, 24)).astype(np.float32)
    model = tvmstruct.compile(source, numpy_vta.target(), plan=plan, calibration=x, buckets="exact")
    model(X)
    return model


@pytest.fixture(params=["model.vta", "model.zip"])
def path(model, tmp_path, request):
    path = tmp_path / request.param
    model.save(path)
    return path


def test_a_model_comes_back(model, path):
    again = tvmstruct.load(path)
    np.testing.assert_array_equal(again(X), model(X))
    assert again.spec.accelerator.config == model.spec.accelerator.config
    assert again.spec.key == model.spec.key
    assert again.report().notes[0] == model.report().notes[0]
    assert [r.reason for r in again.report().layers] == [r.reason for r in model.report().layers]
    with pytest.raises(InputError, match="no bucket fits"):
        again(X[:2])
    again.save(path)
    np.testing.assert_array_equal(load_package(path)(X), model(X))


def test_the_manifest_tells_a_driver_all(model, path):
    package = container.Package(path)
    about = package.manifest
    assert about["config"]["LOG_BLOCK"] == 4
    launches = package_launches(path)
    assert len(launches) == 6  # three for each of two numbers of rows
    assert sorted({launch.x.rows for launch in launches}) == [1, 5]
    constants = {
        region["data"]["sha256"]
        for entry in about["launches"]
        for region in entry["regions"]
        if region["data"]
    }
    assert len(constants) == 3  # weights are there once
    x = np.full((5, 24), 3, np.int8)
    launch = next(n for n in launches if (n.x.rows, n.x.features) == (5, 24))
    image = launch.image(x)
    start = launch.region("x").address - launch.base
    tile = image[start : start + 32].reshape(2, 16)  # row 0: two tiles, the second half full
    np.testing.assert_array_equal(tile.ravel()[:24], 3)
    assert not tile.ravel()[24:].any()


def test_export_writes_one_launch(path, tmp_path):
    rows = listing(path)
    assert [row["x"] for row in rows][:1] == ["1x24"]
    np.save(tmp_path / "x.npy", np.full((1, 24), 7, np.int8))
    insn, dram = tmp_path / "insn", tmp_path / "dram"
    found = export(path, 0, insn, dram, tmp_path / "x.npy")
    launch = package_launches(path)[0]
    assert insn.read_bytes() == launch.insn
    image = np.frombuffer(dram.read_bytes(), np.uint8)
    np.testing.assert_array_equal(image, launch.image(np.full((1, 24), 7, np.int8)))
    assert found["base"] == 0x1000
    assert found["output"]["offset"] == launch.region("y").address - launch.base
    assert "tvmstruct vta run --insn" in text(found, insn, dram)
    export(path, 1, insn, dram, None)
    assert dram.stat().st_size == package_launches(path)[1].size
    with pytest.raises(InputError, match="has the launches 0 to 5"):
        export(path, 6, insn, dram, None)


@pytest.mark.parametrize(
    ("array", "message"),
    [(np.ones((1, 24)), "float64"), (np.ones((2, 24), np.int8), r"takes int8 \(1, 24\)")],
)
def test_export_takes_int8_rows(path, tmp_path, array, message):
    np.save(tmp_path / "x.npy", array)
    with pytest.raises(InputError, match=message):
        export(path, 0, tmp_path / "insn", tmp_path / "dram", tmp_path / "x.npy")
    (tmp_path / "x.npy").write_bytes(b"none")
    with pytest.raises(InputError, match="not an .npy file".replace(".", r"\.")):
        export(path, 0, tmp_path / "insn", tmp_path / "dram", tmp_path / "x.npy")


def change(manifest, *keys, to):
    """Set a value deep in a manifest; ``to`` may be a function of the old one."""
    *most, last = keys
    for key in most:
        manifest = manifest[next(iter(manifest)) if key == "*" else key]
    last = next(iter(manifest)) if last == "*" else last
    manifest[last] = to(manifest[last]) if callable(to) else to


HOSTILE = {
    "no launches": (("launches",), None),
    "launch without stream": (("launches", 0, "insn"), None),
    "huge memory": (("launches", 0, "size"), 1 << 31),
    "negative base": (("launches", 0, "base"), -4096),
    "region outside": (("launches", 0, "regions", 1, "address"), 1 << 30),
    "region askew": (("launches", 0, "regions", 0, "address"), 0x1001),
    "region of another size": (("launches", 0, "regions", 2, "size"), 16),
    "two regions of one name": (("launches", 0, "regions", 1, "name"), "x"),
    "unknown memory": (("launches", 0, "regions", 0, "memory"), "disk"),
    "too many rows": (("launches", 0, "x", "rows"), 1 << 20),
    "no rows": (("launches", 0, "x", "rows"), 0),
    "wide strides": (("launches", 0, "y", "strides"), [1, 1 << 20]),
    "wrong columns": (("launches", 0, "x", "columns"), {"sha256": "0" * 64, "bytes": 8}),
    "rows as text": (("launches", 0, "x", "rows"), "5"),
    "no config": (("config",), {}),
    "other config": (("config", "LOG_BLOCK"), 5),
    "site of another name": (("sites",), lambda s: {f"{sites.PREFIX}0": next(iter(s.values()))}),
    "site of another launch": (("sites", "*", "programs", 0, "steps", 0), {"launch": 5}),
    "site without launch": (("sites", "*", "programs", 0, "steps", 0), {"launch": 77}),
    "other scales": (("sites", "*", "programs", 0, "x_scale"), lambda r: {**r, "bytes": 8}),
    "relu after all": (("sites", "*", "relu"), True),
    "bucket of no site": (("buckets", 0, "sites"), ["tvmstruct.vta.none"]),
    "no buckets": (("buckets",), []),
    "no cpu": (("cpu",), None),
    "list of sites": (("sites",), []),
}


@pytest.mark.parametrize(("keys", "to"), HOSTILE.values(), ids=HOSTILE)
def test_a_hostile_manifest_is_an_artifact_error(model, tmp_path, keys, to):
    path = tmp_path / "model.vta"
    model.save(path)
    manifest = json.loads((path / MANIFEST).read_text())
    change(manifest, *keys, to=to)
    with_manifest(path, manifest)
    with pytest.raises(ArtifactError):
        tvmstruct.load(path)


def test_damaged_blobs_are_artifact_errors(model, tmp_path):
    path = tmp_path / "model.vta"
    model.save(path)
    for blob in (path / "blobs").iterdir():
        good = blob.read_bytes()
        blob.write_bytes(good[:-1] + bytes([good[-1] ^ 255]))
        with pytest.raises(ArtifactError):
            tvmstruct.load(path)
        blob.write_bytes(good)
    tvmstruct.load(path)


def test_a_truncated_zip_is_an_artifact_error(model, tmp_path):
    path = tmp_path / "model.zip"
    model.save(path)
    good = path.read_bytes()
    for size in (0, 10, len(good) // 2, len(good) - 1):
        path.write_bytes(good[:size])
        with pytest.raises(ArtifactError):
            load_package(path)
        with pytest.raises(ArtifactError):
            tvmstruct.load(path)
