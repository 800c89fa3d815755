"""Tensor intrinsics of x86: a description that anyone can read and its register-tile form."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from functools import cache
from itertools import product

from tvm import tirx
from tvm.s_tir import TensorIntrin
from tvm.script.ir_builder import tirx as T

from tvmstruct.schedules.builder import argument, block, i64, loops, prim_func, symbol
from tvmstruct.schedules.compute.product_tile import Tile, emit_tile, touch_tile, widen
from tvmstruct.schedules.x86.register_tile import accumulate
from tvmstruct.targets import Isa


@cache
def fma_tile(
    isa: Isa,
    height: int,
    vectors: int,
    depth: int,
    unroll: int = 1,
    ahead: tuple[int, int] | None = None,
) -> str:
    """Register ``c[height, vectors * lanes] += a[height, depth] @ b`` and return its name.

    ``unroll`` steps of the depth, a divisor of it, are one turn of the loop. Each step fetches
    the cache line that lies ``ahead`` (rows, columns) of its row of b: nothing else touches
    memory while a tile that is not the first of its panel finds b in cache.
    """
    name = f"tvmstruct.fma_tile.{isa.name}.{height}x{vectors}x{depth}x{unroll}"
    name += f".{ahead[0]}.{ahead[1]}" if ahead else ""
    describe = _tile_description(height, vectors * isa.lanes, depth)
    implement = _tile_implementation(isa, height, vectors, (depth, unroll), ahead)
    TensorIntrin.register(name, describe, implement, override=True)
    return name


def _tile_description(height: int, width: int, depth: int) -> tirx.PrimFunc:
    def body() -> None:
        a = argument("a", (height, depth), offset_factor=1)
        b = argument("b", (depth, width), offset_factor=1)
        c = argument("c", (height, width), offset_factor=1)
        with T.sblock("root"):
            T.reads(c[0:height, 0:width], a[0:height, 0:depth], b[0:depth, 0:width])
            T.writes(c[0:height, 0:width])
            # An extent of one would be simplified away in the schedule, so it is left out here.
            rows = [height] if height > 1 else []
            with loops(*rows, width, depth) as (*i, j, p):
                axes = [(width, j)] + [(height, row) for row in i]
                with block("update", axes, [(depth, p)]) as (vj, *vi, vp):
                    row = vi[0] if vi else 0
                    T.buffer_store(c, c[row, vj] + a[row, vp] * b[vp, vj], [row, vj])

    return prim_func(body)


def _tile_implementation(
    isa: Isa, height: int, vectors: int, steps: tuple[int, int], ahead: tuple[int, int] | None
) -> tirx.PrimFunc:
    lanes, width, (depth, unroll) = isa.lanes, vectors * isa.lanes, steps

    def body() -> None:
        a = argument("a", (height, depth), offset_factor=1, strides=[symbol("lda"), 1])
        b = argument("b", (depth, width), offset_factor=1, strides=[symbol("ldb"), 1])
        c = argument("c", (height, width), offset_factor=1, strides=[symbol("ldc"), 1])

        def place(row: int, column: int) -> tuple:
            return (row, T.ramp(i64(column * lanes), 1, lanes))

        def step(turn, add) -> None:
            for u in range(unroll):
                p = turn * unroll + u if unroll > 1 else turn
                if ahead is not None:
                    fetch(b[p + ahead[0], ahead[1]])
                for row, column in product(range(height), range(vectors)):
                    right = b[p, T.ramp(i64(column * lanes), 1, lanes)]
                    add(row, column, T.broadcast(a[row, p], lanes), right)

        with T.sblock("root"):
            T.reads(c[0:height, 0:width], a[0:height, 0:depth], b[0:depth, 0:width])
            T.writes(c[0:height, 0:width])
            tile = (height, vectors)
            turns = depth // unroll
            # From zero and then onto c: chunks of the depth add up like a tree, so the rounding
            # error grows with the root of the chunk and not of the whole depth.
            sums = accumulate(isa, lanes, tile, turns, step)
            for row, column in product(range(height), range(vectors)):
                total = c[place(row, column)] + sums[column][row]
                T.buffer_store(c, total, list(place(row, column)))

    return prim_func(body)


def fetch(element, *, near: bool = False) -> None:
    """Emit a prefetch into the second-level cache; of an address that is not ours, a no-op.

    A ``near`` one is into the first-level cache.
    """
    hints = (T.int32(value) for value in (0, 3 if near else 2, 1))  # to read, level, data
    T.evaluate(tirx.call_intrin("void", "tirx.prefetch", T.address_of(element), *hints))


@cache
def product_tile(isa: Isa, tile: Tile) -> str:
    """Register a tile of a structured operator and return the intrinsic's name."""
    digest = hashlib.sha256(repr(tile).encode()).hexdigest()[:16]
    name = f"tvmstruct.product_tile.{isa.name}.{digest}"
    describe, implement = _product_description(tile), _product_implementation(isa, tile)
    TensorIntrin.register(name, describe, implement, override=True)
    return name


def _product_description(tile: Tile) -> tirx.PrimFunc:
    def body() -> None:
        buffers = _tile_arguments(tile)
        with T.sblock("root"):
            touch_tile(tile, buffers, _starts(tile))
            emit_tile(tile, buffers, _starts(tile))

    return prim_func(body)


def _product_implementation(isa: Isa, tile: Tile) -> tirx.PrimFunc:
    depth = tuple(extent for extent, _ in tile.depth)

    def body() -> None:
        buffers = _tile_arguments(tile, strided=True)
        code = _Product(tile, *buffers)
        with T.sblock("root"):
            touch_tile(tile, buffers, _starts(tile))
            shape = (len(code.lines), code.vectors)
            code.store(accumulate(isa, tile.lanes, shape, depth, code.step))

    return prim_func(body)


@dataclass
class _Product:
    """The register-tile form of a `Tile`: lines are its rows, and its groups where they share b."""

    tile: Tile
    a: object
    b: object
    c: object

    @property
    def vectors(self) -> int:
        """Vectors of a line."""
        tile = self.tile
        return tile.columns if tile.over_groups else tile.columns // tile.lanes

    @property
    def lines(self) -> list[tuple[int, int]]:
        """(row, group) of each line."""
        groups = 1 if self.tile.over_groups else self.tile.groups
        return list(product(range(self.tile.rows), range(groups)))

    def step(self, at: list, add) -> None:
        """Add the products of one step of the depth: the weights stay, one line after the other.

        The other way round LLVM would hold what all lines read in registers.
        """
        words = 2 if self.tile.paired else 1
        weights = [w for v in range(self.vectors // words) for w in self._weights(at, v)]
        for line, (row, group) in enumerate(self.lines):
            for v, weight in enumerate(weights):
                add(line, v, self._left(row, group, at), weight)

    def store(self, sums: list[list]) -> None:
        """Write the sums, or add them to what is there."""
        tile = self.tile
        for (line, (row, group)), v in product(enumerate(self.lines), range(self.vectors)):
            place = self._vector(tile.c(row, group, v if tile.over_groups else v * tile.lanes))
            value = sums[v][line]
            T.buffer_store(self.c, value if tile.clear else self.c[place] + value, list(place))

    def _left(self, row: int, group: int, at: list):
        index = self.tile.a(row, group, at)
        if self.tile.over_groups:
            return self.a[self._vector(index)]
        return T.broadcast(self.a[index], self.tile.lanes)

    def _weights(self, at: list, v: int) -> list:
        """Return the weights of vector v, or of the two vectors whose words are there."""
        tile = self.tile
        index = tile.b(0, at, v if tile.over_groups else v * tile.lanes)
        lanes = 1 if tile.over_groups and not tile.b_group else tile.lanes
        found = self.b[index if lanes == 1 else self._vector(index)]
        halves = [widen(found, half, lanes) for half in (0, 1)] if tile.paired else [found]
        return [h if lanes == tile.lanes else T.broadcast(h, tile.lanes) for h in halves]

    def _vector(self, index: tuple) -> tuple:
        return (*index[:-1], T.ramp(index[-1], 1, self.tile.lanes))


def _starts(tile: Tile) -> list[tuple]:
    return [(i64(0),) * len(shape) for shape in tile.span]


def _tile_arguments(tile: Tile, *, strided: bool = False) -> tuple:
    """Declare a, b and c of a tile, whose rows, where they are an axis, are any distance apart."""

    def declare(name: str, shape: tuple[int, ...], dtype: str = "float32"):
        layout = {"strides": [symbol(f"ld{name}"), 1]} if strided and len(shape) > 1 else {}
        return argument(name, shape, dtype, offset_factor=1, **layout)

    a, b, c = tile.span
    return declare("a", a), declare("b", b, "int32" if tile.paired else "float32"), declare("c", c)
