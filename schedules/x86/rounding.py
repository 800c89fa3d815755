"""Rounding to unsigned bytes as ONNX's ``DynamicQuantizeLinear`` does, bit for bit.

All values of a tensor share one scale and one zero point, those of the smallest range that holds
them and 0: ``byte = clip(rint(x / scale) + zero, 0, 255)``, ties to even. Sums of bytes are exact,
so that only these few float operations have to be the same as elsewhere, in the same order.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from tvm import tirx
from tvm.ir import Expr
from tvm.script.ir_builder import tirx as T

from tvmstruct.schedules.builder import loops
from tvmstruct.schedules.x86.attention_tile import ramp, reduce_lanes, registers, splat, spread

LARGEST = 255
ROUNDER = 1.5 * 2**23  # added to v, the low bits are those of rint(v)
ROUNDER_BITS = 0x4B400000
PARTS = 4  # vectors whose extremes are found beside each other


def fence(value: Expr, lanes: int) -> Expr:
    """Return ``value`` rounded before anything is added to it: LLVM would make an FMA of both."""
    dtype = "float32" if lanes == 1 else f"float32x{lanes}"
    number = T.llvm_lookup_intrinsic_id("llvm.arithmetic.fence")
    return T.call_llvm_pure_intrin(number, value, dtype=dtype)


class Extremes:
    """The lowest and the highest of some vectors and 0."""

    def __init__(self, lanes: int) -> None:
        self.lanes = lanes
        self.lows, self.highs = registers(lanes, PARTS), registers(lanes, PARTS)
        for held in (*self.lows, *self.highs):
            T.buffer_store(held, splat(0.0, lanes), [ramp(0, lanes)])

    def add(self, value: Expr, part: int = 0) -> None:
        """Look at a vector."""
        at = ramp(0, self.lanes)
        for held, join in ((self.lows[part], T.min), (self.highs[part], T.max)):
            T.buffer_store(held, join(held[at], value), [at])

    def add_all(self, count: int, load: Callable[[Expr], Expr]) -> None:
        """Look at the vectors ``load(0)``, ``load(1)`` and so on."""
        with loops(count // PARTS) as (chunk,):
            for part in range(PARTS):
                self.add(load(chunk * PARTS + part), part)
        for i in range(count % PARTS):
            self.add(load(T.int64(count // PARTS * PARTS + i)), i)

    def pair(self) -> tuple[Expr, Expr]:
        """Return both as scalars."""
        return self._fold(self.lows, T.min), self._fold(self.highs, T.max)

    def _fold(self, parts: Sequence[tirx.Buffer], join: Callable[[Expr, Expr], Expr]) -> Expr:
        values = [held[ramp(0, self.lanes)] for held in parts]
        while len(values) > 1:
            values = [join(a, b) for a, b in zip(values[::2], values[1::2], strict=True)]
        return reduce_lanes(values[0], self.lanes, join)


@dataclass(frozen=True)
class Rounding:
    """A scale and a zero point, in registers of one number each."""

    scale: Expr
    zero: Expr  # int32

    @classmethod
    def of(cls, low: Expr, high: Expr) -> Rounding:
        """Emit scale and zero point of a range that holds 0."""
        scale, shifted = (registers(1, 1)[0] for _ in range(2))
        (bounds,) = registers(2, 1)
        for place, value in enumerate((low, high)):
            T.buffer_store(bounds, value, [place])
        width = bounds[1] - bounds[0]
        some = T.Select(width == T.float32(0), T.float32(1), width / T.float32(LARGEST))
        T.buffer_store(scale, some, [0])
        zero = T.float32(0) - bounds[0] / scale[0]
        zero = T.max(T.float32(0), T.min(T.float32(LARGEST), zero))
        T.buffer_store(shifted, zero + T.float32(ROUNDER), [0])
        return cls(scale[0], _integer(shifted[0], 1))

    def steps(self, value: Expr, lanes: int) -> Expr:
        """Return ``byte - zero`` of a vector as int32."""
        low = T.Cast("float32", T.int32(0) - self.zero)
        high = T.Cast("float32", T.int32(LARGEST) - self.zero)
        v = value / spread(self.scale, lanes)
        v = T.min(T.max(v, spread(low, lanes)), spread(high, lanes))  # NaN: as low, as elsewhere
        return _integer(v + splat(ROUNDER, lanes), lanes)

    def bytes(self, steps: Expr, lanes: int) -> Expr:
        """Return the bytes of ``steps``."""
        kind = "uint8" if lanes == 1 else f"uint8x{lanes}"
        return T.Cast(kind, steps + spread(self.zero, lanes))


def sum_lanes(held: tirx.Buffer, lanes: int) -> Expr:
    """Return the sum of a small buffer."""
    values = [held[i] for i in range(lanes)]
    while len(values) > 1:
        values = [a + b for a, b in zip(values[::2], values[1::2], strict=True)]
    return values[0]


def _integer(shifted: Expr, lanes: int) -> Expr:
    kind = "int32" if lanes == 1 else f"int32x{lanes}"
    return T.reinterpret(kind, shifted) - spread(T.int32(ROUNDER_BITS), lanes)
