"""A launch: one instruction stream with the memory that it reads and writes, ready for a board.

Addresses are those of the stream, from ``base`` on. A driver that gets its memory elsewhere writes
the distance into VTA's base registers, which every address is added to.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from tvmstruct.errors import ArtifactError
from tvmstruct.ops import Array
from tvmstruct.vta.config import Config, Memory
from tvmstruct.vta.container import Blobs

MAX_IMAGE = 1 << 29
MAX_NUMBER = 1 << 32


@dataclass(frozen=True)
class Region:
    """Bytes of a launch's memory: tiles of one kind, and what they hold before, None for zeros."""

    name: str
    memory: Memory
    address: int  # of its first byte
    size: int  # in bytes
    data: bytes | None = None


@dataclass(frozen=True, eq=False)
class Tiles:
    """Where the int8 rows of a matrix lie in a region of tiles (batch, block).

    Tile (i, j) of the matrix is tile ``i * strides[0] + j * strides[1]`` of the region; feature f
    is column ``columns[f]`` of the tiled matrix, f itself where ``columns`` is None.
    """

    region: str
    rows: int
    features: int
    strides: tuple[int, int]
    columns: Array | None = None  # (features,) int64

    def offsets(self, config: Config) -> Array:
        """Return the byte of each element (rows, features) in the region."""
        batch, block = config.batch, config.block_in
        columns = np.arange(self.features) if self.columns is None else self.columns
        row, column = np.arange(self.rows)[:, None], columns[None, :]
        tile = row // batch * self.strides[0] + column // block * self.strides[1]
        return (tile * batch + row % batch) * block + column % block


@dataclass(frozen=True, eq=False)
class Launch:
    """A stream of instructions, its memory, and where x goes and y comes from."""

    name: str
    config: Config
    insn: bytes
    base: int  # of the memory image
    size: int  # of the memory image, in bytes
    regions: tuple[Region, ...]
    x: Tiles
    y: Tiles

    def image(self, x: Array | None = None) -> Array:
        """Return the memory before the launch (size,) uint8, with int8 rows ``x`` in place."""
        image = self._constants.copy()
        if x is not None:
            image[self._places[0]] = x.view(np.uint8)
        return image

    def result(self, image: Array) -> Array:
        """Return the int8 rows that a launch left in the memory (size,) uint8."""
        return image[self._places[1]].view(np.int8)

    def region(self, name: str) -> Region:
        """Return the region called ``name``."""
        return next(r for r in self.regions if r.name == name)

    @cached_property
    def _constants(self) -> Array:
        image = np.zeros(self.size, np.uint8)
        for region in self.regions:
            if region.data is not None:
                start = region.address - self.base
                image[start : start + region.size] = np.frombuffer(region.data, np.uint8)
        return image

    @cached_property
    def _places(self) -> tuple[Array, Array]:
        found = [
            self.region(tiles.region).address - self.base + tiles.offsets(self.config)
            for tiles in (self.x, self.y)
        ]
        return found[0], found[1]


def check_launch(launch: Launch) -> Launch:
    """Return a launch that was read from a file, checked: nothing lies outside its memory.

    Raises ArtifactError; the stream itself is checked when it is run.
    """
    if not 0 < launch.size <= MAX_IMAGE or launch.base < 0 or len(launch.insn) % 16:
        raise ArtifactError(
            f"launch {launch.name!r}: {launch.size} bytes at {launch.base} and a stream of "
            f"{len(launch.insn)} bytes; want at most {MAX_IMAGE}, and 16 for an instruction"
        )
    names = [region.name for region in launch.regions]
    for region in launch.regions:
        start = region.address - launch.base
        tile = launch.config.tile_bytes(region.memory)
        if start < 0 or region.size < 0 or start + region.size > launch.size:
            raise ArtifactError(f"launch {launch.name!r}: region {region.name!r} is out of memory")
        if region.address % tile or names.count(region.name) > 1:
            raise ArtifactError(
                f"launch {launch.name!r}: region {region.name!r} lies at {region.address}, "
                f"want a multiple of its tile of {tile} bytes and a name of its own"
            )
        if region.data is not None and len(region.data) != region.size:
            raise ArtifactError(
                f"launch {launch.name!r}: region {region.name!r} has {len(region.data)} bytes "
                f"of data for {region.size}"
            )
    for tiles in (launch.x, launch.y):
        _check_tiles(launch, tiles, names)
    return launch


def _check_tiles(launch: Launch, tiles: Tiles, names: list[str]) -> None:
    if tiles.region not in names:
        raise ArtifactError(f"launch {launch.name!r} has no region {tiles.region!r}")
    size, columns = launch.region(tiles.region).size, tiles.columns
    if columns is not None and (columns.shape != (tiles.features,) or columns.min(initial=0) < 0):
        raise ArtifactError(f"launch {launch.name!r}: the columns of {tiles.region!r} are wrong")
    if not 0 < tiles.rows * tiles.features <= size or tiles.rows < 0 or min(tiles.strides) < 0:
        raise ArtifactError(
            f"launch {launch.name!r}: {tiles.rows} rows of {tiles.features} features at strides "
            f"{tiles.strides} make no matrix in the {size} bytes of {tiles.region!r}"
        )
    batch, block = launch.config.batch, launch.config.block_in
    column = tiles.features - 1 if columns is None else int(columns.max())
    last = (tiles.rows - 1) // batch * tiles.strides[0] + column // block * tiles.strides[1]
    if (last + 1) * batch * block > size:
        raise ArtifactError(
            f"launch {launch.name!r}: {tiles.rows} rows of {tiles.features} features do not fit "
            f"into the {size} bytes of {tiles.region!r}"
        )


def launch_entry(launch: Launch, blobs: Blobs) -> dict[str, Any]:
    """Return what a manifest says of a launch, its bytes put into blobs."""
    regions = [
        {
            "name": region.name,
            "memory": region.memory.name.lower(),
            "tile": list(launch.config.tile_shape(region.memory)),
            "address": region.address,
            "size": region.size,
            "data": None if region.data is None else blobs.put(region.data),
        }
        for region in launch.regions
    ]
    return {
        "name": launch.name,
        "config": launch.config.name,
        "insn": blobs.put(launch.insn),
        "base": launch.base,
        "size": launch.size,
        "regions": regions,
        "x": _tiles_entry(launch.x, blobs),
        "y": _tiles_entry(launch.y, blobs),
    }


def read_launch(entry: Mapping[str, Any], config: Config, blob: Callable[[Any], bytes]) -> Launch:
    """Return the launch of a manifest's entry, checked; ``blob`` returns the bytes of a reference.

    Raises ArtifactError, KeyError, TypeError or ValueError where the entry makes no sense.
    """
    if entry["config"] != config.name:
        raise ValueError(f"a launch for {entry['config']} beside the configuration {config.name}")
    regions = tuple(
        Region(
            str(r["name"]),
            Memory[r["memory"].upper()],
            _whole(r["address"]),
            _whole(r["size"]),
            None if r["data"] is None else blob(r["data"]),
        )
        for r in entry["regions"]
    )
    launch = Launch(
        str(entry["name"]),
        config,
        blob(entry["insn"]),
        _whole(entry["base"]),
        _whole(entry["size"]),
        regions,
        _tiles(entry["x"], blob),
        _tiles(entry["y"], blob),
    )
    return check_launch(launch)


def _tiles_entry(tiles: Tiles, blobs: Blobs) -> dict[str, Any]:
    columns = None if tiles.columns is None else blobs.put(tiles.columns.astype("<i8").tobytes())
    return {
        "region": tiles.region,
        "rows": tiles.rows,
        "features": tiles.features,
        "strides": list(tiles.strides),
        "columns": columns,
    }


def _tiles(entry: Mapping[str, Any], blob: Callable[[Any], bytes]) -> Tiles:
    down, right = map(_whole, entry["strides"])
    columns = None
    if entry["columns"] is not None:
        columns = np.frombuffer(blob(entry["columns"]), "<i8").astype(np.int64)
    rows, features = _whole(entry["rows"]), _whole(entry["features"])
    return Tiles(str(entry["region"]), rows, features, (down, right), columns)


def _whole(value: Any) -> int:
    if type(value) is not int or not 0 <= value <= MAX_NUMBER:
        raise ValueError(f"{value!r} is no whole number up to {MAX_NUMBER}")
    return value
