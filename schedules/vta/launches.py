"""Launches: kernels recorded once for each shape, with the constants of a layer in place."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import lru_cache

import numpy as np

from tvmstruct.errors import VtaError
from tvmstruct.ops import Array
from tvmstruct.schedules.compute.tile_matmul import (
    Matmul,
    Tile,
    TileEpilogue,
    TileNest,
    TileShape,
)
from tvmstruct.schedules.registry import Pick, pick_default
from tvmstruct.schedules.vta.nest import choose_nest
from tvmstruct.schedules.vta.pack import Packed
from tvmstruct.schedules.vta.tile_matmul import record_tile_matmul
from tvmstruct.vta.config import Config, Memory
from tvmstruct.vta.driver import BASE, Driver
from tvmstruct.vta.launch import Launch, Region, Tiles

MOST_SHIFT = 15  # in one instruction, on every implementation of VTA
IMMEDIATE = 1 << 15


@dataclass(frozen=True, eq=False)
class Requantise:
    """From sums to int8: + bias, ReLU, right shift of each channel, clip to [-128, 127]."""

    bias: Array  # (n_out,) int32
    shift: Array  # (n_out,) int32, 0 to 31
    relu: bool = False

    def __post_init__(self) -> None:
        if self.shift.min() < 0 or self.shift.max() > 31:
            raise VtaError(
                f"VTA: shifts from {self.shift.min()} to {self.shift.max()}; want 0 to 31"
            )

    def epilogue(self) -> TileEpilogue:
        """Return the ALU steps: what all channels share takes an immediate, the rest tiles."""
        bias, shift = self.bias, int(self.shift.max())
        same = (bias == bias[0]).all() and abs(int(bias[0])) < IMMEDIATE
        halves = -(-shift // MOST_SHIFT)
        uniform = bool((self.shift == shift).all())
        amounts = [min(MOST_SHIFT, shift - MOST_SHIFT * i) for i in range(halves)]
        return TileEpilogue(
            bias=not same,
            add=int(bias[0]) if same else 0,
            relu=self.relu,
            shifts=tuple(amounts) if uniform else (),
            shift_tiles=0 if uniform else halves,
        )

    def constants(self, packed: Packed, config: Config) -> dict[str, Array]:
        """Return the tiles that the ALU steps read."""
        e = self.epilogue()
        found = {"bias": packed.spread(self.bias, config)} if e.bias else {}
        for i in range(e.shift_tiles):
            part = (self.shift - MOST_SHIFT * i).clip(0, MOST_SHIFT)
            found[f"shift{i}"] = packed.spread(part, config)
        return found


@dataclass(frozen=True)
class Stage:
    """One product in a launch: all that its instructions depend on."""

    shape: TileShape
    nest: TileNest
    epilogue: TileEpilogue
    x_strides: tuple[int, int, int]
    y_strides: tuple[int, int, int]
    x: str
    y: str

    def definition(self, config: Config) -> Matmul:
        """Return the definition of the product."""
        tile = Tile(config.batch, config.block_out, config.block_in)
        return Matmul(self.shape, tile, self.nest, self.epilogue, self.x_strides, self.y_strides)

    def regions(self) -> dict[str, tuple[Memory, int]]:
        """Return memory and tiles of the constants of the stage."""
        s, e = self.shape, self.epilogue
        found = {"w": (Memory.WGT, (1 if s.shared else s.g) * s.m * s.k)}
        names = ["bias"] * e.bias + [f"shift{i}" for i in range(e.shift_tiles)]
        return found | {name: (Memory.ACC, s.g * s.m) for name in names}


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
    stages: tuple[Stage, ...], tensors: tuple[tuple[str, int], ...], config: Config
) -> Recorded:
    """Record products one after the other; ``tensors`` are x, y and what lies between, in tiles."""
    driver = Driver(config)
    numbers = {name: driver.dram(name, Memory.INP, tiles) for name, tiles in tensors}
    for i, stage in enumerate(stages):
        arguments = {"x": numbers[stage.x], "y": numbers[stage.y]}
        for name, (memory, tiles) in stage.regions().items():
            arguments[name] = driver.dram(f"{name}{i}", memory, tiles, constant=True)
        record_tile_matmul(stage.definition(config), driver, arguments)
    insn, regions, size = driver.finish()
    return Recorded(insn, regions, size)


def linear_launch(
    name: str,
    packed: Packed,
    after: Requantise,
    rows: int,
    config: Config,
    pick: Pick = pick_default,
) -> Launch:
    """Return the launch of one product for ``rows`` rows."""
    shape = packed.shape(-(-rows // config.batch))
    epilogue = after.epilogue()
    nest = choose_nest(shape, epilogue, config, pick)
    x_row, y_row = shape.g * shape.k, shape.g * shape.m
    stage = Stage(shape, nest, epilogue, (x_row, shape.k, 1), (y_row, shape.m, 1), "x", "y")
    tensors = (("x", shape.n * x_row), ("y", shape.n * y_row))
    recorded = record_stages((stage,), tensors, config)
    constants = {"w": packed.w, **after.constants(packed, config)}
    return recorded.launch(
        name,
        config,
        Tiles("x", rows, len(packed.x_columns), (x_row, 1), packed.x_columns),
        Tiles("y", rows, len(packed.y_columns), (y_row, 1), packed.y_columns),
        {f"{key}0": array for key, array in constants.items()},
    )
