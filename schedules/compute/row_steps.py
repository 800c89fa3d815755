"""The steps of a structured operator that multiply no matrix: loops over whole vectors of rows.

Copies, of which transposes turn squares inside registers, zeros, Hadamard butterflies and the
epilogue. No schedule touches them: they are vectors already.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from tvm import tirx
from tvm.script.ir_builder import tirx as T

from tvmstruct.schedules.builder import i64, loops
from tvmstruct.schedules.compute.dense import ACTIVATIONS
from tvmstruct.stages import Copy, Dim, Hadamard, Y, Zero


@dataclass(frozen=True)
class Rows:
    """Rows of an argument from ``first``, features from ``column``."""

    buffer: object
    first: object
    stride: int | None = None
    column: object = 0

    def at(self, row, index) -> tuple:
        """Return where a feature of a row lies."""
        return (self.first + row, self.column + index)

    def region(self, height: int):
        """Return all features of ``height`` rows."""
        return self.buffer[self.first : self.first + height, 0 : self.buffer.shape[1]]


@dataclass(frozen=True)
class Scratch:
    """Rows of scratch, flat: TVM would compact the gap between rows of a second axis away."""

    buffer: object
    stride: int
    first: object = 0  # element of the first row

    def at(self, row, index) -> tuple:
        """Return where a feature of a row lies."""
        return (self.first + row * self.stride + index,)

    def region(self, height: int):
        """Return the whole buffer."""
        return self.buffer[0 : self.buffer.shape[0]]


@dataclass(frozen=True)
class RowSteps:
    """Code for ``height`` rows of ``buffers``, x and y first; ``starts`` are those of weights."""

    lanes: int
    height: int
    buffers: list
    weights: list
    starts: list

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
            at = self.starts[s.weight] + place
            value = value * self.weights[s.weight][_vector((at,), lanes)]
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
        """Transform in a few passes, each of up to `radix` features in registers.

        All passes but the last stay in src if that is allowed, else in dst.
        """
        radix = 16 if self.lanes == 16 else 8  # of 32 or 16 registers
        done = 1
        while True:
            step = min(radix, s.n // done)
            if done * step == s.n:
                stage = s if s.owned or done == 1 else replace(_within(s, s.dst), scale=s.scale)
                self._butterflies(stage, done, step)
                return
            at = s.src if s.owned else s.dst
            stage = _within(s, at) if s.owned or done > 1 else replace(s, scale=1.0)
            self._butterflies(stage, done, step)
            done *= step

    def _butterflies(self, s: Hadamard, done: int, radix: int) -> None:
        """Transform ``radix`` features that lie ``done`` apart along the axis."""
        src, dst = s.axis
        rest = s.n // (done * radix)
        *outer, (extent, from_step, to_step) = s.loops or ((1, 1, 1),)
        run = from_step == to_step == 1
        lanes = next(v for v in (self.lanes, 8, 4, 2, 1) if extent % v == 0) if run else 1
        lanes = min(lanes, self.lanes)
        outer = [(rest, done * radix * src, done * radix * dst), (done, src, dst), *outer]
        outer = [loop for loop in outer if loop[0] > 1]
        with loops(self.height, *(e for e, _, _ in outer), extent // lanes) as (row, *at, i):
            steps = list(zip(at, outer, strict=True))
            base = s.src_offset + i * (lanes * from_step) + sum(v * f for v, (_, f, _) in steps)
            to = i * (lanes * to_step) + sum(v * t for v, (_, _, t) in steps)
            loads = (self.load(s.src, row, base + j * (done * src), lanes) for j in range(radix))
            values = [_kept(_keep(value, lanes), lanes) for value in loads]
            for j, value in enumerate(_transformed(values, lanes)):
                if s.scale != 1.0:
                    value = value * _splat(s.scale, lanes)
                place = to + j * (done * dst)
                if s.in_place:
                    place = place + s.src_offset
                if s.accumulate:
                    value = value + self.load(s.dst, row, place, lanes)
                self.save(s.dst, row, place, value, lanes)

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
    T.buffer_store(held, value, list(_vector((0,), lanes)))
    return held


def _kept(held, lanes: int):
    return held[_vector((0,), lanes)]


def _within(s: Hadamard, buffer: int) -> Hadamard:
    """Return the transform in place in one of its two buffers, unscaled."""
    at = 0 if buffer == s.src else 1
    loops = tuple((loop[0], loop[1 + at], loop[1 + at]) for loop in s.loops)
    offset = s.src_offset if at == 0 else 0
    axis = (s.axis[at], s.axis[at])
    return replace(
        s, src=buffer, dst=buffer, axis=axis, loops=loops, src_offset=offset, scale=1.0,
        accumulate=False,
    )  # fmt: skip


def _transformed(values: list, lanes: int) -> list:
    """Return the Hadamard transform of vectors, which are loads: each is used twice."""
    half, count = 1, len(values)
    while half < count:
        out = list(values)
        for low in (i for i in range(count) if not i & half):
            a, b = values[low], values[low + half]
            out[low], out[low + half] = a + b, a - b
        half *= 2
        values = out if half == count else [_kept(_keep(v, lanes), lanes) for v in out]
    return values


def _vector(index: tuple, lanes: int) -> tuple:
    """Turn the last index into a vector of consecutive indices."""
    return index if lanes == 1 else (*index[:-1], T.ramp(index[-1], 1, lanes))


def _splat(value: float, lanes: int):
    return T.float32(value) if lanes == 1 else T.broadcast(T.float32(value), lanes)
