"""The saved-model container: round trips, damage of every byte, hostile files."""

import hashlib
import json
import os
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as npst

from tvmstruct import artifact
from tvmstruct.errors import ArtifactError

AVX2 = frozenset({"sse2", "avx2", "fma"})
RNG = np.random.default_rng(0)
SECTIONS: dict[str, artifact.Section] = {
    "code": b"\x7fELF" + bytes(range(97)),
    "weights/0": RNG.normal(size=(3, 5)).astype("float32"),
    "empty": b"",
    "weights/1": RNG.integers(0, 99, size=(2, 3, 4)).T,
}
MANIFEST = {"plan": {"layer.0": "vvma"}, "buckets": [[1, 16], [1, 128]]}
QUICK = settings(
    deadline=None, max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    file = tmp_path / "model.tvms"
    artifact.write(file, MANIFEST, SECTIONS, features={"avx2", "fma"})
    return file


def open_whole(path: Path) -> artifact.Artifact:
    loaded = artifact.read(path, features=AVX2)
    loaded.verify()
    return loaded


def edit(path: Path, change) -> None:
    """Change the manifest's record as a hostile writer would: with a correct hash."""
    data = path.read_bytes()
    _, _, _, length, total = artifact.HEADER.unpack_from(data)
    record = json.loads(data[artifact.START : artifact.START + length])
    record = change(record) or record
    text = json.dumps(record).encode() if not isinstance(record, bytes) else record
    body = data[-(-(artifact.START + length) // 64) * 64 : total]
    gap = bytes(-(artifact.START + len(text)) % 64)
    size = artifact.START + len(text) + len(gap) + len(body)
    header = artifact.HEADER.pack(artifact.MAGIC, artifact.FORMAT, 0, len(text), size)
    path.write_bytes(header + hashlib.sha256(header + text).digest() + text + gap + body)


def test_round_trip(path):
    loaded = open_whole(path)
    assert loaded.manifest == MANIFEST
    assert loaded.features == {"avx2", "fma"}
    assert bytes(loaded.section("code")) == SECTIONS["code"]
    assert bytes(loaded.section("empty")) == b""
    for name in ("weights/0", "weights/1"):
        array = loaded.array(name)
        np.testing.assert_array_equal(array, SECTIONS[name], strict=True)
        assert array.ctypes.data % 64 == 0
        assert not array.flags.writeable
        assert not array.flags.owndata


def test_nothing_of_this_machine_inside(path):
    data = path.read_bytes()
    assert str(path.parent).encode() not in data
    artifact.write(path, MANIFEST, SECTIONS, features={"fma", "avx2"})
    assert path.read_bytes() == data


def test_sections_are_verified_when_touched(path):
    data = bytearray(path.read_bytes())
    data[data.index(b"\x7fELF") + 9] ^= 1
    path.write_bytes(data)
    loaded = artifact.read(path, features=AVX2)
    np.testing.assert_array_equal(loaded.array("weights/0"), SECTIONS["weights/0"])
    with pytest.raises(ArtifactError, match=r"section 'code' does not match its SHA-256; copy"):
        loaded.section("code")


def test_every_changed_byte_is_found(path):
    good = path.read_bytes()
    for place in range(len(good)):
        bad = bytearray(good)
        bad[place] ^= 1 << place % 8
        path.write_bytes(bad)
        with pytest.raises(ArtifactError):
            open_whole(path)


def test_every_truncation_is_found(path):
    good = path.read_bytes()
    for length in range(0, len(good), 7):
        path.write_bytes(good[:length])
        with pytest.raises(ArtifactError, match=r"damaged or incomplete.*copy it again"):
            artifact.read(path, features=AVX2)
    path.write_bytes(good + b"\0")
    with pytest.raises(ArtifactError, match="damaged"):
        artifact.read(path, features=AVX2)


def test_other_files(tmp_path):
    file = tmp_path / "x"
    file.write_bytes(b"PK\x03\x04" + bytes(200))
    with pytest.raises(ArtifactError, match=r"no tvmstruct model: it starts with b'PK"):
        artifact.read(file, features=AVX2)
    with pytest.raises(ArtifactError, match="No such file"):
        artifact.read(tmp_path / "none", features=AVX2)
    with pytest.raises(ArtifactError, match="cannot be read"):
        artifact.read(tmp_path, features=AVX2)


def test_missing_cpu_feature(path):
    with pytest.raises(ArtifactError, match=r"CPU with avx2, fma, which this one has not.*host"):
        artifact.read(path, features={"sse2"})


def test_other_version(path, monkeypatch):
    here = artifact.versions()
    monkeypatch.setattr(artifact, "versions", lambda: here | {"apache-tvm": "0.99"})
    with pytest.raises(ArtifactError, match=r"apache-tvm 0.27.*this is apache-tvm 0.99; install"):
        artifact.read(path, features=AVX2)


def test_other_format(path, monkeypatch):
    monkeypatch.setattr(artifact, "FORMAT", 2)
    with pytest.raises(ArtifactError, match=r"format 1, this tvmstruct reads format 2; save"):
        artifact.read(path, features=AVX2)


def set_section(**values):
    def change(record):
        record["sections"]["weights/0"].update(values)

    return change


@pytest.mark.parametrize(
    "change",
    [
        set_section(offset=-64),
        set_section(offset=1),
        set_section(offset=0),
        set_section(offset=1 << 70),
        set_section(offset=True),
        set_section(size=1 << 62),
        set_section(size=-1),
        set_section(size=1.5),
        set_section(sha256=7),
        set_section(dtype="|O8"),
        set_section(dtype="<U4"),
        set_section(dtype="<f3"),
        set_section(dtype="f4,f4"),
        set_section(dtype=["f4"]),
        set_section(shape=[1 << 40, 1 << 40]),
        set_section(shape=[-3, -5]),
        set_section(shape=[1] * 99),
        set_section(shape="35"),
        set_section(surprise=1),
        lambda record: {**record, "sections": []},
        lambda record: {**record, "sections": {"a": None}},
        lambda record: {**record, "sections": {}},
        lambda record: {**record, "manifest": None},
        lambda record: {**record, "features": "avx2"},
        lambda record: {**record, "features": [["avx2"]]},
        lambda record: {**record, "versions": None},
        lambda record: [record],
        lambda record: b"not json",
        lambda record: b"\xff\xfe",
        lambda record: b"[" * 100_000,
    ],
)
def test_hostile_manifests(path, change):
    edit(path, change)
    with pytest.raises(ArtifactError):
        artifact.read(path, features=AVX2)


def test_hostile_edit_itself_is_sound(path):
    edit(path, lambda record: None)
    open_whole(path)


def test_wrong_use(path):
    loaded = artifact.read(path, features=AVX2)
    with pytest.raises(ArtifactError, match="no section 'wights'; it has"):
        loaded.section("wights")
    with pytest.raises(ArtifactError, match="holds bytes, not an array"):
        loaded.array("code")
    with pytest.raises(ArtifactError, match="dtype object; save numbers only"):
        artifact.write(path, {}, {"a": np.array([{}], object)}, features=())
    with pytest.raises(ArtifactError, match=r"cannot be written.*folder"):
        artifact.write(path.parent / "none" / "m.tvms", {}, {}, features=())


def test_failed_write_leaves_the_old_file(path, monkeypatch):
    good = path.read_bytes()

    def full(_handle: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(ArtifactError, match="No space left"):
        artifact.write(path, {}, {"a": b"x"}, features=())
    assert path.read_bytes() == good
    assert os.listdir(path.parent) == [path.name]


def test_replacing_keeps_open_readers_safe(path):
    loaded = artifact.read(path, features=AVX2)
    artifact.write(path, {}, {"a": b"x" * 10}, features=())
    np.testing.assert_array_equal(loaded.array("weights/0"), SECTIONS["weights/0"])
    assert bytes(open_whole(path).section("a")) == b"x" * 10


arrays = npst.arrays(
    st.one_of(npst.floating_dtypes(), npst.integer_dtypes(), npst.boolean_dtypes()),
    npst.array_shapes(min_dims=0, max_dims=4, min_side=0, max_side=4),
)


@QUICK
@given(st.dictionaries(st.text(max_size=9), st.one_of(st.binary(max_size=200), arrays), max_size=5))
def test_any_sections_round_trip(tmp_path, sections):
    file = tmp_path / "any"
    artifact.write(file, {}, sections, features=())
    loaded = open_whole(file)
    assert loaded.table.keys() == sections.keys()
    for name, section in sections.items():
        if isinstance(section, bytes):
            assert bytes(loaded.section(name)) == section
        else:
            got = loaded.array(name)
            assert got.shape == section.shape
            assert got.tobytes() == section.astype(section.dtype.newbyteorder("<")).tobytes()


@QUICK
@given(st.data())
def test_random_damage(path, data):
    good = path.read_bytes()
    start = data.draw(st.integers(0, len(good) - 1))
    patch = data.draw(st.binary(min_size=1, max_size=40))
    bad = good[:start] + patch + good[start + len(patch) :]
    file = path.with_name("bad")
    file.write_bytes(bad)
    if bad == good:
        return
    with pytest.raises(ArtifactError):
        open_whole(file)
