"""Hidden products in int8: bytes of the state and of the weights, exact sums, one scale a unit.

A bounded state needs no look at it before every product: its scale is that of 1, or of the
largest element of the first state. Weights that come as integers are multiplied as ONNX Runtime
does it, which looks at the states of all rows in every step. ``vpdpbusd`` wants unsigned bytes,
see ``int8_dense.py``.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

from tvm import tirx
from tvm.ir import Expr
from tvm.script.ir_builder import tirx as T

from tvmstruct.schedules.builder import loops
from tvmstruct.schedules.compute.low_precision import LARGEST, ROUNDER
from tvmstruct.schedules.compute.recurrence import Units
from tvmstruct.schedules.x86.attention_tile import ramp, registers, scratch, splat, spread
from tvmstruct.schedules.x86.intrinsics import byte_dot
from tvmstruct.schedules.x86.recurrent_product import ANY, BlockProduct, Step, Tile, Update
from tvmstruct.schedules.x86.register_tile import accumulate
from tvmstruct.schedules.x86.rounding import Extremes, Rounding, fence, sum_lanes

BYTE_WIDTH = 1  # vectors of units: what rows read again and again stays in the first-level cache


@dataclass
class ByteProduct(BlockProduct):
    """A dense hidden matrix packed by `pack_bytes`; the state is kept in bytes too."""

    joined: ClassVar[bool] = False
    width: ClassVar[int] = BYTE_WIDTH
    start: tirx.Buffer
    scale: tirx.Buffer

    def __post_init__(self) -> None:
        size = 2 * self.shape.batch * self.shape.layout.size
        self.bytes = T.alloc_buffer((size,), "uint8", scope="global")
        self.unit = scratch(self.shape.batch)  # what one step of a byte is worth in a row

    @property
    def buffers(self) -> list[tirx.Buffer]:
        """Memory that a step writes."""
        return [self.bytes]

    def begin(self, state: tirx.Buffer) -> None:
        """Find the scale of every row, and round the first state."""
        batch, size = self.shape.batch, self.shape.layout.size
        with loops(batch) as (row,):
            T.buffer_store(self.unit, T.float32(1), [row])
            with loops(size) as (i,):
                value = state[row * size + i]
                largest = T.max(self.unit[row], T.max(value, T.float32(0) - value))
                T.buffer_store(self.unit, largest, [row])
            T.buffer_store(self.unit, self.unit[row] * T.float32(1 / LARGEST), [row])
        with loops(2, batch, size) as (half, row, i):
            value = state[row * size + i]
            T.buffer_store(self.bytes, self._byte(value, row, 1), [(half * batch + row) * size + i])

    def keep(self, row: Expr, units: Units, start: Expr, h: Expr) -> None:
        """Round new units of the state."""
        place = start + row * self.shape.layout.size + units.place
        T.buffer_store(self.bytes, self._byte(h, row, units.lanes), [ramp(place, units.lanes)])

    def _byte(self, value: Expr, row: Expr, lanes: int) -> Expr:
        """Return ``rint(value / unit) + 128`` in the low bytes of a float."""
        inverse = spread(T.float32(1) / self.unit[row], lanes)
        shifted = value * inverse + spread(T.float32(ROUNDER), lanes)
        kinds = ("uint32", "uint8") if lanes == 1 else (f"uint32x{lanes}", f"uint8x{lanes}")
        return T.Cast(kinds[1], T.reinterpret(kinds[0], shifted))

    def _sums(self, tile: Tile, source: tirx.Buffer, place: Expr, row: Expr) -> list[list[Expr]]:
        lanes = tile.block.lanes
        sums = _byte_sums(self, tile, self.bytes, place, row, lambda _, at: self.start[at])

        def scaled(line: int, at: Expr, total: Expr) -> Expr:
            value = T.Cast(f"float32x{lanes}", total)
            return value * spread(self.unit[row + line], lanes) * self.scale[at]

        return _each(self, tile, sums, scaled)


@dataclass
class RoundedProduct(BlockProduct):
    """A dense hidden matrix packed by `pack_integers`: ONNX's ``DynamicQuantizeLSTM``.

    Every step rounds the states of all rows, those that ended as zeros, with one scale and one
    zero point. Sums of products of bytes less zero points are exact, and then scaled as ONNX
    Runtime does it.
    """

    joined: ClassVar[bool] = False
    width: ClassVar[int] = BYTE_WIDTH
    sums: tirx.Buffer
    shift: tirx.Buffer
    scale: tirx.Buffer

    def __post_init__(self) -> None:
        batch = self.shape.batch
        self.bytes = T.alloc_buffer((batch * self.shape.layout.size,), "uint8", scope="global")
        self.shifts = T.alloc_buffer((batch,), "int32", scope="global")  # what the shift adds

    @property
    def buffers(self) -> list[tirx.Buffer]:
        """Memory that a step writes."""
        return [self.bytes, self.shifts]

    def begin(self, state: tirx.Buffer) -> None:
        """Clear what no step writes: weights of zero meet it."""
        with loops(self.bytes.shape[0]) as (i,):
            T.buffer_store(self.bytes, T.uint8(0), [i])
        with loops(self.shifts.shape[0]) as (i,):  # else it would be memory of each thread
            T.buffer_store(self.shifts, T.int32(0), [i])

    def emit(
        self, source: tirx.Buffer, place: Expr, odd: Expr, update: Update, step: Step = ANY
    ) -> None:
        """Round the rows of ``source`` from ``place`` on, and multiply them."""
        batch = self.shape.batch
        self.rounding = Rounding.of(*self._extremes(source, place, step))
        with self.shape.turns(max(batch, 2)) as turn:  # one turn would be no loop
            if batch > 1:
                self._round(source, place, turn)
            else:
                with T.If(turn == 0), T.Then():
                    self._round(source, place, T.int64(0))
        super().emit(source, place, odd, update, step)

    def _extremes(self, source: tirx.Buffer, place: Expr, step: Step) -> tuple[Expr, Expr]:
        """Return the range of the state; every thread of a team finds it for itself."""
        layout, batch = self.shape.layout, self.shape.batch
        lanes, found = layout.lanes, Extremes(layout.lanes)
        whole, rest = divmod(layout.each, lanes)

        def look(row: Expr) -> None:
            first = place + row * layout.size
            found.add_all(whole, lambda v: source[ramp(first + v * lanes, lanes)])
            if rest:  # what fills the last vector need not be zero
                (tail,) = registers(lanes, 1)
                T.buffer_store(tail, splat(0.0, lanes), [ramp(0, lanes)])
                for i in range(rest):
                    T.buffer_store(tail, source[first + whole * lanes + i], [i])
                found.add(tail[ramp(0, lanes)])

        with loops(batch) as (row,):
            if step.counts is None:
                look(row)
            else:
                with T.If(step.counts(row)), T.Then():
                    look(row)
        return found.pair()

    def _round(self, source: tirx.Buffer, place: Expr, row: Expr) -> None:
        """Round a row, and find what the shift of the weights adds to its sums."""
        layout, lanes, start = (
            self.shape.layout,
            self.shape.layout.lanes,
            row * self.shape.layout.size,
        )
        whole, rest = divmod(layout.each, lanes)
        total = T.alloc_buffer((lanes,), "int32", scope="global")
        T.buffer_store(total, spread(T.int32(0), lanes), [ramp(0, lanes)])

        def put(unit: Expr, width: int) -> None:
            steps = T.alloc_buffer((width,), "int32", scope="global")
            value = source[ramp(place + start + unit, width)]
            T.buffer_store(steps, self.rounding.steps(value, width), [ramp(0, width)])
            byte = self.rounding.bytes(steps[ramp(0, width)], width)
            T.buffer_store(self.bytes, byte, [ramp(start + unit, width)])
            at = ramp(0, width)
            T.buffer_store(total, total[at] + steps[at], [at])

        with loops(whole) as (v,):
            put(v * lanes, lanes)
        with loops(rest) as (i,):
            put(whole * lanes + i, 1)
        T.buffer_store(self.shifts, self.shift[0] * sum_lanes(total, lanes), [row])

    def _sums(self, tile: Tile, source: tirx.Buffer, place: Expr, row: Expr) -> list[list[Expr]]:
        lanes = tile.block.lanes

        def start(line: int, at: Expr) -> Expr:
            zero = spread(T.int32(0) - self.rounding.zero, lanes)
            return spread(self.shifts[row + line], lanes) + zero * self.sums[at]

        def scaled(_line: int, at: Expr, total: Expr) -> Expr:
            unit = spread(self.rounding.scale, lanes) * self.scale[at]
            return fence(T.Cast(f"float32x{lanes}", total) * unit, lanes)

        sums = _byte_sums(self, tile, self.bytes, T.int64(0), row, start)
        return _each(self, tile, sums, scaled)


def _byte_sums(
    product: BlockProduct,
    tile: Tile,
    rows: tirx.Buffer,
    place: Expr,
    row: Expr,
    start: Callable[[int, Expr], Expr],
) -> list[list[Expr]]:
    """Return sums of bytes as ``[column][line]``, the first value of each is ``start``."""
    shape, block = product.shape, tile.block
    layout, lanes, vectors = shape.layout, block.lanes, len(block.counts)
    columns, words = product.gates * vectors, -(-layout.each // 4)
    first = block.first * (words * product.gates)

    def step(p: Expr, add: Callable[[int, int, Expr, Expr], None]) -> None:
        for line in range(tile.height):
            at = place + (row + line) * layout.size + p * 4
            left = T.reinterpret("int32", rows[T.ramp(at, 1, 4)])
            for column in range(columns):
                right = product.w[ramp(first + p * (columns * lanes) + column * lanes, lanes)]
                add(line, column, spread(left, lanes), right)

    return accumulate(
        shape.isa, lanes, (tile.height, columns), words, step,
        lambda line, column: start(line, _columns(product, tile, column)), dtype="int32",
        dot=lambda total, left, right: byte_dot(total, left, right, lanes, dots=shape.isa.dots),
    )  # fmt: skip


def _each(
    product: BlockProduct,
    tile: Tile,
    sums: list[list[Expr]],
    change: Callable[[int, Expr, Expr], Expr],
) -> list[list[Expr]]:
    """Return ``change(line, columns, sum)`` of all sums."""
    return [
        [change(line, _columns(product, tile, column), total) for line, total in enumerate(lines)]
        for column, lines in enumerate(sums)
    ]


def _columns(product: BlockProduct, tile: Tile, column: int) -> Expr:
    """Return where vectors that hold a number for each column have those of a sum."""
    gate, v = divmod(column, len(tile.block.counts))
    lanes = tile.block.lanes
    return ramp(gate * product.shape.layout.size + tile.block.first + v * lanes, lanes)
