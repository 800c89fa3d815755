"""The one-file saved model (``.tvms``): a manifest and 64-byte-aligned sections, all hashed.

Layout, little endian::

    0   magic "TVMSTRCT"            8 bytes
    8   format version              u32
    12  zero                        u32
    16  length of the manifest      u64
    24  length of the file          u64
    32  SHA-256 of the manifest and of bytes 0..31     32 bytes
    64  manifest, JSON: the caller's, versions, features, and per section offset, size,
        SHA-256, and dtype and shape where it is an array
    ..  sections, each at a multiple of 64, zeros between them

Nothing is unpickled or executed here. ``read`` checks at once all bytes outside the sections,
the versions and the CPU features, and each section's hash when it is first touched: no byte
of a section is seen before it is proven unchanged. Hashes protect against accidents, not
against a stranger who writes a file of his own: load only models that you trust.
"""

import hashlib
import importlib.metadata
import json
import mmap
import os
import re
import secrets
import struct
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from math import prod
from pathlib import Path
from typing import Any

import numpy as np

from .errors import ArtifactError

MAGIC = b"TVMSTRCT"
FORMAT = 1
HEADER = struct.Struct("<8sIIQQ")
START = HEADER.size + 32  # where the manifest begins
ALIGN = 64
MAX_MANIFEST = 64 << 20
MAX_SECTIONS = 100_000
MAX_RANK = 32
PACKAGES = ("tvmstruct", "apache-tvm", "apache-tvm-ffi")
NUMERIC = "biufc"  # kinds of numpy dtype that hold no objects
DTYPE = re.compile(rf"[<|][{NUMERIC}]\d{{1,2}}")

Section = bytes | bytearray | memoryview | np.ndarray


def versions() -> dict[str, str]:
    """Return the versions of the packages that compiled code depends on."""
    return {name: importlib.metadata.version(name) for name in PACKAGES}


def write(
    path: str | os.PathLike[str],
    manifest: Mapping[str, Any],
    sections: Mapping[str, Section],
    *,
    features: Collection[str],
) -> None:
    """Write a saved model at once or not at all; ``features`` are those that its code uses.

    The file appears under its name only when it is complete and on disk.
    """
    parts = {name: _as_bytes(name, section) for name, section in sections.items()}
    frame, offsets = _frame(manifest, sections, parts, features)
    target = Path(path)
    draft = target.with_name(f".{target.name}.{secrets.token_hex(8)}")
    try:
        with draft.open("xb") as file:
            file.write(frame)
            for name, part in parts.items():
                file.write(bytes(offsets[name] - file.tell()))
                file.write(part)
            file.flush()
            os.fsync(file.fileno())
        draft.replace(target)
    except OSError as error:
        raise ArtifactError(
            f"{target} cannot be written: {error.strerror}; is its folder there, with room?"
        ) from error
    finally:
        draft.unlink(missing_ok=True)
    _sync_folder(target.parent)


def read(path: str | os.PathLike[str], *, features: Collection[str]) -> "Artifact":
    """Return the saved model at ``path``; ``features`` are those of the CPU that will run it."""
    data = _map(Path(path))
    record = _manifest(data, os.fspath(path))
    _check_versions(record.get("versions"), os.fspath(path))
    _check_features(record.get("features"), features, os.fspath(path))
    table = _table(record.get("sections"), data, os.fspath(path))
    return Artifact(os.fspath(path), record["manifest"], frozenset(record["features"]), table, data)


@dataclass(frozen=True)
class Entry:
    """Where a section lies and what it must hash to; dtype and shape where it is an array."""

    offset: int
    size: int
    sha256: str
    dtype: str | None = None
    shape: tuple[int, ...] = ()


@dataclass(frozen=True, eq=False)
class Artifact:
    """A saved model, memory mapped; sections are verified when first touched."""

    path: str
    manifest: dict[str, Any]
    features: frozenset[str]
    table: dict[str, Entry]
    data: memoryview
    verified: set[str] = field(default_factory=set)

    def section(self, name: str) -> memoryview:
        """Return the verified bytes of a section without copying them."""
        entry = self.table.get(name)
        if entry is None:
            raise ArtifactError(f"{self.path}: no section {name!r}; it has {sorted(self.table)}")
        view = self.data[entry.offset : entry.offset + entry.size]
        if name not in self.verified:
            if hashlib.sha256(view).hexdigest() != entry.sha256:
                raise _damaged(self.path, f"section {name!r} does not match its SHA-256")
            self.verified.add(name)
        return view

    def array(self, name: str) -> np.ndarray:
        """Return a verified section as a read-only array, 64-byte aligned and not copied."""
        view = self.section(name)
        entry = self.table[name]
        if entry.dtype is None:
            raise ArtifactError(f"{self.path}: section {name!r} holds bytes, not an array")
        return np.frombuffer(view, entry.dtype).reshape(entry.shape)

    def verify(self) -> None:
        """Check every section now."""
        for name in self.table:
            self.section(name)


def _frame(
    manifest: Mapping[str, Any],
    sections: Mapping[str, Section],
    parts: Mapping[str, memoryview],
    features: Collection[str],
) -> tuple[bytes, dict[str, int]]:
    """Return header and manifest, and where each section goes.

    Offsets are counted from the end of the manifest, whose length depends on them.
    """
    table: dict[str, dict[str, Any]] = {}
    place = 0
    for name, part in parts.items():
        table[name] = {"offset": place, "size": part.nbytes, **_description(sections[name])}
        table[name]["sha256"] = hashlib.sha256(part).hexdigest()
        place = _aligned(place + part.nbytes)
    record = {
        "manifest": dict(manifest),
        "versions": versions(),
        "features": sorted(features),
        "sections": table,
    }
    text = json.dumps(record, allow_nan=False, sort_keys=True).encode()
    if len(text) > MAX_MANIFEST or len(table) > MAX_SECTIONS:
        raise ArtifactError(
            f"{len(table)} sections and a manifest of {len(text)} bytes are over the limits of "
            f"{MAX_SECTIONS} and {MAX_MANIFEST}; put large values into sections"
        )
    base = _aligned(START + len(text))
    offsets = {name: base + entry["offset"] for name, entry in table.items()}
    length = max((offsets[n] + part.nbytes for n, part in parts.items()), default=START + len(text))
    header = HEADER.pack(MAGIC, FORMAT, 0, len(text), length)
    return header + hashlib.sha256(header + text).digest() + text, offsets


def _as_bytes(name: str, section: Section) -> memoryview:
    """Return a section's bytes; arrays in C order and without objects."""
    if isinstance(section, np.ndarray):
        if section.dtype.kind not in NUMERIC:
            raise ArtifactError(
                f"section {name!r} has dtype {section.dtype}; save numbers only, "
                "and types that numpy does not know as a view of unsigned integers"
            )
        section = np.ascontiguousarray(section, section.dtype.newbyteorder("<"))
        return memoryview(section.reshape(-1).view(np.uint8))
    return memoryview(section).cast("B")


def _description(section: Section) -> dict[str, Any]:
    if not isinstance(section, np.ndarray):
        return {}
    return {"dtype": section.dtype.newbyteorder("<").str, "shape": list(section.shape)}


def _map(path: Path) -> memoryview:
    try:
        with path.open("rb") as file:
            return memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))
    except ValueError:  # an empty file cannot be mapped
        raise _damaged(str(path), "it is empty") from None
    except OSError as error:
        raise ArtifactError(
            f"{path} cannot be read: {error.strerror}; is the path right?"
        ) from error


def _manifest(data: memoryview, path: str) -> dict[str, Any]:
    """Return the manifest after checking magic, format, lengths and its hash."""
    if len(data) < START:
        raise _damaged(path, f"it has {len(data)} bytes, fewer than the header's {START}")
    magic, version, _, length, total = HEADER.unpack_from(data)
    if magic != MAGIC:
        raise ArtifactError(
            f"{path} is no tvmstruct model: it starts with {magic!r}, not {MAGIC!r}"
        )
    if version != FORMAT:
        raise ArtifactError(
            f"{path} has format {version}, this tvmstruct reads format {FORMAT}; "
            "save the model again with this version"
        )
    if total != len(data):
        raise _damaged(path, f"it has {len(data)} bytes where {total} were written")
    if length > min(MAX_MANIFEST, len(data) - START):
        raise _damaged(path, f"its manifest claims {length} bytes")
    text = bytes(data[START : START + length])
    digest = hashlib.sha256(bytes(data[: HEADER.size]) + text).digest()
    if digest != bytes(data[HEADER.size : START]):
        raise _damaged(path, "its manifest does not match its SHA-256")
    return _parse(text, path)


def _parse(text: bytes, path: str) -> dict[str, Any]:
    """Parse a manifest whose hash is right but which may still come from a stranger."""
    try:
        record = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise _damaged(path, f"its manifest is no JSON ({error})") from error
    if not isinstance(record, dict) or not isinstance(record.get("manifest"), dict):
        raise _damaged(path, "its manifest is not an object")
    return record


def _check_versions(found: Any, path: str) -> None:
    for name, here in versions().items():
        there = found.get(name) if isinstance(found, dict) else None
        if there != here:
            raise ArtifactError(
                f"{path} was saved with {name} {there}, this is {name} {here}; "
                f"install {name}=={there} or compile and save the model again"
            )


def _check_features(needed: Any, have: Collection[str], path: str) -> None:
    if not isinstance(needed, list) or not all(isinstance(name, str) for name in needed):
        raise _damaged(path, "its list of CPU features is not a list of names")
    if missing := sorted(set(needed) - set(have)):
        raise ArtifactError(
            f"{path} was compiled for a CPU with {', '.join(missing)}, which this one has not; "
            'compile the model here (target="host") or for an older CPU'
        )


def _table(found: Any, data: memoryview, path: str) -> dict[str, Entry]:
    """Return the sections with every offset, size, dtype and shape checked."""
    if not isinstance(found, dict) or len(found) > MAX_SECTIONS:
        raise _damaged(path, "its table of sections is malformed")
    base = _aligned(START + HEADER.unpack_from(data)[3])
    table: dict[str, Entry] = {}
    for name, values in found.items():
        try:
            table[name] = _entry(base, **values)
        except (TypeError, ValueError) as error:
            raise _damaged(path, f"section {name!r} is malformed ({error})") from error
    _check_layout(table, data, path)
    return table


def _check_layout(table: dict[str, Entry], data: memoryview, path: str) -> None:
    """Check that the sections fill the file in order, with nothing but zeros between them."""
    end = START + HEADER.unpack_from(data)[3]
    for name, entry in sorted(table.items(), key=lambda item: (item[1].offset, item[1].size)):
        if not 0 <= entry.offset - end < ALIGN or entry.offset + entry.size > len(data):
            raise _damaged(path, f"section {name!r} overlaps, leaves a gap or ends after the file")
        if any(data[end : entry.offset]):
            raise _damaged(path, f"the padding before section {name!r} is not zero")
        end = entry.offset + entry.size
    if end != len(data):
        raise _damaged(path, f"{len(data) - end} bytes follow the last section")


def _entry(
    base: int, *, offset: int, size: int, sha256: str, dtype: str | None = None, shape: Any = ()
) -> Entry:
    """Return a checked table entry; ValueError or TypeError where it makes no sense."""
    if not (_natural(offset) and _natural(size)) or offset % ALIGN:
        raise ValueError(f"offset {offset!r}, size {size!r}")
    if not isinstance(sha256, str):
        raise ValueError("no SHA-256")
    if dtype is None:
        return Entry(base + offset, size, sha256)
    if not isinstance(shape, list) or len(shape) > MAX_RANK or not all(map(_natural, shape)):
        raise ValueError(f"shape {shape!r}")
    if not isinstance(dtype, str) or not DTYPE.fullmatch(dtype):
        raise ValueError(f"dtype {dtype!r}")
    if np.dtype(dtype).itemsize * prod(shape) != size:
        raise ValueError(f"dtype {dtype!r} and shape {shape} do not make {size} bytes")
    return Entry(base + offset, size, sha256, dtype, tuple(shape))


def _natural(value: Any) -> bool:
    return type(value) is int and value >= 0


def _aligned(place: int) -> int:
    return -(-place // ALIGN) * ALIGN


def _damaged(path: str, why: str) -> ArtifactError:
    return ArtifactError(f"{path} is damaged or incomplete: {why}; copy it again or save it anew")


def _sync_folder(folder: Path) -> None:
    """Make a rename durable, where the system can."""
    try:
        handle = os.open(folder, os.O_RDONLY)
    except OSError:
        return
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
