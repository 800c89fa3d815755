"""The hidden products of one step of a recurrent layer, and what is done with each sum at once."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import ClassVar, Protocol

from tvm import tirx
from tvm.ir import Expr
from tvm.script.ir_builder import tirx as T

from tvmstruct.schedules.builder import i64, loops
from tvmstruct.schedules.compute import product_tile
from tvmstruct.schedules.compute.chain import GAP, RowNest, StagedProduct
from tvmstruct.schedules.compute.dense import row_segments
from tvmstruct.schedules.compute.recurrence import Layout, Units
from tvmstruct.schedules.compute.row_steps import Scratch
from tvmstruct.schedules.compute.team import either_way, share
from tvmstruct.schedules.x86.attention_tile import ramp, registers, scratch, spread
from tvmstruct.schedules.x86.packed_dense import HEIGHTS
from tvmstruct.schedules.x86.register_tile import accumulate
from tvmstruct.stages import Program
from tvmstruct.targets import Isa

NEAR = 2 << 20  # bytes of weights of a thread, some of which stay in its second-level cache
WIDTH = 2  # vectors of units whose gates are summed together

Sums = Sequence[Expr]
Update = Callable[[Expr, Units, Sums], None]  # row, units, a sum for each gate


class Product(Protocol):
    """``update`` of the sums of all gates of each vector of units of each row."""

    @property
    def buffers(self) -> list[tirx.Buffer]:
        """Memory that a step writes."""
        ...

    def begin(self, state: tirx.Buffer) -> None:
        """Prepare the memory once for all steps from the first state."""
        ...

    def keep(self, row: Expr, units: Units, start: Expr, h: Expr) -> None:
        """Take note of new units of the state that begins at ``start``."""
        ...

    def emit(self, source: tirx.Buffer, place: Expr, odd: Expr, update: Update) -> None:
        """Multiply rows of ``source`` from ``place`` on; ``odd`` is 1 in every second step."""
        ...


@dataclass(frozen=True)
class Shape:
    """``batch`` rows of a state, shared by ``workers`` threads."""

    isa: Isa
    batch: int
    layout: Layout
    workers: int

    @property
    def h(self) -> int:
        """Hidden size."""
        return self.layout.groups * self.layout.each

    @property
    def sums(self) -> int:
        """Vectors of sums that leave registers for operands."""
        return self.isa.registers * 3 // 4

    def units(self, group: Expr, first: Expr | int, lanes: int, count: int) -> Units:
        """Return ``count`` units of a group from its unit ``first`` on."""
        at, groups = self.layout, self.layout.groups
        return Units(
            group * at.padded + first, group * at.each + first, lanes, count,
            first * groups + group, groups,
        )  # fmt: skip

    @contextmanager
    def turns(self, count: int, odd: Expr | None = None) -> Iterator[Expr]:
        """Loop over ``count`` turns, backwards if ``odd`` is 1.

        Threads share them, which wait for each other after it; each has the same in every step.
        """
        odd = i64(0) if odd is None else odd
        if self.workers == 1:
            with loops(count) as (turn,):
                yield either_way(turn, count, odd)
            return
        with share(count, odd) as turn:
            yield turn


@dataclass
class BlockProduct:
    """Dense blocks, one for each group of units, packed by `pack_units`; one block is dense.

    A few vectors of units of a block meet tiles of rows, and the sums of all their gates stay in
    registers until the units are updated. Every second step reads the weights from their end to
    their beginning: what the step before read last is still in the nearest cache. Weights that
    come from further away are always read forwards, which memory is better at.
    """

    joined: ClassVar[bool] = True  # whether a block may have vectors of two sizes
    shape: Shape
    gates: int
    w: tirx.Buffer

    @property
    def buffers(self) -> list[tirx.Buffer]:
        """Memory that a step writes."""
        return []

    def begin(self, state: tirx.Buffer) -> None:
        """Prepare nothing."""

    def keep(self, row: Expr, units: Units, start: Expr, h: Expr) -> None:
        """Keep nothing."""

    def emit(self, source: tirx.Buffer, place: Expr, odd: Expr, update: Update) -> None:
        """Multiply rows of ``source`` from ``place`` on: groups, and in each its vectors."""
        layout = self.shape.layout
        blocks, each = layout.blocks(WIDTH, self.gates if self.joined else 0), layout.each
        if 4 * int(self.w.shape[0]) > NEAR * self.shape.workers:
            odd = i64(0)
        like = sum([part[1:] for part in block] == [blocks[0][0][1:]] for block in blocks)
        if each < layout.padded:  # the last vector is not whole
            like = min(like, len(blocks) - 1)
        with self.shape.turns(layout.groups * len(blocks), odd) as turn:
            group, number = turn // len(blocks), turn % len(blocks)
            if like:
                _, lanes, vectors = blocks[0][0]
                with T.If(number < like), T.Then():
                    parts = [_Part(0, lanes, [lanes] * vectors)]
                    block = _Block(group, number * (lanes * vectors), parts, odd)
                    self._block(block, source, place, update)
            for last, block in enumerate(blocks[like:], like):
                begin = block[0][0]
                parts = [
                    _Part(first - begin, lanes, _counts(each - first, lanes, vectors))
                    for first, lanes, vectors in block
                ]
                with T.If(number == last), T.Then():
                    block = _Block(group, i64(begin), parts, odd)
                    self._block(block, source, place, update)

    def _block(self, block: _Block, source: tirx.Buffer, place: Expr, update: Update) -> None:
        """Emit a block, tile after tile of rows."""
        size, lanes = self._row(block)
        for top, height, tiles in self._tiles(size // lanes):
            with loops(tiles) as (tile,):
                row = top + tile * height
                sums = self._sums(Tile(block, height), source, place, row)
                for line in range(height):
                    for units, u in self._units(block, [column[line] for column in sums]):
                        update(row + line, units, u)

    def _units(self, block: _Block, sums: Sequence[Expr]) -> Iterator[tuple[Units, Sums]]:
        """Yield the vectors of a block with the sums of their gates."""
        at = 0
        for part in block.parts:
            vectors = len(part.counts)
            for v, count in enumerate(part.counts):
                first = block.first + part.start + v * part.lanes
                units = self.shape.units(block.group, first, part.lanes, count)
                yield units, [sums[at + gate * vectors + v] for gate in range(self.gates)]
            at += self.gates * vectors

    def _row(self, block: _Block) -> tuple[int, int]:
        """Return how many weights of a block belong to an input, and the lanes to read them in."""
        sizes = [self.gates * part.lanes * len(part.counts) for part in block.parts]
        lanes = self.shape.isa.lanes
        whole = all(size % lanes == 0 for size in sizes)  # then some vectors are of several gates
        return sum(sizes), lanes if whole else block.lanes

    def _tiles(self, columns: int) -> list[tuple[int, int, int]]:
        """Cut the rows into (first row, height, tiles) whose sums fit in registers."""
        batch = self.shape.batch
        most = max(1, min(batch, self.shape.sums // columns))
        whole, rest = divmod(batch, most)
        return [(0, most, whole), *([(whole * most, rest, 1)] if rest else [])]

    def _sums(self, tile: Tile, source: tirx.Buffer, place: Expr, row: Expr) -> list[list[Expr]]:
        """Return the sums of a tile as ``[column][line]``; a column is a vector of a gate."""
        block, height = tile.block, tile.height
        layout, (size, lanes) = self.shape.layout, self._row(block)
        columns = size // lanes
        groups, each = layout.groups, layout.each
        start = block.group * (each * self.gates * layout.padded)
        start = start + block.first * (each * self.gates)
        nested = groups > 1 and each % groups == 0  # then inputs lie evenly
        depth = (each // groups, groups) if nested else (each,)

        def index(p: Sequence[Expr]) -> tuple[Expr, Expr]:
            """Return which input it is, and where the unit that it is lies in the state."""
            if groups == 1:
                return p[0], p[0]
            if nested:
                place = p[1] * layout.padded + block.group * (each // groups) + p[0]
                return p[0] * groups + p[1], place
            unit = block.group * each + p[0]
            return p[0], unit % groups * layout.padded + unit // groups

        def step(p: Sequence[Expr], add: Callable[[int, int, Expr, Expr], None]) -> None:
            number, at = index([either_way(i, n, block.odd) for i, n in zip(p, depth, strict=True)])
            for column in range(columns):
                right = self.w[ramp(start + number * size + column * lanes, lanes)]
                for line in range(height):
                    left = source[place + (row + line) * layout.size + at]
                    add(line, column, spread(left, lanes), right)

        sums, found = accumulate(self.shape.isa, lanes, (height, columns), depth, step), []
        for part in block.parts:
            count = self.gates * part.lanes * len(part.counts) // lanes
            found += sums[:count] if part.lanes == lanes else _cut(sums[:count], lanes, part.lanes)
            sums = sums[count:]
        return found


def _counts(units: int, lanes: int, vectors: int) -> list[int]:
    """Return how many of ``units`` each of the vectors has."""
    return [min(lanes, units - v * lanes) for v in range(vectors)]


def _cut(sums: list[list[Expr]], lanes: int, narrow: int) -> list[list[Expr]]:
    """Return ``[column][line]`` in vectors of ``narrow`` lanes from wider columns."""
    found = []
    for lines in sums:
        held = registers(lanes, len(lines))
        for buffer, value in zip(held, lines, strict=True):
            T.buffer_store(buffer, value, [ramp(0, lanes)])
        for first in range(0, lanes, narrow):
            found.append([buffer[ramp(first, narrow)] for buffer in held])
    return found


@dataclass(frozen=True)
class _Part:
    """Vectors alike from unit ``start`` of a block on, and how many units each has."""

    start: int
    lanes: int
    counts: list[int]


@dataclass(frozen=True)
class _Block:
    """Vectors of units of a group from its unit ``first`` on."""

    group: Expr
    first: Expr
    parts: list[_Part]
    odd: Expr  # 1 to read its weights backwards, else 0

    @property
    def lanes(self) -> int:
        """Lanes of its first vector."""
        return self.parts[0].lanes

    @property
    def counts(self) -> list[int]:
        """Units of the vectors like the first."""
        return self.parts[0].counts


@dataclass(frozen=True)
class Tile:
    """A block of units for ``height`` rows."""

    block: _Block
    height: int


class StructuredProduct:
    """The stages of a structured operator on all rows; its sums, which are few, are read again."""

    def __init__(
        self,
        shape: Shape,
        gates: int,
        program: Program,
        weights: list[tirx.Buffer],
        tiles: dict[product_tile.Tile, int],
    ) -> None:
        self.shape, self.gates, self.weights = shape, gates, weights
        isa, batch = shape.isa, shape.batch
        mode = "team" if shape.workers > 1 else "none"
        self.products: list[tuple[int, StagedProduct]] = []  # from which row on
        for part in row_segments(batch, HEIGHTS[isa.name]):
            rows, height = int(part.count) * part.height, part.height
            nest = RowNest((height,), rows, mode, shape.sums, shape.workers)
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

    def keep(self, row: Expr, units: Units, start: Expr, h: Expr) -> None:
        """Keep nothing."""

    def begin(self, state: tirx.Buffer) -> None:
        """Clear the sums: the last vector of units reaches into what follows them."""
        with loops(self.sums.buffer.shape[0]) as (i,):
            T.buffer_store(self.sums.buffer, T.float32(0), [i])

    def emit(self, source: tirx.Buffer, place: Expr, odd: Expr, update: Update) -> None:
        """Multiply rows of ``source`` from ``place`` on."""
        del odd  # the weights of a structured matrix fit in cache more often
        shape, layout = self.shape, self.shape.layout
        for start, product in self.products:
            rows = Scratch(source, layout.size, place + start * layout.size)
            sums = Scratch(self.sums.buffer, self.sums.stride, start * self.sums.stride)
            product.emit(rows, sums, self.weights, self.between)
        whole = [lanes for _, lanes in layout.vectors].count(layout.lanes)
        whole = min(whole, layout.each // layout.lanes)
        rest = layout.vectors[whole:]

        def units(row: Expr, first: Expr, lanes: int, count: int) -> None:
            at = row * self.sums.stride + first
            places = (ramp(at + gate * shape.h, lanes) for gate in range(self.gates))
            u = [self.sums.buffer[place] for place in places]
            update(row, shape.units(T.int64(0), first, lanes, count), u)

        each = whole + bool(rest)
        with shape.turns(shape.batch * each) as turn:
            row, v = turn // each, turn % each
            if whole:
                with T.If(v < whole), T.Then():
                    units(row, v * layout.lanes, layout.lanes, layout.lanes)
            if rest:
                with T.If(v == whole), T.Then():
                    for first, lanes in rest:
                        units(row, i64(first), lanes, min(lanes, layout.each - first))
