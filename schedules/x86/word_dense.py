"""What the dense kernels of low precision share: parallel panels of words, row segments, epilogue.

The weight is packed in words (see ``compute/low_precision.py``), two vectors of columns to a
panel. A kernel brings its own arithmetic: how x is prepared, once per call, and how a tile of
sums is made. Everything else is here.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from itertools import product
from typing import Protocol

from tvm import tirx
from tvm.script.ir_builder import tirx as T

from tvmstruct.schedules.builder import argument, i64, loops, prim_func, symbol
from tvmstruct.schedules.compute.dense import (
    ACTIVATIONS,
    CHEAP,
    Epilogue,
    row_segments,
    tile_heights,
)
from tvmstruct.schedules.compute.layer_norm import RowNorm
from tvmstruct.schedules.registry import Kernel, Pick, Space, divisors, make_kernel
from tvmstruct.schedules.vector_math import replace_math
from tvmstruct.targets import Isa

VECTORS = 2  # of columns in a tile
HEIGHTS = {"avx512": (8, 4, 2, 1), "avx2": (4, 2, 1), "sse": (4, 2, 1)}
SERIAL_MACS = 1 << 18  # under this much work, waking a second thread costs more than it saves
MAYBE_SERIAL = 8  # up to so many times that, tuning tries one thread too
SERIAL_ELEMENTS = 1 << 14  # of x, to prepare: the same limit
BLOCK_BYTES = 1 << 18  # of prepared x, a quarter of a second-level cache
MOST_ROWS, TALLEST = 128, 8

Tile = tuple[int, object, object]  # height, first row, panel


class Arithmetic(Protocol):
    """How one kind of number is multiplied; the methods emit code.

    ``prepares`` says whether x changes its form before the product. ``llvm`` is LLVM source that
    the kernel calls into: TVM has no bfloat16 vectors of its own, so what LLVM's intrinsics want
    is made inside LLVM, in functions that vanish by inlining.
    """

    prepares: bool
    llvm: str

    def declare(self) -> None:
        """Declare the arguments that hold the weight."""
        ...

    def prepare(self, x, m, parallel: bool) -> None:
        """Bring x into the form that the product reads."""
        ...

    def sums(self, tile: Tile) -> list[list]:
        """Return ``x @ w`` for a tile as float32 vectors ``[column][line]``."""
        ...


@dataclass(frozen=True)
class Problem:
    """What the code of a kernel depends on: what it computes, and in which order.

    A turn of the outer loop, of which threads take a share each if ``parallel``, is one panel
    and one block of rows; the panels of a block follow each other, or with ``blocks_first``
    unset the blocks of a panel.
    """

    isa: Isa
    n: int
    k: int
    epilogue: Epilogue
    rows: int | None  # None: any number
    heights: tuple[int, ...]  # of tiles
    block: int  # rows of x that stay in cache while the panels pass by
    parallel: bool
    many: bool  # whether preparing x is worth several threads
    blocks_first: bool = True
    multiple: int = 1  # of words along k in the packed weight

    @classmethod
    def of(
        cls, isa: Isa, n: int, k: int, epilogue: Epilogue, rows: int, *, multiple: int = 1
    ) -> Problem:
        """Return the problem for ``rows`` rows, which matter only through three classes."""
        parallel, many = rows * n * k > SERIAL_MACS, rows > 1 and rows * k > SERIAL_ELEMENTS
        order = ((1,), 1) if rows == 1 else (HEIGHTS[isa.name], _block_rows(k))
        one = 1 if rows == 1 else None
        return cls(isa, n, k, epilogue, one, *order, parallel, many, multiple=multiple)

    @property
    def width(self) -> int:
        """Columns of a panel."""
        return panel_width(self.isa)

    @property
    def panels(self) -> int:
        """Panels of the packed weight, the last one padded."""
        return -(-self.n // self.width)

    def words(self, group: int):
        """Declare the packed weight with ``group`` consecutive k to a word."""
        words = -(-self.k // (group * self.multiple)) * self.multiple
        return argument("w", (i64(self.panels), i64(words), i64(self.width)), "int32")

    @property
    def key(self) -> tuple[object, ...]:
        """What tells this code from any other that ``of`` returns."""
        flags = (self.rows == 1, self.parallel, self.many, self.multiple)
        return (self.isa.name, self.n, self.k, self.epilogue, *flags)

    @property
    def parameters(self) -> str:
        """What is computed, for the key of a record."""
        return f"{self.n} {self.k} {self.epilogue.words}"

    def place(self, turn, blocks) -> tuple:
        """Return the first row and the panel of a turn."""
        if self.blocks_first:
            return turn // self.panels * self.block, turn % self.panels
        return turn % blocks * self.block, turn // blocks


def panel_width(isa: Isa) -> int:
    """Columns of a panel of words."""
    return VECTORS * isa.lanes


def _block_rows(k: int) -> int:
    rows = BLOCK_BYTES // (2 * k) // TALLEST * TALLEST
    return max(2 * TALLEST, min(MOST_ROWS, rows))


def word_dense(name: str, problem: Problem, make: Callable[[Problem], Arithmetic]) -> Kernel:
    """Return the kernel ``name``: x, the weight's arguments, and those of `Finish`."""

    def build(problem: Problem) -> tirx.PrimFunc:
        return replace_math(prim_func(lambda: _emit(problem, make(problem))))

    def build_tuned(rows: int, pick: Pick) -> tirx.PrimFunc:
        return build(_choose(problem, rows, pick, make(problem).prepares))

    space = Space(problem.parameters, build_tuned)
    work = problem.n * problem.k
    return make_kernel(name, problem.key, lambda: build(problem), work=work, space=space)


def _choose(problem: Problem, rows: int, pick: Pick, prepares: bool) -> Problem:
    """Return the problem for exactly ``rows`` rows in the order of choice."""
    most = min(rows, (problem.isa.registers - 4) // VECTORS)  # sums, and operands of a product
    height = pick("height", range(min(most, 3), most + 1), min(rows, problem.heights[0]))
    block = min(rows, problem.block)
    block = pick("block", sorted({block, *divisors(rows, height, rows)}), block)
    heights = tile_heights(height, None if rows % block else block)
    return choose_order(replace(problem, heights=heights), rows, block, pick, prepares)


def choose_order(problem: Problem, rows: int, block: int, pick: Pick, prepares: bool) -> Problem:
    """Return the problem for exactly ``rows`` rows with the choices that all kernels share."""
    first = pick("blocks_first", (0, 1) if block < rows else (1,), 1)
    small = rows * problem.n * problem.k <= MAYBE_SERIAL * SERIAL_MACS
    parallel = pick("parallel", (0, 1) if small else (1,), int(problem.parallel))
    many = problem.many
    if prepares and rows > 1:
        many = bool(pick("parallel_prepare", (0, 1), int(many)))
    order = {"blocks_first": bool(first), "parallel": bool(parallel), "many": many}
    return replace(problem, rows=rows, block=block, **order)


def _emit(problem: Problem, arithmetic: Arithmetic) -> None:
    m = symbol("m") if problem.rows is None else i64(problem.rows)
    x = argument("x", (m, i64(problem.k)))
    arithmetic.declare()
    finish = Finish.declare(problem, m)
    with T.attr(T.int64(0), "pragma_import_llvm", arithmetic.llvm):
        arithmetic.prepare(x, m, problem.many)
        _panels(problem, arithmetic, m, finish)
        finish.rows(m)


def _panels(problem: Problem, arithmetic: Arithmetic, m, finish: Finish) -> None:
    """Emit all tiles, turn by turn."""
    full, ragged = divmod(problem.n, problem.width)
    size, rows = problem.block, problem.rows
    blocks = (m + size - 1) // size

    def block(panel, first, store: Callable[[Tile, list[list]], None]) -> None:
        whole = rows is not None and rows % size == 0
        for s in row_segments(size if whole else T.min(i64(size), m - first), problem.heights):
            with loops(s.count) as (t,):
                tile = (s.height, first + s.start + t * s.height, panel)
                store(tile, arithmetic.sums(tile))

    with loops(blocks * problem.panels, kind=T.parallel if problem.parallel else None) as (turn,):
        first, panel = problem.place(turn, blocks)
        if not ragged:
            block(panel, first, finish.whole)
            return
        with T.If(panel < full):
            with T.Then():
                block(panel, first, finish.whole)
            with T.Else():
                part = partial(finish.part, columns=ragged)
                block(i64(full), first, part)


@dataclass
class Finish:
    """Stores a tile of sums through the epilogue."""

    problem: Problem
    bias: object
    residual: object
    norm: RowNorm | None
    y: object

    @classmethod
    def declare(cls, problem: Problem, m) -> Finish:
        """Declare the last arguments: [bias], [residual], [gamma, beta], y."""
        n, epilogue = i64(problem.n), problem.epilogue
        bias = argument("bias", (n,)) if epilogue.bias else None
        residual = argument("residual", (m, n)) if epilogue.residual else None
        norm = RowNorm.declare(problem.isa.lanes, problem.n, epilogue.norm)
        return cls(problem, bias, residual, norm, argument("y", (m, n)))

    def rows(self, m) -> None:
        """Normalise all rows, once they are complete."""
        if self.norm is not None:
            self.norm.emit(self.y, i64(0), m, parallel=self.problem.parallel)

    def whole(self, tile: Tile, sums: list[list]) -> None:
        """Store all columns: from registers, or through the stack where the code is long."""
        height, row, panel = tile
        lanes, base = self.problem.isa.lanes, panel * self.problem.width
        if self.problem.epilogue.activation in CHEAP:
            for i, v in product(range(height), range(VECTORS)):
                self._store(sums[v][i], row + i, base + v * lanes, lanes)
            return
        self.part(tile, sums, self.problem.width)

    def part(self, tile: Tile, sums: list[list], columns: int) -> None:
        """Store the first ``columns`` columns."""
        height, row, panel = tile
        lanes = self.problem.isa.lanes
        saved = self._save(height, sums)
        with loops(height) as (i,):

            def value(at: int, size: int):
                place = i * lanes + at % lanes
                return saved[at // lanes][T.ramp(place, 1, size) if size > 1 else place]

            self.row(row + i, panel, columns, value)

    def row(self, row, panel, columns: int, value: Callable[[int, int], object]) -> None:
        """Store ``value(at, size)`` for the first columns of a panel, in vectors as wide as fit."""
        at, base = 0, panel * self.problem.width
        while at < columns:
            size = self.problem.isa.lanes
            while at + size > columns:
                size //= 2
            self._store(value(at, size), row, base + at, size)
            at += size

    def _save(self, height: int, sums: list[list]) -> list:
        lanes = self.problem.isa.lanes
        saved = [
            T.alloc_buffer((height * lanes,), "float32", scope="global") for _ in range(VECTORS)
        ]
        for i, v in product(range(height), range(VECTORS)):
            T.buffer_store(saved[v], sums[v][i], [T.ramp(i * lanes, 1, lanes)])
        return saved

    def _store(self, value, row, column, lanes: int) -> None:
        at = T.ramp(column, 1, lanes) if lanes > 1 else column
        if self.bias is not None:
            value = value + self.bias[at]
        value = ACTIVATIONS[self.problem.epilogue.activation](value)
        if self.residual is not None:
            value = value + self.residual[row, at]
        T.buffer_store(self.y, value, [row, at])
