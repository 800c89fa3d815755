"""The steps of a structured operator that multiply no matrix: loops over whole vectors of rows.

Copies, of which transposes turn squares inside registers, zeros, Hadamard butterflies and the
epilogue. No schedule touches them: they are vectors already.
"""

from __future__ import annotations

from dataclasses import dataclass

from tvm import tirx
from tvm.script.ir_builder import tirx as T

from tvmstruct.schedules.builder import i64, loops
from tvmstruct.schedules.compute.dense import ACTIVATIONS
from tvmstruct.stages import Copy, Dim, Hadamard, Y, Zero


@dataclass(frozen=True)
class Rows:
    """Rows of an argument from ``first``."""

    buffer: object
    first: object
    stride: int | None = None

    def at(self, row, index) -> tuple:
        """Return where a feature of a row lies."""
        return (self.first + row, index)


@dataclass(frozen=True)
class Scratch:
    """Rows of scratch, flat: TVM would compact the gap between rows of a second axis away."""

    buffer: object
    stride: int

    def at(self, row, index) -> tuple:
        """Return where a feature of a row lies."""
        return (row * self.stride + index,)


@dataclass(frozen=True)
class RowSteps:
    """Code for ``height`` rows of ``buffers``, x and y first."""

    lanes: int
    height: int
    buffers: list
    weights: list

    def emit(self, stage: Copy | Zero | Hadamard) -> None:
        """Emit one stage."""
        if isinstance(stage, Copy):
            self._copy(stage)
        elif isinstance(stage, Zero):
            self._zero(stage)
        else:
            self._hadamard(stage)

    def finish(self, n: int, activation: str, bias, residual: Rows | None) -> None:
        """Apply bias, activation and residual to y."""
        for start, count, lanes in self._runs(n):
            with loops(self.height, count) as (row, i):
                at = start + i * lanes
                value = self.load(Y, row, at, lanes)
                if bias is not None:
                    value = value + bias[_vector((at,), lanes)]
                value = ACTIVATIONS[activation](value)
                if residual is not None:
                    value = value + residual.buffer[_vector(residual.at(row, at), lanes)]
                self.save(Y, row, at, value, lanes)

    def load(self, buffer: int, row, index, lanes: int = 1):
        held = self.buffers[buffer]
        return held.buffer[_vector(held.at(row, index), lanes)]

    def save(self, buffer: int, row, index, value, lanes: int = 1) -> None:
        held = self.buffers[buffer]
        T.buffer_store(held.buffer, value, list(_vector(held.at(row, index), lanes)))

    def _copy(self, s: Copy) -> None:
        square = _square(s, self.lanes)
        if square is not None:
            self._transpose(s, *square)
            return
        *outer, (extent, stride) = s.dims or ((1, 1),)
        runs = self._runs(extent) if stride == 1 else [(0, extent, 1)]
        for start, count, lanes in runs:
            with loops(self.height, *(e for e, _ in outer), count) as (row, *at, last):
                src, place = _walk(outer, at, s.src_offset)
                last = start + last * lanes
                self._move(s, row, src + last * stride, place * extent + last, lanes)

    def _move(self, s: Copy, row, src, place, lanes: int) -> None:
        value = self.load(s.src, row, src, lanes)
        if s.weight is not None:
            value = value * self.weights[s.weight][_vector((place,), lanes)]
        if s.accumulate:
            value = value + self.load(s.dst, row, s.dst_offset + place, lanes)
        self.save(s.dst, row, s.dst_offset + place, value, lanes)

    def _transpose(self, s: Copy, side: int, lanes: int) -> None:
        """Copy ``[..., q, g]`` from where q lies in runs: squares turned inside registers."""
        *outer, (q, _), (g, stride) = s.dims
        whole, rest = divmod(q, lanes)
        with loops(self.height, *(e for e, _ in outer), g // side) as (row, *at, band):
            src, place = _walk(outer, at, s.src_offset)
            src, place = src + band * (side * stride), place * (q * g) + band * side

            def turn(first) -> None:
                """Turn ``side`` vectors of ``lanes`` consecutive q into runs of g."""
                rows = [self.load(s.src, row, src + i * stride + first, lanes) for i in range(side)]
                step = lanes if side == g else g
                for i, value in enumerate(transposed(rows, lanes)):
                    to = s.dst_offset + place + first * g + i * step
                    self.save(s.dst, row, to, value, lanes)

            with loops(whole) as (chunk,):
                turn(chunk * lanes)
            if rest:  # the last square overlaps the one before it
                turn(i64(q - lanes))

    def _zero(self, s: Zero) -> None:
        for start, count, lanes in self._runs(s.stop - s.start):
            with loops(self.height, count) as (row, i):
                zero = _splat(0.0, lanes)
                self.save(s.dst, row, s.start + start + i * lanes, zero, lanes)

    def _hadamard(self, s: Hadamard) -> None:
        half = 1
        while half < s.n:
            self._butterflies(s, half)
            half *= 2
        if s.scale != 1.0 or s.n == 1:
            for start, count, lanes in self._runs(s.n * s.blocks):
                with loops(self.height, count) as (row, i):
                    at = start + i * lanes
                    value = self.load(s.dst, row, at, lanes) * _splat(s.scale, lanes)
                    self.save(s.dst, row, at, value, lanes)

    def _butterflies(self, s: Hadamard, half: int) -> None:
        lanes = next(v for v in (self.lanes, 8, 4, 2, 1) if half % v == 0)
        pairs, steps = s.n * s.blocks // (2 * half), half // lanes
        with loops(self.height, pairs, steps) as (row, pair, i):
            low = pair * (2 * half) + i * lanes
            both = T.alloc_buffer((2 * lanes,), "float32", scope="global")
            for part in (0, 1):
                value = self.load(s.dst, row, low + part * half, lanes)
                T.buffer_store(both, value, list(_vector((part * lanes,), lanes)))
            a, b = (both[_vector((part * lanes,), lanes)] for part in (0, 1))
            self.save(s.dst, row, low, a + b, lanes)
            self.save(s.dst, row, low + half, a - b, lanes)

    def _runs(self, n: int) -> list[tuple[int, int, int]]:
        """Cut n features into (start, vectors, lanes) runs with ever fewer lanes."""
        start, runs = 0, []
        for lanes in (self.lanes, 4, 1):
            count = (n - start) // lanes
            if count:
                runs.append((start, count, lanes))
                start += count * lanes
        return runs


def _walk(dims: list[Dim], at: list, offset: int) -> tuple:
    """Return where a step of a nest reads, and how many steps came before it."""
    src, place = i64(offset), i64(0)
    for i, (extent, stride) in zip(at, dims, strict=True):
        src, place = src + i * stride, place * extent + i
    return src, place


def _square(s: Copy, most: int) -> tuple[int, int] | None:
    """Return the vectors and their lanes of the squares that turn ``[..., q, g]``, if it is one."""
    if len(s.dims) < 2 or s.weight is not None or s.accumulate:
        return None
    (q, along), (g, stride) = s.dims[-2:]
    if along != 1 or stride == 1:
        return None
    for lanes in (v for v in (16, 8, 4) if v <= min(most, q)):
        side = next(v for v in (lanes, 8, 4, 2, 1) if v <= lanes and g % v == 0)
        if side > 1 and side in (g, lanes):
            return side, lanes
    return None


def transposed(rows: list, lanes: int) -> list:
    """Return the elements of ``rows``, vectors of ``lanes``, column after column.

    Riffling the first half of the vectors into the second, once for each power of two in their
    number, is a transposition: two shuffles of a pair of vectors per pair and round.
    """
    side, take = len(rows), range(lanes)
    low = [tirx.const(i // 2 + lanes * (i % 2), "int32") for i in take]
    high = [tirx.const((lanes + i) // 2 + lanes * (i % 2), "int32") for i in take]
    count = side
    while count > 1:
        kept = [_keep(row, lanes) for row in rows]
        pairs = [(kept[i], kept[i + side // 2]) for i in range(side // 2)]
        rows = [
            tirx.Shuffle([_kept(a, lanes), _kept(b, lanes)], order)
            for a, b in pairs
            for order in (low, high)
        ]
        count //= 2
    return rows


def _keep(value, lanes: int):
    """Hold a vector in a buffer of its own, so that two uses of it compute it once."""
    held = T.alloc_buffer((lanes,), "float32", scope="global")
    T.buffer_store(held, value, [T.ramp(0, 1, lanes)])
    return held


def _kept(held, lanes: int):
    return held[T.ramp(0, 1, lanes)]


def _vector(index: tuple, lanes: int) -> tuple:
    """Turn the last index into a vector of consecutive indices."""
    return index if lanes == 1 else (*index[:-1], T.ramp(index[-1], 1, lanes))


def _splat(value: float, lanes: int):
    return T.float32(value) if lanes == 1 else T.broadcast(T.float32(value), lanes)
