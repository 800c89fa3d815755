"""The hidden products of one step of a recurrent layer, and what is done with each sum at once."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

from tvm import tirx
from tvm.ir import Expr
from tvm.script.ir_builder import tirx as T

from tvmstruct.schedules.builder import i64, loops
from tvmstruct.schedules.compute.chain import GAP, RowNest, StagedProduct
from tvmstruct.schedules.compute.dense import row_segments
from tvmstruct.schedules.compute.product_tile import Tile
from tvmstruct.schedules.compute.recurrence import unit_blocks
from tvmstruct.schedules.compute.row_steps import Scratch
from tvmstruct.schedules.x86.attention_tile import ramp, scratch, spread
from tvmstruct.schedules.x86.chain import SHARED_MACS
from tvmstruct.schedules.x86.packed_dense import HEIGHTS
from tvmstruct.schedules.x86.register_tile import accumulate
from tvmstruct.stages import Program
from tvmstruct.targets import Isa

WIDTH = 2  # vectors of units whose gates are summed together

Sums = Sequence[Expr]
Update = Callable[[Expr, Expr, int, Sums], None]  # row, first unit, units, a sum for each gate


class Product(Protocol):
    """``update`` of the sums of all gates of each vector of units of each row."""

    @property
    def buffers(self) -> list[tirx.Buffer]:
        """Memory that a step writes."""
        ...

    def begin(self) -> None:
        """Prepare the memory once for all steps."""
        ...

    def emit(self, source: tirx.Buffer, place: Expr, update: Update) -> None:
        """Multiply rows of ``source`` from ``place`` on."""
        ...


@dataclass(frozen=True)
class Shape:
    """``batch`` rows of ``h`` units, ``padded`` apart, shared by ``workers`` threads."""

    isa: Isa
    batch: int
    h: int
    workers: int

    @property
    def padded(self) -> int:
        """Units of a row with those that fill its last vector."""
        return -(-self.h // self.isa.lanes) * self.isa.lanes

    @property
    def sums(self) -> int:
        """Vectors of sums that leave registers for operands."""
        return self.isa.registers * 3 // 4


@dataclass(frozen=True)
class DenseProduct:
    """Blocks of units, packed by `pack_units`, meet tiles of rows; sums stay in registers."""

    shape: Shape
    gates: int
    w: tirx.Buffer

    @property
    def buffers(self) -> list[tirx.Buffer]:
        """Memory that a step writes."""
        return []

    def begin(self) -> None:
        """Prepare nothing."""

    def emit(self, source: tirx.Buffer, place: Expr, update: Update) -> None:
        """Multiply rows of ``source`` from ``place`` on: whole blocks, then the last one."""
        h, lanes = self.shape.h, self.shape.isa.lanes
        blocks = unit_blocks(h, lanes, WIDTH)
        whole = h // (WIDTH * lanes)
        turns = [(number, n, h - v * lanes) for number, (v, n) in enumerate(blocks[whole:], whole)]
        if self.shape.workers > 1:
            with T.parallel(T.int64(0), T.int64(len(blocks))) as number:
                if whole:
                    with T.If(number < whole), T.Then():
                        self._block(number, WIDTH, WIDTH * lanes, source, place, update)
                for last, vectors, units in turns:
                    with T.If(number == last), T.Then():
                        self._block(i64(last), vectors, units, source, place, update)
            return
        if whole:
            with loops(whole) as (number,):
                self._block(number, WIDTH, WIDTH * lanes, source, place, update)
        for last, vectors, units in turns:
            self._block(i64(last), vectors, units, source, place, update)

    def _block(
        self, number: Expr, vectors: int, units: int, source: tirx.Buffer, place: Expr,
        update: Update,
    ) -> None:  # fmt: skip
        """Emit a block of ``units`` in ``vectors``, tile after tile of rows."""
        lanes, gates = self.shape.isa.lanes, self.gates
        start = number * (self.shape.h * gates * WIDTH * lanes)
        for first, height, tiles in self._tiles(gates * vectors):
            with loops(tiles) as (tile,):
                row = first + tile * height
                sums = self._sums((height, gates * vectors), start, source, place, row)
                for line in range(height):
                    for v in range(vectors):
                        u = [sums[gate * vectors + v][line] for gate in range(gates)]
                        unit = number * (WIDTH * lanes) + v * lanes
                        update(row + line, unit, min(lanes, units - v * lanes), u)

    def _tiles(self, columns: int) -> list[tuple[int, int, int]]:
        """Cut the rows into (first row, height, tiles) whose sums fit in registers."""
        batch = self.shape.batch
        most = max(1, min(batch, self.shape.sums // columns))
        whole, rest = divmod(batch, most)
        return [(0, most, whole), *([(whole * most, rest, 1)] if rest else [])]

    def _sums(
        self, tile: tuple[int, int], start: Expr, source: tirx.Buffer, place: Expr, row: Expr
    ) -> list[list[Expr]]:
        """Return the sums of a tile as ``[column][line]``; a column is a vector of a gate."""
        height, columns = tile
        lanes, padded = self.shape.isa.lanes, self.shape.padded

        def step(p: Expr, add: Callable[[int, int, Expr, Expr], None]) -> None:
            for column in range(columns):
                right = self.w[ramp(start + p * (columns * lanes) + column * lanes, lanes)]
                for line in range(height):
                    left = source[place + (row + line) * padded + p]
                    add(line, column, spread(left, lanes), right)

        return accumulate(self.shape.isa, lanes, tile, self.shape.h, step)


class StructuredProduct:
    """The stages of a structured operator on all rows; its sums, which are few, are read again."""

    def __init__(
        self,
        shape: Shape,
        gates: int,
        program: Program,
        weights: list[tirx.Buffer],
        tiles: dict[Tile, int],
    ) -> None:
        self.shape, self.gates, self.weights = shape, gates, weights
        isa, batch = shape.isa, shape.batch
        mode = "stages" if shape.workers > 1 else "none"
        self.products: list[tuple[int, StagedProduct]] = []  # from which row on
        for part in row_segments(batch, HEIGHTS[isa.name]):
            rows, height = int(part.count) * part.height, part.height
            nest = RowNest((height,), rows, mode, shape.sums, shape.workers, SHARED_MACS)
            product = StagedProduct(program, nest, isa.lanes, tiles, rows)
            self.products.append((int(part.start), product))
        sizes = (product.scratch() for _, product in self.products)
        most = [max(size) for size in zip(*sizes, strict=True)]
        self.between = [scratch(n) if n else None for n in most]
        stride = gates * shape.h + GAP
        self.sums = Scratch(scratch(batch * stride + isa.lanes), stride)

    @property
    def buffers(self) -> list[tirx.Buffer]:
        """Memory that a step writes."""
        return [self.sums.buffer, *(b for b in self.between if b is not None)]

    def begin(self) -> None:
        """Clear the sums: the last vector of units reaches into what follows them."""
        with loops(self.sums.buffer.shape[0]) as (i,):
            T.buffer_store(self.sums.buffer, T.float32(0), [i])

    def emit(self, source: tirx.Buffer, place: Expr, update: Update) -> None:
        """Multiply rows of ``source`` from ``place`` on."""
        shape, lanes = self.shape, self.shape.isa.lanes
        for start, product in self.products:
            rows = Scratch(source, shape.padded, place + start * shape.padded)
            sums = Scratch(self.sums.buffer, self.sums.stride, start * self.sums.stride)
            product.emit(rows, sums, self.weights, self.between)
        whole, rest = divmod(shape.h, lanes)

        def units(row: Expr, unit: Expr, count: int) -> None:
            first = row * self.sums.stride + unit
            places = (ramp(first + gate * shape.h, lanes) for gate in range(self.gates))
            update(row, unit, count, [self.sums.buffer[place] for place in places])

        with loops(shape.batch) as (row,):
            if whole:
                with loops(whole) as (v,):
                    units(row, v * lanes, lanes)
            if rest:
                units(row, i64(whole * lanes), rest)
