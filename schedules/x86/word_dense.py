"""What the dense kernels of low precision share: parallel panels of words, row segments, epilogue.

The weight is packed in words (see ``compute/low_precision.py``), two vectors of columns to a
panel. A kernel brings its own arithmetic: how x is prepared, once per call, and how a tile of
sums is made. Everything else is here.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from itertools import product
from typing import Protocol

from tvm import tirx
from tvm.script.ir_builder import tirx as T

from tvmstruct.schedules.builder import argument, i64, loops, prim_func, symbol
from tvmstruct.schedules.compute.dense import ACTIVATIONS, CHEAP, Epilogue, row_segments
from tvmstruct.schedules.registry import Kernel, make_kernel
from tvmstruct.schedules.vector_math import replace_math
from tvmstruct.targets import Isa

VECTORS = 2  # of columns in a tile
HEIGHTS = {"avx512": (8, 4, 2, 1), "avx2": (4, 2, 1), "sse": (4, 2, 1)}
SERIAL_MACS = 1 << 18  # under this much work, waking a second thread costs more than it saves
SERIAL_ELEMENTS = 1 << 14  # of x, to prepare: the same limit
BLOCK_BYTES = 1 << 18  # of prepared x, a quarter of a second-level cache
MOST_ROWS, TALLEST = 128, 8

Tile = tuple[int, object, object]  # height, first row, panel


class Arithmetic(Protocol):
    """How one kind of number is multiplied; the methods emit code.

    ``llvm`` is LLVM source that the kernel calls into: TVM has no bfloat16 vectors of its own, so
    what LLVM's intrinsics want is made inside LLVM, in functions that vanish by inlining.
    """

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
    """What the code of a kernel depends on."""

    isa: Isa
    n: int
    k: int
    epilogue: Epilogue
    single: bool
    parallel: bool
    many: bool  # whether preparing x is worth several threads
    multiple: int = 1  # of words along k in the packed weight

    @classmethod
    def of(
        cls, isa: Isa, n: int, k: int, epilogue: Epilogue, rows: int, *, multiple: int = 1
    ) -> Problem:
        """Return the problem for ``rows`` rows, which matter only through three classes."""
        parallel, many = rows * n * k > SERIAL_MACS, rows > 1 and rows * k > SERIAL_ELEMENTS
        return cls(isa, n, k, epilogue, rows == 1, parallel, many, multiple)

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
    def block(self) -> int:
        """Rows of x that stay in cache while the panels pass by."""
        rows = BLOCK_BYTES // (2 * self.k) // TALLEST * TALLEST
        return max(2 * TALLEST, min(MOST_ROWS, rows))

    @property
    def key(self) -> tuple[object, ...]:
        """What tells this code from any other."""
        flags = (self.single, self.parallel, self.many, self.multiple)
        return (self.isa.name, self.n, self.k, self.epilogue, *flags)


def panel_width(isa: Isa) -> int:
    """Columns of a panel of words."""
    return VECTORS * isa.lanes


def word_dense(
    name: str, problem: Problem, make: Callable[[], Arithmetic], *, key: tuple[object, ...] = ()
) -> Kernel:
    """Return the kernel ``name``: x, the weight's arguments, [bias], [residual], y."""

    def build() -> tirx.PrimFunc:
        return replace_math(prim_func(lambda: _emit(problem, make())))

    return make_kernel(name, (*problem.key, *key), build, work=problem.n * problem.k)


def _emit(problem: Problem, arithmetic: Arithmetic) -> None:
    m = i64(1) if problem.single else symbol("m")
    x = argument("x", (m, i64(problem.k)))
    arithmetic.declare()
    finish = Finish.declare(problem, m)
    with T.attr(T.int64(0), "pragma_import_llvm", arithmetic.llvm):
        arithmetic.prepare(x, m, problem.many)
        _panels(problem, arithmetic, m, finish)


def _panels(problem: Problem, arithmetic: Arithmetic, m, finish: Finish) -> None:
    """Emit all tiles: threads take panels of a block of rows, and few blocks when rows are many."""
    full, ragged = divmod(problem.n, problem.width)
    size = problem.block
    blocks = 1 if problem.single else (m + size - 1) // size

    def block(panel, first, store: Callable[[Tile, list[list]], None]) -> None:
        count = 1 if problem.single else T.min(i64(size), m - first)
        for s in row_segments(count, (1,) if problem.single else HEIGHTS[problem.isa.name]):
            with loops(s.count) as (t,):
                tile = (s.height, first + s.start + t * s.height, panel)
                store(tile, arithmetic.sums(tile))

    with loops(blocks * problem.panels, kind=T.parallel if problem.parallel else None) as (turn,):
        first, panel = turn // problem.panels * size, turn % problem.panels
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
    y: object

    @classmethod
    def declare(cls, problem: Problem, m) -> Finish:
        """Declare the last arguments: [bias], [residual], y."""
        n, epilogue = i64(problem.n), problem.epilogue
        bias = argument("bias", (n,)) if epilogue.bias else None
        residual = argument("residual", (m, n)) if epilogue.residual else None
        return cls(problem, bias, residual, argument("y", (m, n)))

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
