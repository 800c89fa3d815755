"""Adaptive reconfiguration over the parameters of VTA: tile, block and buffer sizes.

The same three steps as for lanes (Algorithm 1 of NLP-Fast): sequential least squares over
continuous parameters with an analytic latency, rounding, and a loop that moves resources from one
part of the design to another for as long as the cycle model says that it pays.

Sizes other than the default's need VTA's HLS design: the Chisel one has fixed fields and an ALU
for a batch of 1.  The cycle model's rules were measured on the default design and are carried over.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import astuple, dataclass, field, replace

import numpy as np

from tvmstruct.errors import VtaConfigError
from tvmstruct.vta import gemm_stream
from tvmstruct.vta.channel import Dram
from tvmstruct.vta.config import BOARDS, Config
from tvmstruct.vta.operations import Gemm, Workload
from tvmstruct.vta.resources import (
    ALU_FFS,
    ALU_LUTS,
    LIMITS,
    LUT_MULTIPLIER,
    SHELL,
    VTA_CONTROL,
    Resources,
    vta_resources,
)

PARAMETERS = (
    "log_batch",
    "log_block",
    "log_inp_buff_size",
    "log_wgt_buff_size",
    "log_acc_buff_size",
)
LEAST, MOST = (0, 3, 11, 12, 13), (5, 6, 19, 21, 20)
START = (0.0, 4.0, 14.0, 16.0, 15.0)
MOVES = 8  # of a round, the most promising by the estimate, that the cycle model tries
ROUNDS = 20
SMOOTH = 8  # norm that stands for the maximum of compute and transfer
BLOCK_BYTES = 4096  # of a block RAM
BITS = 8  # of inputs and weights


@dataclass(frozen=True)
class Point:
    """A configuration, its latency on the model by the cycle model, and what it takes."""

    config: Config
    cycles: int
    resources: Resources
    share: float
    milliseconds: float


@dataclass
class Search:
    """A model's products on a board; remembers every configuration that was timed."""

    workload: Workload
    board: str
    points: dict[Config, Point] = field(default_factory=dict[Config, Point])

    def __post_init__(self) -> None:
        if self.board not in LIMITS:
            known = ", ".join(LIMITS)
            raise VtaConfigError(f"explore: unknown board {self.board!r}; known are {known}")
        if not self.workload.gemms:
            raise VtaConfigError(f"explore: {self.workload.name} has no products with constants")
        self.limits = LIMITS[self.board]
        self.dram = Dram(bus_bytes=BOARDS[self.board].axi_bits // 8)

    def time(self, config: Config) -> Point:
        """Return the point of a configuration, by the cycle model."""
        if config not in self.points:
            total = sum(
                g.count * gemm_stream.cycles(g.rows, g.inputs, g.outputs, config, self.dram)
                for g in self.workload.gemms
            )
            taken = vta_resources(config, self.limits)
            share = taken.share(self.limits)[1]
            clock = BOARDS[self.board].mhz * 1e3
            self.points[config] = Point(config, total, taken, share, total / clock)
        return self.points[config]

    def estimate(self, config: Config) -> float:
        """Return the cycles by the estimate of the best tilings."""
        return sum(
            g.count
            * gemm_stream.best_tiling(g.rows, g.inputs, g.outputs, config, self.dram).estimate(
                config, self.dram
            )
            for g in self.workload.gemms
        )

    def reconfigure(self, part: float = 1.0) -> Point | None:
        """Return the best configuration within ``part`` of the board, None where none fits."""
        limits = self.limits * part
        start = self._round(_least_squares(self.workload.gemms, limits, self.dram), limits)
        if start is None:
            return None
        best = self.time(start)
        for _ in range(ROUNDS):
            tried = [self.time(config) for config in self._promising(best, limits)]
            if not tried:
                break
            best = min([best, *tried], key=lambda point: point.cycles)
        return best

    def _round(self, x: np.ndarray, limits: Resources) -> Config | None:
        """Return whole parameters near ``x``: down, then smaller until the design fits."""
        values = np.floor(x + 1e-6).astype(int)
        values = np.clip(values, LEAST, MOST)
        while True:
            config = _config(self.board, values)
            if config is not None and vta_resources(config, self.limits).fits(limits):
                return config
            room = values - np.array(LEAST)
            if not room.any():
                return None
            values[int(np.argmax(room))] -= 1

    def _promising(self, best: Point, limits: Resources) -> list[Config]:
        """Return untried neighbours that fit and may be faster, those with the least estimates."""
        fitting: list[tuple[float, Config]] = []
        for near in neighbours(best.config):
            if near in self.points or not vta_resources(near, self.limits).fits(limits):
                continue
            try:
                estimate = self.estimate(near)
            except VtaConfigError:  # no two tiles of each operand fit
                continue
            if estimate < best.cycles:
                fitting.append((estimate, near))
        return [near for _, near in sorted(fitting, key=lambda pair: pair[0])[:MOVES]]


def neighbours(config: Config) -> Iterator[Config]:
    """Yield the valid configurations one move away: a part doubled, and perhaps another halved."""
    values = np.array([getattr(config, name) for name in PARAMETERS])
    unit = np.eye(len(PARAMETERS), dtype=int)
    steps = [unit[i] for i in range(len(unit))]
    steps += [up - down for up in unit for down in unit if (up != down).any()]
    steps += [up - 2 * down for up in unit for down in unit if (up != down).any()]
    for step in steps:
        near = values + step
        if (near >= LEAST).all() and (near <= MOST).all():
            found = _config(config.target, near)
            if found is not None:
                yield found


def _config(board: str, values: Iterable[int]) -> Config | None:
    """Return the configuration of parameters, None where VTA has no such design."""
    sizes = {name: int(value) for name, value in zip(PARAMETERS, values, strict=True)}
    try:
        return replace(Config(), target=board, **sizes)
    except VtaConfigError:
        return None


def front(points: Iterable[Point]) -> list[Point]:
    """Return the points that no other beats in latency and in share of the board, fastest last."""
    best: list[Point] = []
    for point in sorted(points, key=lambda p: (p.share, p.cycles)):
        if not best or point.cycles < best[-1].cycles:
            best.append(point)
    return best


def _least_squares(gemms: tuple[Gemm, ...], limits: Resources, dram: Dram) -> np.ndarray:
    """Return continuous parameters of least latency within ``limits``, by SLSQP."""
    from scipy.optimize import Bounds, minimize

    caps = np.array(astuple(limits))
    scale = _latency(np.array(START), gemms, dram)
    found = minimize(
        lambda x: np.log(_latency(x, gemms, dram) / scale),
        np.array(START),
        bounds=Bounds(np.array(LEAST, float), np.array(MOST, float)),
        constraints=[{"type": "ineq", "fun": lambda x: np.log(caps / _amounts(x, limits))}],
        method="SLSQP",
        options={"maxiter": 200, "ftol": 1e-6},
    )
    return found.x


def _latency(x: np.ndarray, gemms: tuple[Gemm, ...], dram: Dram) -> float:
    """Return cycles for continuous parameters: tile operations against transfers.

    Half the accumulators hold a square chunk of the result; inputs and weights are loaded again
    for every column and row of such chunks.
    """
    batch, block, inp, _, acc = 2.0**x
    side = np.sqrt(acc / 8)
    total = 0.0
    for g in gemms:
        macs = g.rows * g.inputs * g.outputs
        compute = macs / (batch * block**2) * (1 + 4 * block / g.inputs)
        tall, wide = min(side, g.rows), min(acc / 8 / min(side, g.rows), g.outputs)
        beats = macs * (1 / tall + 1 / wide) / dram.bus_bytes
        deep = min(g.inputs, inp / 2 / tall)
        steps = macs / (tall * wide * deep)
        moved = beats + 2 * gemm_stream.LOAD_OVERHEAD * steps
        total += g.count * (compute**SMOOTH + moved**SMOOTH) ** (1 / SMOOTH)
    return total


def _amounts(x: np.ndarray, limits: Resources) -> np.ndarray:
    """Return LUT, FF, DSP and BRAM of continuous parameters, as `vta_resources` counts them."""
    batch, block, inp, wgt, acc = 2.0**x
    macs, lanes = batch * block**2, batch * block
    slices = min(macs, limits.dsp)
    tree = macs * (2 * BITS + 4)
    lut = (macs - slices) * LUT_MULTIPLIER * BITS**2 + tree + ALU_LUTS * 32 * lanes
    ff = tree + ALU_FFS * 32 * lanes
    bram = (2.0**15 + inp + wgt + acc * 1.25) / BLOCK_BYTES
    fixed = SHELL + VTA_CONTROL
    return np.array([fixed.lut + lut, fixed.ff + ff, max(1.0, slices), fixed.bram + bram])
