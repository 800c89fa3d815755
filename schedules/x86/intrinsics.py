"""Tensor intrinsics of x86: a description that anyone can read and its register-tile form."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from functools import cache
from itertools import product
from typing import Any

from tvm import tirx
from tvm.s_tir import TensorIntrin
from tvm.script.ir_builder import tirx as T

from tvmstruct.rounding import BYTES, EACH, HALVES
from tvmstruct.schedules.builder import argument, block, i64, loops, prim_func, symbol
from tvmstruct.schedules.compute.product_tile import Tile, emit_tile, touch_tile, widen
from tvmstruct.schedules.x86.bf16_words import DOT
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
        code = _FORMS.get(tile.form, _Product)(tile, buffers)
        with T.sblock("root"):
            touch_tile(tile, buffers, _starts(tile))
            shape = (len(code.lines), code.vectors)
            code.store(accumulate(isa, tile.lanes, shape, depth, code.step, **code.sums))

    return prim_func(body)


@dataclass
class _Product:
    """The register-tile form of a `Tile`: lines are its rows, and its groups where they share b."""

    tile: Tile
    buffers: tuple

    def __post_init__(self) -> None:
        self.a, self.b, self.c = self.buffers[:3]

    @property
    def sums(self) -> dict[str, Any]:
        """What `accumulate` has to know of the sums."""
        return {}

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
            place = self._vector(tile.c(row, group, self._column(v)))
            value = self._value(sums[v][line], row, v)
            T.buffer_store(self.c, value if tile.clear else self.c[place] + value, list(place))

    def _column(self, v: int) -> int:
        """Return the first column of vector v."""
        return v if self.tile.over_groups else v * self.tile.lanes

    def _value(self, total, row: int, v: int):
        """Return what a sum stands for."""
        return total

    def _left(self, row: int, group: int, at: list):
        index = self.tile.a(row, group, at)
        if self.tile.over_groups:
            return self.a[self._vector(index)]
        return T.broadcast(self.a[index], self.tile.lanes)

    def _weights(self, at: list, v: int) -> list:
        """Return the weights of vector v, or of the two vectors whose words are there."""
        tile = self.tile
        found, lanes = self._columns(tile.b(0, at, self._column(v)))
        halves = [widen(found, half, lanes) for half in (0, 1)] if tile.paired else [found]
        return [self._spread(h, lanes) for h in halves]

    def _columns(self, index: tuple) -> tuple:
        """Return words of b for a vector of sums, and how many: one where all lanes share it."""
        lanes = 1 if self.tile.over_groups and not self.tile.b_group else self.tile.lanes
        return self.b[index if lanes == 1 else self._vector(index)], lanes

    def _spread(self, value, lanes: int):
        return value if lanes == self.tile.lanes else T.broadcast(value, self.tile.lanes)

    def _vector(self, index: tuple) -> tuple:
        return (*index[:-1], T.ramp(index[-1], 1, self.tile.lanes))


class _HalfProduct(_Product):
    """Words of two bfloat16, whose products are added up in float32."""

    @property
    def sums(self) -> dict[str, Any]:
        """Sums from zero of dot products."""
        name, kind = DOT.format(lanes=self.tile.lanes), f"float32x{self.tile.lanes}"
        return {"dot": lambda *operands: T.call_pure_extern(kind, name, *operands)}

    def _left(self, row: int, group: int, at: list):
        *first, last = self.tile.a(row, group, at)
        lanes = self.tile.lanes if self.tile.over_groups else 1
        words = self.a[(*first, T.ramp(last, 1, EACH[self.tile.form] * lanes))]
        return self._spread(T.reinterpret(f"int32x{lanes}" if lanes > 1 else "int32", words), lanes)


class _ByteProduct(_HalfProduct):
    """Words of four bytes, whose products are added up in int32, exactly."""

    @property
    def sums(self) -> dict[str, Any]:
        """Integers that start below zero by what the bytes of ``a`` are too large."""

        def start(_line: int, v: int):
            return self._spread(*self._columns(self.tile.more(0, self._column(v))[0]))

        def dot(total, left, right):
            return byte_dot(total, left, right, self.tile.lanes)

        return {"start": start, "dtype": "int32", "dot": dot}

    def _value(self, total, row: int, v: int):
        tile, lanes = self.tile, self.tile.lanes
        bits, many = self._columns(tile.more(0, self._column(v))[1])
        scale = T.reinterpret("float32" if many == 1 else f"float32x{many}", bits)
        row_scale = T.broadcast(self.buffers[3][tile.s(row)], lanes)
        return T.cast(total, f"float32x{lanes}") * row_scale * self._spread(scale, many)


_FORMS = {BYTES: _ByteProduct, HALVES: _HalfProduct}


def byte_dot(total, left, right, lanes: int, *, dots: bool = True):
    """Return ``total`` plus the products of words, by the instruction of 512 or of 256 bits.

    Without ``dots`` pairs of bytes are widened to 16 bits first: exact on every CPU.
    """
    if not dots:
        return _pair_dot(total, left, right, lanes)
    name = f"llvm.x86.avx512.vpdpbusd.{lanes * 32}"
    words = (T.reinterpret(f"int8x{4 * lanes}", value) for value in (left, right))
    return T.call_llvm_pure_intrin(
        T.llvm_lookup_intrinsic_id(name), total, *words, dtype=f"int32x{lanes}"
    )


PAIRS = {4: "sse2.pmadd.wd", 8: "avx2.pmadd.wd", 16: "avx512.pmaddw.d.512"}


def _pair_dot(total, left, right, lanes: int):
    """Return ``total`` plus products of unsigned by signed bytes: those in even places, then odd.

    ``pmaddubsw`` multiplies bytes, but its sums of two saturate.
    """
    mask = T.broadcast(T.int32(0x00FF00FF), lanes)
    eight = T.broadcast(T.int16(8), 2 * lanes)
    whole = T.reinterpret(f"int16x{2 * lanes}", right)
    unsigned = left & mask, (left >> T.broadcast(T.int32(8), lanes)) & mask
    signed = (whole << eight) >> eight, whole >> eight
    number = T.llvm_lookup_intrinsic_id(f"llvm.x86.{PAIRS[lanes]}")
    for a, b in zip(unsigned, signed, strict=True):
        pairs = T.reinterpret(f"int16x{2 * lanes}", a)
        total = total + T.call_llvm_pure_intrin(number, pairs, b, dtype=f"int32x{lanes}")
    return total


def _starts(tile: Tile) -> list[tuple]:
    return [(i64(0),) * len(shape) for shape in tile.span]


def _tile_arguments(tile: Tile, *, strided: bool = False) -> tuple:
    """Declare a, b and c of a tile, whose rows, where they are an axis, are any distance apart."""

    def declare(name: str, shape: tuple[int, ...], dtype: str):
        layout = {"strides": [symbol(f"ld{name}"), 1]} if strided and len(shape) > 1 else {}
        return argument(name, shape, dtype, offset_factor=1, **layout)

    arguments = zip("abcs", tile.span, tile.dtypes, strict=False)
    return tuple(declare(name, shape, dtype) for name, shape, dtype in arguments)
