"""How a product of tiles is cut for VTA: what fits, what it costs roughly, and the choices."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from itertools import product

from tvmstruct.errors import VtaMemoryError
from tvmstruct.schedules.compute.tile_matmul import TileEpilogue, TileNest, TileShape
from tvmstruct.schedules.registry import Pick, divisors
from tvmstruct.schedules.vta.replay import (
    ISSUE,
    LATENCY,
    beats,
    passes,
    replay,
    stored,
    transfers,
    w_dims,
    x_dims,
)
from tvmstruct.vta.config import Config, Memory

MOST_OPTIONS = 6  # of one dimension
PLACES = 4  # for sums, at most
FINALISTS = 48  # of nests that are replayed
MOST_STEPS = 20_000  # of theirs


@lru_cache(maxsize=512)
def default_nest(shape: TileShape, epilogue: TileEpilogue, config: Config) -> TileNest:
    """Return the nest that is best by `replay`, of those that `estimate` likes.

    Raises VtaMemoryError where not even the smallest fits on chip.
    """
    found = sorted(
        (
            (estimate(n, shape, epilogue, config), i, n)
            for i, n in enumerate(nests(shape, epilogue, config))
        )
    )
    best, least, steps = None, 0, 0
    for _, _, nest in found[:FINALISTS]:
        cycles = replay(nest, shape, epilogue, config)
        if best is None or cycles < least:
            best, least = nest, cycles
        steps += nest.steps(shape)
        if steps > MOST_STEPS:
            break
    if best is None:
        raise VtaMemoryError(
            f"VTA: a product of {shape} does not fit on chip one tile at a time; the scratchpads "
            f"hold {config.depth(Memory.INP)} inp, {config.depth(Memory.WGT)} wgt and "
            f"{config.depth(Memory.ACC)} acc tiles"
        )
    return best


def choose_nest(shape: TileShape, epilogue: TileEpilogue, config: Config, pick: Pick) -> TileNest:
    """Return the nest as ``pick`` answers, each question after those that it depends on."""
    d = default_nest(shape, epilogue, config)
    space = _Space(shape, epilogue, config)

    def ask(name: str, options: list[int], default: int) -> int:
        if not options:
            raise VtaMemoryError(f"VTA: the choices before leave no room for any {name}")
        return pick(name, options, default if default in options else options[0])

    rows_last = bool(ask("rows_last", [0, 1], int(d.rows_last)))
    n = ask("n", space.rows(), d.n)
    g = ask("g", space.groups(n), d.g)
    m = ask("m", space.columns(n, g), d.m)
    columns = ask("columns", [c for c in space.options(shape.m) if m % c == 0] or [m], d.columns)
    k = ask("k", space.depths(n, g, columns), d.k)
    x_places = ask("x_places", space.x_places(n, g, k), d.x_places)
    w_places = ask("w_places", space.w_places(g, m, columns, k), d.w_places)
    sums = ask("sums_places", space.sums_places(n, g, m), d.sums_places)
    return TileNest(n, g, m, columns, k, x_places, w_places, sums, rows_last, space.hoist())


def choose_mix(shape: TileShape, epilogue: TileEpilogue, config: Config, pick: Pick) -> TileNest:
    """Return the nest of products element by element, which the vector ALU does alone.

    Raises VtaMemoryError where the inputs of one output do not fit on chip.
    """
    space = _Space(shape, epilogue, config)
    held = space.held(1, 1) if space.hoist() else 0
    acc = config.depth(Memory.ACC) - held - shape.k
    options = [m for m in divisors(shape.m, 1, shape.m) if m * (shape.k + 4) <= acc]
    if not options:
        raise VtaMemoryError(
            f"VTA: {shape.k} inputs of one output, and as many weights, do not fit into "
            f"{config.depth(Memory.ACC)} acc tiles"
        )
    m = pick("m", options, options[-1])
    return TileNest(1, 1, m, m, shape.k, 1, 1, 1, hoist=space.hoist())


def nests(shape: TileShape, epilogue: TileEpilogue, config: Config) -> Iterator[TileNest]:
    """Yield nests that fit."""
    space = _Space(shape, epilogue, config)
    for n in space.rows():
        for g in space.groups(n):
            for m in space.columns(n, g):
                for columns in (c for c in space.options(shape.m) if m % c == 0):
                    for k in space.depths(n, g, columns):
                        yield from space.places(n, g, m, columns, k)


@dataclass(frozen=True)
class _Space:
    shape: TileShape
    epilogue: TileEpilogue
    config: Config

    def depth(self, memory: Memory) -> int:
        return self.config.depth(memory)

    @staticmethod
    def options(extent: int) -> list[int]:
        """Return some divisors of an extent, evenly spread."""
        found = [d for d in range(1, extent + 1) if extent % d == 0]
        if len(found) <= MOST_OPTIONS:
            return found
        step = (len(found) - 1) / (MOST_OPTIONS - 1)
        return sorted({found[round(i * step)] for i in range(MOST_OPTIONS)})

    def rows(self) -> list[int]:
        """Return rows at a time; some leave few for the end, which nothing overlaps."""
        n = self.shape.n
        most = min(n, self.depth(Memory.ACC), self.depth(Memory.INP))
        found = {min(1 << i, most) for i in range(most.bit_length() + 1)}
        uneven = {n * 8 // (8 * chunks + 1) for chunks in range(1, MOST_OPTIONS)}
        return sorted(found | {rows for rows in uneven if 8 <= rows <= most})

    def _operand_tiles(self) -> int:
        return int(self.epilogue.bias) + self.epilogue.shift_tiles

    def hoist(self) -> bool:
        """Return whether bias and shifts of all channels stay on chip."""
        everything = self._operand_tiles() * self.shape.g * self.shape.m
        return everything <= self.depth(Memory.ACC) // 2

    def held(self, g: int, m: int) -> int:
        """Return the tiles of bias and shifts on chip."""
        s = self.shape
        return self._operand_tiles() * (s.g * s.m if self.hoist() else 2 * g * m)

    def groups(self, n: int) -> list[int]:
        acc, inp = self.depth(Memory.ACC), self.depth(Memory.INP)
        shared = self.shape.shared
        found = self.options(self.shape.g)
        fit = [g for g in found if n * g <= min(acc, inp)]
        return [g for g in fit if shared or g <= self.depth(Memory.WGT)] or fit[:1]

    def columns(self, n: int, g: int) -> list[int]:
        acc = self.depth(Memory.ACC)
        tiles = n * g if self.hoist() else (n + 2 * self._operand_tiles()) * g
        free = acc - self.held(0, 0)
        return [m for m in self.options(self.shape.m) if m * tiles <= free]

    def depths(self, n: int, g: int, columns: int) -> list[int]:
        groups = 1 if self.shape.shared else g
        inp, wgt = self.depth(Memory.INP), self.depth(Memory.WGT)
        fit = [
            k
            for k in self.options(self.shape.k)
            if n * g * k <= inp and groups * columns * k <= wgt
        ]
        return fit

    def x_places(self, n: int, g: int, k: int) -> list[int]:
        most = self.depth(Memory.INP) // (n * g * k)
        chunks = self.shape.k // k
        every = chunks * -(-self.shape.n // n) * (self.shape.g // g)
        return _counts({1, 2, chunks, chunks + 1, 2 * chunks, every}, min(most, every))

    def w_places(self, g: int, m: int, columns: int, k: int) -> list[int]:
        groups = 1 if self.shape.shared else g
        most = self.depth(Memory.WGT) // (groups * columns * k)
        chunks = self.shape.k // k * (m // columns)
        every = chunks * (self.shape.m // m)
        every *= 1 if self.shape.shared else self.shape.g // g
        return _counts({1, 2, chunks, 2 * chunks, every}, min(most, every))

    def sums_places(self, n: int, g: int, m: int) -> list[int]:
        count = self.shape.g // g * (self.shape.m // m)
        most = (self.depth(Memory.ACC) - self.held(g, m)) // (n * g * m)
        chunks = -(-self.shape.n // n) * count
        return [p for p in range(1, PLACES + 1) if p <= min(most, chunks)]

    def places(self, n: int, g: int, m: int, columns: int, k: int) -> Iterator[TileNest]:
        for x, w in product(self.x_places(n, g, k)[-3:], self.w_places(g, m, columns, k)[-3:]):
            sums = self.sums_places(n, g, m)
            if sums:
                for rows_last in (False, True):
                    yield TileNest(n, g, m, columns, k, x, w, sums[-1], rows_last, self.hoist())


def _counts(wanted: set[int], most: int) -> list[int]:
    return sorted({min(count, most) for count in wanted if count >= 1}) if most >= 1 else []


def estimate(nest: TileNest, shape: TileShape, epilogue: TileEpilogue, config: Config) -> float:
    """Return what a nest costs roughly: the instructions of each unit, and what nothing hides."""
    s = shape
    n_chunks, g_chunks, m_chunks = -(-s.n // nest.n), s.g // nest.g, s.m // nest.m
    c_chunks, k_chunks = nest.m // nest.columns, s.k // nest.k
    chunks = n_chunks * g_chunks * m_chunks
    xs, ws = x_dims(nest.n, nest, s), w_dims(nest, s)
    x_load = LATENCY * transfers(xs) + beats(nest.n * nest.g * nest.k, Memory.INP, config)
    groups = 1 if s.shared else nest.g
    w_load = LATENCY * transfers(ws) + beats(groups * nest.columns * nest.k, Memory.WGT, config)
    w_kinds = m_chunks * c_chunks * k_chunks * (1 if s.shared else g_chunks)
    x_loads = n_chunks * g_chunks * k_chunks
    w_loads = w_kinds
    if nest.x_places < k_chunks:
        x_loads *= m_chunks * c_chunks
    elif nest.rows_last and nest.x_places < n_chunks * k_chunks:
        x_loads *= m_chunks
    if nest.w_places < w_kinds:
        kept = nest.rows_last and nest.w_places >= c_chunks * k_chunks
        w_loads = c_chunks * k_chunks * m_chunks * g_chunks * (1 if kept else n_chunks)
    load = x_loads * x_load + w_loads * w_load
    sums = s.n * s.g * s.m
    fast, slow = passes(epilogue)
    compute = sums * (s.k + 1 + fast + 2 * slow)
    compute += ISSUE * chunks * (1 + c_chunks * k_chunks + fast + slow)
    operands = slow * (LATENCY + beats(nest.g * nest.m, Memory.ACC, config))
    compute += 0 if nest.hoist else operands * (g_chunks * m_chunks if nest.rows_last else chunks)
    compute += 4 * chunks * c_chunks * k_chunks  # micro-ops
    single = nest.sums_places == 1 and chunks > 1
    store, last = stored(nest.n, nest, s), stored(s.n % nest.n or nest.n, nest, s)
    if single or (nest.x_places == 1 and x_loads > 1) or (nest.w_places == 1 and w_loads > 1):
        compute += load  # nothing overlaps
    compute += store * (chunks - 1) if single else 0
    zeroed = min(nest.sums_places * nest.n * nest.g * nest.m, sums)
    start = max(0, x_load + w_load - zeroed)
    return max(load, compute) + start + last
