"""The files of a VTA package: a folder, or a zip of the same, of a manifest and blobs.

::

    manifest.json              what is what, in JSON; blobs are named by {"sha256", "bytes"}
    manifest.sha256            hash of the manifest, as ``sha256sum`` writes it
    blobs/<sha256>.bin         streams, constants, scales, the part for the CPU

A zip holds them uncompressed, so that nothing grows when it is read. No name in a package is ever
used as a path: blobs are found by their hash, which is checked. Hashes protect against accidents,
not against a stranger: the CPU's part is machine code, so load only what you trust.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import secrets
import shutil
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from tvmstruct.errors import ArtifactError

FORMAT, VERSION = "tvmstruct-vta", 1
MANIFEST, CHECKSUM = "manifest.json", "manifest.sha256"
MAX_MANIFEST = 64 << 20
MAX_BLOB = 4 << 30
HASH = re.compile(r"[0-9a-f]{64}")

Reference = dict[str, Any]


class Blobs:
    """Bytes by their SHA-256, each once."""

    def __init__(self) -> None:
        self.held: dict[str, bytes] = {}

    def put(self, data: bytes) -> Reference:
        """Take bytes in; returns what the manifest says of them."""
        digest = hashlib.sha256(data).hexdigest()
        self.held[digest] = data
        return {"sha256": digest, "bytes": len(data)}


def write(path: str | Path, manifest: Mapping[str, Any], blobs: Blobs) -> None:
    """Write a package at once or not at all: a zip if ``path`` ends so, else a folder.

    An older package of that name is replaced, anything else is not.
    """
    path = Path(path)
    text = json.dumps({"format": FORMAT, "version": VERSION, **manifest}, indent=1, sort_keys=True)
    check = f"{hashlib.sha256(text.encode()).hexdigest()}  {MANIFEST}\n"
    files = {MANIFEST: text.encode(), CHECKSUM: check.encode()}
    files |= {blob_name(digest): data for digest, data in blobs.held.items()}
    if path.exists() and not is_package(path):
        raise ArtifactError(f"{path} exists and is no VTA package; choose another name")
    draft = path.with_name(f".{path.name}.{secrets.token_hex(8)}")
    try:
        (_write_zip if path.suffix == ".zip" else _write_folder)(draft, files)
        _replace(draft, path)
    except OSError as error:
        raise ArtifactError(
            f"{path} cannot be written: {error.strerror}; is its folder there, with room?"
        ) from error
    finally:
        _remove(draft)


def blob_name(digest: str) -> str:
    """Return the name of a blob's file."""
    return f"blobs/{digest}.bin"


def is_package(path: str | Path) -> bool:
    """Return whether ``path`` looks like a VTA package."""
    path = Path(path)
    if path.is_dir():
        return (path / CHECKSUM).is_file() and (path / MANIFEST).is_file()
    return path.is_file() and path.suffix == ".zip" and zipfile.is_zipfile(path)


class Package:
    """A package that was opened: its manifest, checked, and its blobs, checked when read."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self._read = _reader(self.path)
        text = self._read(MANIFEST, MAX_MANIFEST)
        check = self._read(CHECKSUM, 1 << 12).decode("ascii", "replace").split()
        if not check or hashlib.sha256(text).hexdigest() != check[0]:
            raise self.damaged(f"{MANIFEST} does not match {CHECKSUM}")
        self.manifest = self._parsed(text)

    def _parsed(self, text: bytes) -> dict[str, Any]:
        try:
            manifest = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise self.damaged(f"{MANIFEST} is no JSON ({error})") from error
        if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
            raise self.damaged(f'{MANIFEST} has no "format": "{FORMAT}"')
        if manifest.get("version") != VERSION:
            raise ArtifactError(
                f"{self.path} has version {manifest.get('version')!r}, this tvmstruct reads "
                f"version {VERSION}; save the model again with this version"
            )
        return manifest

    def blob(self, reference: Any) -> bytes:
        """Return the bytes that a reference of the manifest names."""
        digest = reference.get("sha256") if isinstance(reference, dict) else None
        size = reference.get("bytes") if isinstance(reference, dict) else None
        if not isinstance(digest, str) or not HASH.fullmatch(digest):
            raise self.damaged(f"{reference!r} names no blob")
        if type(size) is not int or not 0 <= size <= MAX_BLOB:
            raise self.damaged(f"blob {digest[:12]} has size {size!r}")
        data = self._read(blob_name(digest), size)
        if len(data) != size or hashlib.sha256(data).hexdigest() != digest:
            raise self.damaged(f"blob {digest[:12]} does not match its SHA-256 and size")
        return data

    def damaged(self, why: str) -> ArtifactError:
        """Return the error of a package that is not as it was written."""
        return ArtifactError(
            f"{self.path} is damaged or incomplete: {why}; copy it again or save it anew"
        )


def _reader(path: Path) -> Callable[[str, int], bytes]:
    """Return a function from a file's name and most bytes to its bytes."""
    if path.is_dir():
        return lambda name, most: _from_folder(path, name, most)
    try:
        archive = zipfile.ZipFile(path)
    except (OSError, zipfile.BadZipFile) as error:
        raise ArtifactError(f"{path} is no VTA package: neither folder nor zip") from error
    names = [info.filename for info in archive.infolist()]
    if len(set(names)) < len(names):
        raise ArtifactError(f"{path} is no VTA package: a file is in it twice")
    return lambda name, most: _from_zip(archive, path, name, most)


def _from_folder(path: Path, name: str, most: int) -> bytes:
    file = path / name
    try:
        if file.stat().st_size > most:
            raise _wrong(path, f"{name} is longer than {most} bytes")
        return file.read_bytes()
    except OSError as error:
        raise _wrong(path, f"{name} cannot be read: {error.strerror}") from error


def _from_zip(archive: zipfile.ZipFile, path: Path, name: str, most: int) -> bytes:
    try:
        info = archive.getinfo(name)
        if info.compress_type != zipfile.ZIP_STORED or info.flag_bits & 1:
            raise _wrong(path, f"{name} is compressed or encrypted")
        if info.file_size > most:
            raise _wrong(path, f"{name} is longer than {most} bytes")
        return archive.read(info)
    except (KeyError, OSError, EOFError, NotImplementedError, zipfile.BadZipFile) as error:
        raise _wrong(path, f"{name} cannot be read: {error}") from error


def _wrong(path: Path, why: str) -> ArtifactError:
    return ArtifactError(f"{path} is damaged or incomplete: {why}; copy it again or save it anew")


def _write_folder(draft: Path, files: Mapping[str, bytes]) -> None:
    draft.mkdir()
    (draft / "blobs").mkdir()
    for name, data in files.items():
        (draft / name).write_bytes(data)


def _write_zip(draft: Path, files: Mapping[str, bytes]) -> None:
    with zipfile.ZipFile(draft, "x", zipfile.ZIP_STORED) as archive:
        for name, data in files.items():
            archive.writestr(zipfile.ZipInfo(name), data)  # without a date: equal files, equal zips


def _replace(draft: Path, path: Path) -> None:
    if path.is_dir():
        old = path.with_name(f"{draft.name}.old")
        path.rename(old)
        draft.rename(path)
        _remove(old)
    else:
        os.replace(draft, path)


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
