"""Launches: products recorded one after the other, once for each shape, then constants put in."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import lru_cache

import numpy as np

from tvmstruct.ops import Array
from tvmstruct.schedules.compute.tile_matmul import (
    Matmul,
    Tile,
    TileEpilogue,
    TileNest,
    TileShape,
)
from tvmstruct.schedules.compute.tile_mix import Mix
from tvmstruct.schedules.vta.recording import Argument
from tvmstruct.schedules.vta.tile_matmul import record_tile_matmul
from tvmstruct.vta.config import Config, Memory
from tvmstruct.vta.driver import BASE, Driver
from tvmstruct.vta.isa import decode_stream
from tvmstruct.vta.launch import Launch, Region, Tiles
from tvmstruct.vta.portable import verify

Strides = tuple[int, int, int]


@dataclass(frozen=True)
class Place:
    """Tiles of a region from ``first`` on, and how far rows, groups and inputs (outputs) move."""

    region: str
    first: int
    strides: Strides


@dataclass(frozen=True)
class Stage:
    """One product in a launch: all that its instructions depend on.

    ``w`` names the region of its weights; bias and shifts, if any, are ``w + ".bias"`` and so on.
    """

    shape: TileShape
    nest: TileNest
    epilogue: TileEpilogue
    x: Place
    w: str
    y: Place
    w_first: int = 0
    mixes: bool = False  # tiles are multiplied element by element, which is not portable

    def definition(self, config: Config) -> Matmul:
        """Return the definition of the product."""
        tile = Tile(config.batch, config.block_out, config.block_in)
        return _definition(
            Mix if self.mixes else Matmul, self.shape, tile, self.nest, self.epilogue
        )

    def arguments(self, numbers: Mapping[str, int]) -> dict[str, Argument]:
        """Return where every argument lies."""
        operands = {name: Argument(numbers[f"{self.w}.{name}"]) for name in self.epilogue.operands}
        return {
            "x": Argument(numbers[self.x.region], self.x.first, self.x.strides),
            "w": Argument(numbers[self.w], self.w_first),
            **operands,
            "y": Argument(numbers[self.y.region], self.y.first, self.y.strides),
        }


@lru_cache(maxsize=256)
def _definition(kind: type[Matmul], *parts) -> Matmul:
    return kind(*parts)


@dataclass(frozen=True)
class Reserved:
    """A region of a launch before it is placed."""

    name: str
    memory: Memory
    tiles: int
    constant: bool


@dataclass(frozen=True)
class Recorded:
    """A stream without the constants of any layer."""

    insn: bytes
    regions: tuple[Region, ...]
    size: int

    def launch(
        self, name: str, config: Config, x: Tiles, y: Tiles, constants: Mapping[str, Array]
    ) -> Launch:
        """Return the launch with ``constants`` in its regions."""
        regions = tuple(
            replace(region, data=np.ascontiguousarray(constants[region.name]).tobytes())
            if region.name in constants
            else region
            for region in self.regions
        )
        return Launch(name, config, self.insn, BASE, self.size, regions, x, y)


@lru_cache(maxsize=256)
def record_stages(
    stages: tuple[Stage, ...], regions: tuple[Reserved, ...], config: Config
) -> Recorded:
    """Record products one after the other, and prove that the stream is portable if it can be.

    Raises VtaMemoryError where they do not fit on chip.
    """
    driver = Driver(config)
    numbers = {r.name: driver.dram(r.name, r.memory, r.tiles, constant=r.constant) for r in regions}
    for stage in stages:
        record_tile_matmul(stage.definition(config), driver, stage.arguments(numbers))
    insn, placed, size = driver.finish()
    image = np.zeros(size, np.uint8)
    for region in placed:
        if region.data is not None:  # micro-ops
            start = region.address - BASE
            image[start : start + region.size] = np.frombuffer(region.data, np.uint8)
    if not any(stage.mixes for stage in stages):
        verify(decode_stream(insn, config), image, BASE, config)
    return Recorded(insn, placed, size)
