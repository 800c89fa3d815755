"""Files of VTA programs and images, compressed or not."""

from __future__ import annotations

import gzip
import zlib
from pathlib import Path

from tvmstruct.errors import VtaError

GZIP = b"\x1f\x8b"
LARGEST = 1 << 32  # what 32-bit addresses reach


def read_bytes(path: Path) -> bytes:
    """Return a file's bytes, unpacked where it is gzip-compressed."""
    with path.open("rb") as file:
        compressed = file.read(len(GZIP)) == GZIP
    try:
        with gzip.open(path) if compressed else path.open("rb") as file:
            data = file.read(LARGEST + 1)
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise VtaError(f"{path}: damaged gzip file ({error})") from error
    if len(data) > LARGEST:
        raise VtaError(f"{path}: more than {LARGEST} bytes; addresses have 32 bits")
    return data


def write_bytes(path: Path, data: bytes) -> None:
    """Write a file, compressed where its name ends in .gz (always the same bytes)."""
    path.write_bytes(gzip.compress(data, mtime=0) if path.suffix == ".gz" else data)
