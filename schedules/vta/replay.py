"""A quick look at how the units of VTA overlap under a nest, step by step.

The cycle model takes whole streams, which must be recorded first. Choosing among nests takes less:
when each buffer is filled and free again, and when each unit is done.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Iterator
from dataclasses import dataclass, field
from functools import cache
from itertools import product

from tvmstruct.schedules.compute.tile_matmul import TileEpilogue, TileNest, TileShape
from tvmstruct.vta.config import Config, Memory
from tvmstruct.vta.driver import cut
from tvmstruct.vta.scratchpad import Buffer

ISSUE = 7  # cycles that a GEMM or ALU instruction takes on top of its tile operations
LATENCY = 23  # of a LOAD
BEAT = 8  # bytes
BURST = 128  # out tiles of 16 bytes
FETCH = 2  # cycles for an instruction, before the first one starts
FETCHED = 128  # instructions at a time

Dims = tuple[tuple[int, int], ...]


def beats(tiles: int, memory: Memory, config: Config) -> int:
    """Return the beats of the read channel that tiles take."""
    return tiles * config.tile_bytes(memory) // BEAT


def passes(epilogue: TileEpilogue) -> tuple[int, int]:
    """Return how often the ALU goes over the sums: with immediates, and with registers."""
    e = epilogue
    clips = int(e.high is not None) + int(e.low is not None and not (e.relu and e.low <= 0))
    return clips + e.relu + len(e.shifts) + (e.add != 0), int(e.bias) + e.shift_tiles


@dataclass(eq=False)
class _Place:
    """A buffer with the cycle at which each of its places is ready, and free again."""

    buffer: Buffer
    ready: list[int] = field(default_factory=list)
    free: list[int] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.ready = [0] * self.buffer.versions
        self.free = [0] * self.buffer.versions

    @classmethod
    def of(cls, versions: int) -> _Place:
        return cls(Buffer("", 0, 1, versions))

    def take(self, key: Hashable | None) -> tuple[int, bool]:
        """Return the place for ``key`` and whether it has to be filled."""
        fill = self.buffer.fill(key)
        return self.buffer.current, fill


def replay(nest: TileNest, shape: TileShape, epilogue: TileEpilogue, config: Config) -> int:
    """Return about how many cycles a product takes."""
    return _Replay(nest, shape, epilogue, config).run()


class _Replay:
    def __init__(
        self, nest: TileNest, shape: TileShape, epilogue: TileEpilogue, config: Config
    ) -> None:
        self.nest, self.shape, self.config = nest, shape, config
        self.fast, self.slow = passes(epilogue)
        self.x, self.w = _Place.of(nest.x_places), _Place.of(nest.w_places)
        self.sums = _Place.of(nest.sums_places)
        self.extra = _Place.of(2)
        self.load = self.compute = self.store = 0
        self.instructions = 0

    def run(self) -> int:
        """Return the cycle at which the last tile is stored."""
        nest = self.nest
        if nest.hoist:
            self.compute += self._operands(self.shape.g * self.shape.m)
        for i, (n, rows, g, m) in enumerate(self._chunks()):
            tiles = rows * nest.g * nest.m
            place, _ = self.sums.take(None)
            if i == 0:
                self.compute += nest.sums_places * nest.n * nest.g * nest.m + ISSUE
            elif i >= nest.sums_places:
                self.compute = max(self.compute, self.sums.free[place]) + tiles + ISSUE
            for c, k in product(range(nest.m // nest.columns), range(self.shape.k // nest.k)):
                self._multiply(rows, (n, g, k), (0 if self.shape.shared else g, m, c, k))
            self._finish(tiles, (g, m))
            self.store = max(self.store, self.compute) + stored(rows, nest, self.shape)
            self.sums.free[place] = self.store
        return max(self.compute, self.store) + FETCH * min(self.instructions, FETCHED)

    def _chunks(self) -> Iterator[tuple[int, int, int, int]]:
        """Yield (row, rows, group, column) of the sums made at a time, in order."""
        s, nest = self.shape, self.nest
        groups, columns = range(s.g // nest.g), range(s.m // nest.m)
        whole = s.n // nest.n
        for segment in (range(whole), range(whole, -(-s.n // nest.n))):
            order = (segment, groups, columns)
            if nest.rows_last:
                order = (groups, columns, segment)
            for at in product(*order):
                n, g, m = (at[2], at[0], at[1]) if nest.rows_last else at
                yield n, min(nest.n, s.n - n * nest.n), g, m

    def _multiply(self, rows: int, x_key: Hashable, w_key: Hashable) -> None:
        nest = self.nest
        x = self._loaded(self.x, x_key, x_dims(rows, nest, self.shape), Memory.INP)
        w = self._loaded(self.w, w_key, w_dims(nest, self.shape), Memory.WGT)
        start = max(self.compute, self.x.ready[x], self.w.ready[w])
        self.compute = start + rows * nest.g * nest.columns * nest.k + ISSUE
        self.x.free[x] = self.w.free[w] = self.compute
        self.instructions += 1

    def _loaded(self, place: _Place, key: Hashable, dims: Dims, memory: Memory) -> int:
        at, fill = place.take(key)
        if fill:
            count, tiles = transfers(dims), math.prod(extent for extent, _ in dims)
            free = max(self.load, place.free[at])
            self.load = free + LATENCY * count + beats(tiles, memory, self.config)
            place.ready[at] = self.load
            self.instructions += count
        return at

    def _finish(self, tiles: int, key: Hashable) -> None:
        self.compute += self.fast * (tiles + ISSUE) + self.slow * (2 * tiles + ISSUE)
        self.instructions += self.fast + self.slow + 1
        if not self.nest.hoist and self.extra.take(key)[1]:
            self.compute += self._operands(self.nest.g * self.nest.m)

    def _operands(self, tiles: int) -> int:
        self.instructions += self.slow
        return self.slow * (LATENCY + beats(tiles, Memory.ACC, self.config))


@cache
def transfers(dims: Dims) -> int:
    """Return how many instructions a transfer is."""
    return sum(1 for _ in cut(dims))


def x_dims(rows: int, nest: TileNest, shape: TileShape) -> Dims:
    """Return extents and strides of what one load of x brings."""
    return ((rows, shape.g * shape.k), (nest.g, shape.k), (nest.k, 1))


def w_dims(nest: TileNest, shape: TileShape) -> Dims:
    """Return extents and strides of what one load of w brings."""
    groups = 1 if shape.shared else nest.g
    return ((groups, shape.m * shape.k), (nest.columns, shape.k), (nest.k, 1))


@cache
def stored(rows: int, nest: TileNest, shape: TileShape) -> int:
    """Return the cycles of storing sums: 3 for each tile and each burst."""
    dims = ((rows, shape.g * shape.m), (nest.g, shape.m), (nest.m, 1))
    return sum(1 + n * (3 * columns + 3 * -(-columns // BURST)) for _, n, columns, _ in cut(dims))
