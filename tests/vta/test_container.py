"""The files of a package: what is written comes back, and nothing damaged or hostile does."""

import hashlib
import json
import zipfile

import pytest

from tvmstruct.errors import ArtifactError
from tvmstruct.vta import container
from tvmstruct.vta.container import CHECKSUM, MANIFEST, Blobs, Package


@pytest.fixture(params=["package", "package.zip"])
def package(tmp_path, request):
    """A written package, and the reference of its blob."""
    blobs = Blobs()
    reference = blobs.put(b"stream" * 100)
    assert blobs.put(b"stream" * 100) == reference
    path = tmp_path / request.param
    container.write(path, {"launch": reference}, blobs)
    return path, reference


def rewrite(path, change) -> None:
    """Replace files of a package by what ``change`` makes of them (None: gone)."""
    if path.is_dir():
        files = {str(f.relative_to(path)): f.read_bytes() for f in path.rglob("*") if f.is_file()}
    else:
        with zipfile.ZipFile(path) as archive:
            files = {name: archive.read(name) for name in archive.namelist()}
    changed = {name: change(name, data) for name, data in files.items()}
    if path.is_dir():
        for name, data in changed.items():
            (path / name).unlink()
            if data is not None:
                (path / name).write_bytes(data)
    else:
        with zipfile.ZipFile(path, "w") as archive:
            for name, data in changed.items():
                if data is not None:
                    archive.writestr(name, data)


def with_manifest(path, manifest) -> None:
    """Give a package another manifest, with the right checksum."""
    text = manifest if isinstance(manifest, bytes) else json.dumps(manifest).encode()
    check = f"{hashlib.sha256(text).hexdigest()}  {MANIFEST}\n".encode()
    new = {MANIFEST: text, CHECKSUM: check}
    rewrite(path, lambda name, data: new.get(name, data))


def test_a_package_comes_back_and_is_replaced(package):
    path, reference = package
    assert container.is_package(path)
    found = Package(path)
    assert found.manifest["launch"] == reference
    assert found.blob(reference) == b"stream" * 100
    container.write(path, {"launch": 2}, Blobs())
    assert Package(path).manifest["launch"] == 2
    assert [f.name for f in path.parent.iterdir()] == [path.name]  # no drafts are left


def test_equal_content_is_equal_bytes(tmp_path):
    for name in ("a.zip", "b.zip"):
        blobs = Blobs()
        container.write(tmp_path / name, {"launch": blobs.put(b"x")}, blobs)
    assert (tmp_path / "a.zip").read_bytes() == (tmp_path / "b.zip").read_bytes()


def flipped(data):
    return bytes([data[0] ^ 1]) + data[1:]


@pytest.mark.parametrize(
    ("file", "change"),
    [
        ("blobs", flipped),
        ("blobs", lambda d: d[:-1]),
        ("blobs", lambda d: d + b" "),
        ("blobs", lambda d: None),
        (MANIFEST, lambda d: d[:-1]),
        (MANIFEST, lambda d: d + b" "),
        (MANIFEST, lambda d: None),
        (CHECKSUM, flipped),
        (CHECKSUM, lambda d: b""),
        (CHECKSUM, lambda d: None),
    ],
)
def test_damage_is_found(package, file, change):
    path, reference = package
    rewrite(path, lambda n, d: change(d) if n.startswith(file) else d)
    with pytest.raises(ArtifactError, match=r"damaged|no VTA package"):
        Package(path).blob(reference)


@pytest.mark.parametrize(
    ("manifest", "message"),
    [
        (b"[" * 100_000, "no JSON"),
        (b"\xff", "no JSON"),
        ([], 'no "format"'),
        ({"format": "other"}, 'no "format"'),
        ({"format": "tvmstruct-vta", "version": 2}, "version 2, this tvmstruct reads version 1"),
    ],
    ids=["deep", "bytes", "list", "other", "version"],
)
def test_a_strange_manifest_is_refused(package, manifest, message):
    path, _ = package
    with_manifest(path, manifest)
    with pytest.raises(ArtifactError, match=message):
        Package(path)


@pytest.mark.parametrize(
    "reference",
    [
        None,
        "../../secret",
        {"sha256": "../../secret", "bytes": 3},
        {"sha256": "a" * 64},
        {"sha256": "a" * 64, "bytes": -1},
        {"sha256": "a" * 64, "bytes": 1 << 60},
        {"sha256": "a" * 64, "bytes": 3},
    ],
)
def test_a_reference_to_no_blob_is_refused(package, reference):
    path, _ = package
    with pytest.raises(ArtifactError, match=r"names no blob|has size|cannot be read"):
        Package(path).blob(reference)


def test_a_zip_bomb_is_not_unpacked(tmp_path):
    path = tmp_path / "bomb.zip"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr(MANIFEST, b"0" * (1 << 24))
    with pytest.raises(ArtifactError, match="compressed or encrypted"):
        Package(path)


def test_a_file_twice_in_a_zip_is_refused(tmp_path):
    path = tmp_path / "twice.zip"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr(MANIFEST, b"{}")
        with pytest.warns(UserWarning, match="Duplicate"):
            archive.writestr(MANIFEST, b"{}")
    with pytest.raises(ArtifactError, match="twice"):
        Package(path)


def test_other_files_are_neither_replaced_nor_read(tmp_path):
    (tmp_path / "work").mkdir()
    (tmp_path / "note.zip").write_text("mine")
    for name in ("work", "note.zip"):
        assert not container.is_package(tmp_path / name)
        with pytest.raises(ArtifactError, match="exists and is no VTA package"):
            container.write(tmp_path / name, {}, Blobs())
        with pytest.raises(ArtifactError):
            Package(tmp_path / name)
    with pytest.raises(ArtifactError, match="is its folder there"):
        container.write(tmp_path / "none" / "package", {}, Blobs())
