"""Hidden products in int8: bytes of the state and of the weights, exact sums, one scale a unit.

A bounded state needs no look at it before every product: its scale is that of 1, or of the
largest element of the first state. ``vpdpbusd`` wants unsigned bytes, see ``int8_dense.py``.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

from tvm import tirx
from tvm.ir import Expr
from tvm.script.ir_builder import tirx as T

from tvmstruct.schedules.builder import loops
from tvmstruct.schedules.compute.low_precision import LARGEST
from tvmstruct.schedules.compute.recurrence import Units
from tvmstruct.schedules.x86.attention_tile import ramp, scratch, spread
from tvmstruct.schedules.x86.int8_dense import ROUNDER, byte_dot
from tvmstruct.schedules.x86.recurrent_product import BlockProduct, Tile
from tvmstruct.schedules.x86.register_tile import accumulate


@dataclass
class ByteProduct(BlockProduct):
    """A dense hidden matrix packed by `pack_bytes`; the state is kept in bytes too."""

    joined: ClassVar[bool] = False
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
        layout, block, height = self.shape.layout, tile.block, tile.height
        lanes, vectors = block.lanes, len(block.counts)
        columns, words = self.gates * vectors, -(-layout.each // 4)
        first = block.first * (words * self.gates)

        def step(p: Expr, add: Callable[[int, int, Expr, Expr], None]) -> None:
            for line in range(height):
                at = place + (row + line) * layout.size + p * 4
                left = T.reinterpret("int32", self.bytes[T.ramp(at, 1, 4)])
                for column in range(columns):
                    right = self.w[ramp(first + p * (columns * lanes) + column * lanes, lanes)]
                    add(line, column, spread(left, lanes), right)

        def unit(column: int) -> Expr:
            gate, v = divmod(column, vectors)
            return ramp(gate * layout.size + block.first + v * lanes, lanes)

        sums = accumulate(
            self.shape.isa, lanes, (height, columns), words, step,
            lambda _, column: self.start[unit(column)], dtype="int32",
            dot=lambda total, left, right: byte_dot(total, left, right, lanes),
        )  # fmt: skip

        def scaled(line: int, column: int) -> Expr:
            value = T.Cast(f"float32x{lanes}", sums[column][line])
            return value * spread(self.unit[row + line], lanes) * self.scale[unit(column)]

        return [[scaled(line, column) for line in range(height)] for column in range(columns)]
