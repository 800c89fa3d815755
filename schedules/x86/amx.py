"""Dense layers on AMX: tiles of 16 rows by 16 columns, two by two, in bfloat16 or int8.

A tile register holds 16 rows of 64 bytes. One instruction adds to a tile of sums the product of
a tile of x, 16 rows of 16 words, and one of w, 16 words along k of 16 columns; packed words are
in that layout already. The shapes of the tiles are state of a thread, so every turn of the
parallel loop loads them. ``host_features`` asks Linux for the registers.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from itertools import product
from typing import Protocol

import numpy as np
from tvm import tirx
from tvm.script.ir_builder import tirx as T

from tvmstruct.schedules.builder import argument, i64, loops, prim_func, symbol
from tvmstruct.schedules.compute.dense import Epilogue
from tvmstruct.schedules.registry import Kernel, Pick, Space, make_kernel
from tvmstruct.schedules.vector_math import replace_math
from tvmstruct.schedules.x86 import bf16_dense, int8_dense
from tvmstruct.schedules.x86.bf16_dense import LLVM, round_row, row_stride, scratch
from tvmstruct.schedules.x86.int8_dense import declare_columns, quantize_row
from tvmstruct.schedules.x86.word_dense import Finish, Problem, choose_order
from tvmstruct.targets import Isa

ROWS = 16  # of a tile; also its words along k, and its columns
BLOCK = 2 * ROWS  # rows and columns under four tiles of sums
LEFT, RIGHT = (4, 5), (6, 7)  # tile registers; 0 to 3 hold the sums
BLOCKS = (32, 64, 128, 256, 512)  # rows of a block to choose from
FEW = 8  # up to so many rows, vector dot products waste less


class Tiles(Protocol):
    """The tile registers; offsets count elements of the buffer, strides words of four bytes."""

    def begin(self) -> None:
        """Load the shapes of the tiles into this thread."""
        ...

    def zero(self, tile: int) -> None:
        """Set a tile to zero."""
        ...

    def load(self, tile: int, buffer, offset, stride: int) -> None:
        """Read a tile from memory."""
        ...

    def dot(self, total: int, left: int, right: int) -> None:
        """Add the product of two tiles to a third."""
        ...

    def store(self, tile: int, buffer, offset, stride: int) -> None:
        """Write a tile to memory."""
        ...

    def end(self) -> None:
        """Give the registers back."""
        ...


class AmxTiles:
    """The registers of the CPU; ``product`` names LLVM's intrinsic."""

    def __init__(self, product: str) -> None:
        self.product = product

    def begin(self) -> None:
        """Load palette 1 with eight tiles of 16 rows of 64 bytes."""
        shapes = np.zeros(64, np.uint8)
        shapes[0], shapes[16:32:2], shapes[48:56] = 1, 64, ROWS
        words = T.alloc_buffer((ROWS,), "int32", scope="global")
        for i, word in enumerate(shapes.view(np.int32).tolist()):
            T.buffer_store(words, T.int32(word), [i])
        # Not access_ptr, which insists on the type of memory that TVM may share with floats.
        _intrinsic("ldtilecfg", T.address_of(words[0]))

    def zero(self, tile: int) -> None:
        """Set a tile to zero."""
        _intrinsic("tilezero", T.uint8(tile))

    def load(self, tile: int, buffer, offset, stride: int) -> None:
        """Read a tile from memory."""
        place = buffer.access_ptr("r", offset=offset)
        _intrinsic("tileloadd64", T.uint8(tile), place, T.int64(4 * stride))

    def dot(self, total: int, left: int, right: int) -> None:
        """Add the product of two tiles to a third."""
        _intrinsic(self.product, *map(T.uint8, (total, left, right)))

    def store(self, tile: int, buffer, offset, stride: int) -> None:
        """Write a tile to memory."""
        place = buffer.access_ptr("w", offset=offset)
        _intrinsic("tilestored64", T.uint8(tile), place, T.int64(4 * stride))

    def end(self) -> None:
        """Give the registers back, which makes switching threads cheap again."""
        _intrinsic("tilerelease")


def amx_bf16_dense(isa: Isa, n: int, k: int, epilogue: Epilogue, rows: int) -> Kernel:
    """Return dense on bfloat16 tiles, or on vectors where rows are few: x, w, ... as there."""
    if rows <= FEW:
        return bf16_dense.bf16_dense(isa, n, k, epilogue, rows, multiple=ROWS)
    problem = tile_problem(isa, n, k, epilogue, rows)
    return _kernel("amx_bf16_dense", problem, lambda p: Bf16(p, AmxTiles("tdpbf16ps")))


def amx_int8_dense(isa: Isa, n: int, k: int, epilogue: Epilogue, rows: int) -> Kernel:
    """Return dense on int8 tiles, or on vectors where rows are few: x, w, start, ... as there."""
    if rows <= FEW:
        return int8_dense.int8_dense(isa, n, k, epilogue, rows, multiple=ROWS)
    problem = tile_problem(isa, n, k, epilogue, rows)
    return _kernel("amx_int8_dense", problem, lambda p: Int8(p, AmxTiles("tdpbusd")))


def tile_problem(isa: Isa, n: int, k: int, epilogue: Epilogue, rows: int) -> Problem:
    """Return the problem for ``rows`` rows on whole tiles."""
    problem = Problem.of(isa, n, k, epilogue, rows, multiple=ROWS)
    return replace(problem, rows=None, block=max(BLOCK, problem.block // BLOCK * BLOCK))


def _kernel(name: str, problem: Problem, make: Callable[[Problem], Bf16 | Int8]) -> Kernel:
    def build() -> tirx.PrimFunc:
        return tile_dense(problem, make(problem))

    def build_tuned(rows: int, pick: Pick) -> tirx.PrimFunc:
        chosen = choose_blocks(problem, rows, pick)
        return tile_dense(chosen, make(chosen))

    space = Space(problem.parameters, build_tuned)
    return make_kernel(name, problem.key, build, work=problem.n * problem.k, space=space)


def choose_blocks(problem: Problem, rows: int, pick: Pick) -> Problem:
    """Return the problem for exactly ``rows`` rows in the order of choice."""
    sizes = sorted({problem.block, *(size for size in BLOCKS if size < rows + BLOCK)})
    block = pick("block", sizes, problem.block)
    return choose_order(problem, rows, block, pick, prepares=True)


def tile_dense(problem: Problem, arithmetic: Bf16 | Int8) -> tirx.PrimFunc:
    """Return the PrimFunc of a tiled kernel."""
    return replace_math(prim_func(lambda: _emit(problem, arithmetic)))


class Bf16:
    """Pairs of bfloat16: sums come out as they are."""

    group, sums, llvm = 2, "float32", LLVM

    def __init__(self, problem: Problem, tiles: Tiles) -> None:
        self.problem, self.tiles = problem, tiles

    def declare(self) -> None:
        """Declare the weight."""
        self.w = self.problem.words(self.group)

    def prepare(self, x, rows, stride: int) -> None:
        """Allocate x in words."""
        self.x = scratch(rows, stride, "int32")

    def prepare_row(self, x, row, stride: int) -> None:
        """Round one row of x."""
        round_row(x, self.x, row, row * stride, self.problem.k)

    def finish(self, total, row, at):
        """Return y before its epilogue."""
        return total


class Int8:
    """Bytes: rows of x are shifted by 128 and scaled, as in ``int8_dense``."""

    group, sums, llvm = 4, "int32", ""

    def __init__(self, problem: Problem, tiles: Tiles) -> None:
        self.problem, self.tiles = problem, tiles

    def declare(self) -> None:
        """Declare the weight."""
        self.w = self.problem.words(self.group)
        self.start, self.scale = declare_columns(self.problem)

    def prepare(self, x, rows, stride: int) -> None:
        """Allocate x in bytes, and the scales of its rows."""
        self.x = scratch(rows, 4 * stride, "uint8")
        self.row_scale = scratch(rows, 1, "float32")

    def prepare_row(self, x, row, stride: int) -> None:
        """Round one row of x."""
        quantize_row(x, (self.x, row * (4 * stride)), self.row_scale, row, self.problem.k)

    def finish(self, total, row, at):
        """Return y before its epilogue."""
        lanes = total.ty.dtype.lanes
        value = T.cast(total + self.start[at], f"float32x{lanes}" if lanes > 1 else "float32")
        scale = self.row_scale[row]
        return value * (T.broadcast(scale, lanes) if lanes > 1 else scale) * self.scale[at]


def _emit(problem: Problem, arithmetic: Bf16 | Int8) -> None:
    m = symbol("m") if problem.rows is None else i64(problem.rows)
    x = argument("x", (m, i64(problem.k)))
    arithmetic.declare()
    finish = Finish.declare(problem, m)
    stride = row_stride(-(-problem.k // arithmetic.group))
    with T.attr(T.int64(0), "pragma_import_llvm", arithmetic.llvm):
        rows = (m + BLOCK - 1) // BLOCK * BLOCK  # a tile reads rows that do not exist
        arithmetic.prepare(x, rows, stride)
        with loops(m, kind=T.parallel if problem.many else None) as (row,):
            arithmetic.prepare_row(x, row, stride)
        size = problem.block
        blocks = (m + size - 1) // size
        kind = T.parallel if problem.parallel else None
        with loops(blocks * problem.panels, kind=kind) as (turn,):
            first, panel = problem.place(turn, blocks)
            _block(problem, arithmetic, finish, (first, T.min(m, first + size), panel), stride)
        finish.rows(m)


def _block(problem: Problem, arithmetic: Bf16 | Int8, finish: Finish, place, stride: int) -> None:
    """Compute the rows from ``first`` to ``end`` in one panel."""
    first, end, panel = place
    tiles, words = arithmetic.tiles, -(-problem.k // (arithmetic.group * ROWS)) * ROWS
    out = T.alloc_buffer((BLOCK * BLOCK,), arithmetic.sums, scope="global")
    scale = 4 if isinstance(arithmetic, Int8) else 1  # elements of prepared x to a word
    tiles.begin()
    with loops((end - first + BLOCK - 1) // BLOCK) as (t,):
        row = first + t * BLOCK
        for total in range(4):
            tiles.zero(total)
        with loops(words // ROWS) as (p,):
            for i, tile in enumerate(LEFT):
                offset = (row + i * ROWS) * stride + p * ROWS
                tiles.load(tile, arithmetic.x, offset * scale, stride)
            for j, tile in enumerate(RIGHT):
                offset = (panel * words + p * ROWS) * BLOCK + j * ROWS
                tiles.load(tile, arithmetic.w, offset, BLOCK)
            for i, j in product(range(2), range(2)):
                tiles.dot(2 * i + j, LEFT[i], RIGHT[j])
        for i, j in product(range(2), range(2)):
            tiles.store(2 * i + j, out, i64(i * ROWS * BLOCK + j * ROWS), BLOCK)
        with loops(T.min(i64(BLOCK), end - row)) as (i,):
            _finish_row(problem, arithmetic, finish, (row + i, panel), out, i * BLOCK)
    tiles.end()


def _finish_row(problem: Problem, arithmetic, finish: Finish, at, out, start) -> None:
    row, panel = at

    def value(column: int, size: int):
        def vector(base):
            return T.ramp(base + column, 1, size) if size > 1 else base + column

        return arithmetic.finish(out[vector(start)], row, vector(panel * BLOCK))

    full, ragged = divmod(problem.n, BLOCK)
    if not ragged:
        finish.row(row, panel, BLOCK, value)
        return
    with T.If(panel < full):
        with T.Then():
            finish.row(row, panel, BLOCK, value)
        with T.Else():
            finish.row(row, panel, ragged, value)


def _intrinsic(name: str, *args) -> None:
    identity = T.llvm_lookup_intrinsic_id(f"llvm.x86.{name}")
    T.evaluate(T.call_llvm_intrin(identity, *args, dtype="int32"))
