"""A whole operator expression as one kernel: stages over a row tile that stays in cache.

Each tile of rows passes through all stages of a `Program` before the next tile starts, so the
features between two factors never leave the first-level cache. Every matrix product is a
register tile.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import product

from tvm import tirx
from tvm.script.ir_builder import tirx as T

from tvmstruct.schedules.builder import argument, i64, loops, prim_func, symbol
from tvmstruct.schedules.compute.dense import ACTIVATIONS, Epilogue, row_segments
from tvmstruct.schedules.registry import Kernel, make_kernel
from tvmstruct.schedules.vector_math import replace_math
from tvmstruct.schedules.x86.packed_dense import HEIGHTS, SERIAL_MACS
from tvmstruct.schedules.x86.register_tile import ACCUMULATORS, accumulate
from tvmstruct.stages import Copy, Hadamard, MatMul, Program, X, Y, Zero
from tvmstruct.targets import Isa

SHARED_MACS = 384 << 10  # below, a stage is done before a second thread has woken


def chain(isa: Isa, program: Program, epilogue: Epilogue, rows: int, macs: int) -> Kernel:
    """Return the kernel of ``program``: arguments x, weights, [bias], [residual], y."""
    single = rows == 1
    parallel = rows >= 2 * HEIGHTS[isa.name][0] and rows * macs > SERIAL_MACS
    key = (isa.name, program.key, epilogue, single, parallel)
    heights = (1,) if single else HEIGHTS[isa.name]

    def build() -> tirx.PrimFunc:
        return replace_math(_emit(isa, program, epilogue, heights, parallel))

    return make_kernel("chain", key, build, work=macs)


def _emit(isa: Isa, program: Program, epilogue: Epilogue, heights, parallel: bool):
    n_in, n_out = program.sizes[X], program.sizes[Y]

    def body() -> None:
        single = heights == (1,)
        m = i64(1) if single else symbol("m")
        x = argument("x", (m, i64(n_in)))
        weights = [argument(f"w{i}", (i64(w.size),)) for i, w in enumerate(program.weights)]
        bias = argument("bias", (i64(n_out),)) if epilogue.bias else None
        residual = argument("residual", (m, i64(n_out))) if epilogue.residual else None
        y = argument("y", (m, i64(n_out)))
        for i, segment in enumerate(row_segments(1 if single else m, heights)):
            kind = T.parallel if parallel and i == 0 else T.serial
            with loops(segment.count, kind=kind) as (t,):
                first = segment.start + t * segment.height
                scratch = _buffers(program, x, y, segment)
                tile = _Tile(isa, segment.height, first, weights, scratch, not parallel)
                for stage in program.stages:
                    tile.emit(stage)
                tile.finish(y, n_out, epilogue, bias, residual)

    return prim_func(body)


def _buffers(program: Program, x, y, segment) -> list:
    scratch = [
        T.alloc_buffer((i64(segment.height * size),), "float32", scope="global") if size else None
        for size in program.sizes[Y + 1 :]
    ]
    return [x, y, *scratch]


@dataclass
class _Tile:
    """Code of all stages for ``height`` rows from row ``first``."""

    isa: Isa
    height: int
    first: object
    weights: list
    buffers: list
    shares_threads: bool = False  # whether threads split stages, because rows are too few

    def emit(self, stage) -> None:
        if isinstance(stage, MatMul):
            (self._over_columns if stage.vector == "column" else self._over_groups)(stage)
        elif isinstance(stage, Copy):
            self._copy(stage)
        elif isinstance(stage, Zero):
            self._zero(stage)
        else:
            self._hadamard(stage)

    def at(self, buffer: int, row: int, index) -> tuple:
        """Return the index of feature ``index`` (scalar or first of a vector) of a row."""
        if buffer <= Y:
            return (self.first + row, index)
        size = int(self.buffers[buffer].shape[0]) // self.height
        return (row * size + index,)

    def load(self, buffer: int, row: int, index, lanes: int = 1):
        return self.buffers[buffer][_vector(self.at(buffer, row, index), lanes)]

    def save(self, buffer: int, row: int, index, value, lanes: int = 1) -> None:
        T.buffer_store(
            self.buffers[buffer], value, list(_vector(self.at(buffer, row, index), lanes))
        )

    def _over_columns(self, s: MatMul) -> None:
        """Tile: rows and (for a shared block) groups by ``tile`` vectors of outputs."""
        limit = max(1, ACCUMULATORS // self.height) if s.shared else 1
        some = max(g for g in range(1, limit + 1) if s.groups % g == 0)
        width = s.tile * s.lanes
        lines = list(product(range(self.height), range(some)))
        with self._loops(s, s.groups // some, s.q // width) as (group, chunk):
            base = (0 if s.shared else group) * (s.q // width) + chunk

            def step(p, add) -> None:
                w = (base * s.p + p) * width
                for (line, (row, g)), v in product(enumerate(lines), range(s.tile)):
                    at = s.src_offset + (group * some + g) * s.src_group + p * s.src_p
                    left = T.broadcast(self.load(s.src, row, at), s.lanes)
                    add(line, v, left, self._weight(s.weight, w + v * s.lanes, s.lanes))

            sums = accumulate(self.isa, s.lanes, (len(lines), s.tile), s.p, step)
            for (line, (row, g)), v in product(enumerate(lines), range(s.tile)):
                at = (group * some + g) * s.dst_group + chunk * width + v * s.lanes
                self._put(s, row, at, sums[v][line])

    def _over_groups(self, s: MatMul) -> None:
        """Tile: rows by ``tile`` outputs; lanes run along the groups."""
        with self._loops(s, s.q // s.tile, s.groups // s.lanes) as (chunk, lane):
            base = chunk if s.shared else chunk * (s.groups // s.lanes) + lane
            each = 1 if s.shared else s.lanes

            def step(p, add) -> None:
                w = (base * s.p + p) * s.tile * each
                for row, v in product(range(self.height), range(s.tile)):
                    at = s.src_offset + p * s.src_p + lane * s.lanes
                    left = self.load(s.src, row, at, s.lanes)
                    right = self._weight(s.weight, w + v * each, each)
                    add(row, v, left, T.broadcast(right, s.lanes) if s.shared else right)

            sums = accumulate(self.isa, s.lanes, (self.height, s.tile), s.p, step)
            for row, v in product(range(self.height), range(s.tile)):
                at = (chunk * s.tile + v) * s.dst_q + lane * s.lanes
                self._put(s, row, at, sums[v][row])

    @contextmanager
    def _loops(self, s: MatMul, outer: int, inner: int) -> Iterator[tuple]:
        """Nest the two loops over tiles; where threads share the stage, the longer is outside."""
        shared = self.shares_threads and s.groups * s.p * s.q * self.height > SHARED_MACS
        kind = T.parallel if shared and max(outer, inner) > 1 else None
        if kind is not None and inner > outer:
            with loops(inner, outer, kind=kind) as (second, first):
                yield first, second
        else:
            with loops(outer, inner, kind=kind) as (first, second):
                yield first, second

    def _weight(self, weight: int, index, lanes: int):
        return self.weights[weight][_vector((index,), lanes)]

    def _put(self, s: MatMul, row: int, index, value) -> None:
        if s.accumulate:
            value = value + self.load(s.dst, row, index, s.lanes)
        self.save(s.dst, row, index, value, s.lanes)

    def _copy(self, s: Copy) -> None:
        *outer, (extent, stride) = s.dims or ((1, 1),)
        lanes = self._lanes(extent) if stride == 1 else 1
        for row in range(self.height):
            with loops(*(e for e, _ in outer), extent // lanes) as (*at, last):
                src = sum((i * st for i, (_, st) in zip(at, outer, strict=True)), i64(s.src_offset))
                place = i64(0)
                for i, (size, _) in zip(at, outer, strict=True):
                    place = place * size + i
                place = place * extent + last * lanes
                value = self.load(s.src, row, src + last * lanes * stride, lanes)
                if s.weight is not None:
                    value = value * self.weights[s.weight][_vector((place,), lanes)]
                if s.accumulate:
                    value = value + self.load(s.dst, row, s.dst_offset + place, lanes)
                self.save(s.dst, row, s.dst_offset + place, value, lanes)

    def _zero(self, s: Zero) -> None:
        for row in range(self.height):
            with loops(s.stop - s.start) as (i,):
                self.save(s.dst, row, s.start + i, T.float32(0))

    def _hadamard(self, s: Hadamard) -> None:
        for row in range(self.height):
            half = 1
            while half < s.n:
                self._butterflies(s, row, half)
                half *= 2
            if s.scale != 1.0 or s.n == 1:
                lanes = self._lanes(s.n * s.blocks)
                with loops(s.n * s.blocks // lanes) as (i,):
                    value = self.load(s.dst, row, i * lanes, lanes)
                    self.save(s.dst, row, i * lanes, value * _splat(s.scale, lanes), lanes)

    def _butterflies(self, s: Hadamard, row: int, half: int) -> None:
        lanes = self._lanes(half)
        with loops(s.n * s.blocks // (2 * half), half // lanes) as (pair, i):
            low = pair * (2 * half) + i * lanes
            pairs = T.alloc_buffer((2 * lanes,), "float32", scope="global")
            for part in (0, 1):
                value = self.load(s.dst, row, low + part * half, lanes)
                T.buffer_store(pairs, value, list(_vector((part * lanes,), lanes)))
            a, b = (pairs[_vector((part * lanes,), lanes)] for part in (0, 1))
            self.save(s.dst, row, low, a + b, lanes)
            self.save(s.dst, row, low + half, a - b, lanes)

    def _lanes(self, extent: int) -> int:
        return next(v for v in (self.isa.lanes, 8, 4, 2, 1) if extent % v == 0)

    def finish(self, y, n: int, epilogue: Epilogue, bias, residual) -> None:
        """Apply bias, activation and residual while the rows are still in cache."""
        if epilogue == Epilogue():
            return
        for row, (start, count, lanes) in product(range(self.height), self._runs(n)):
            with loops(count) as (i,):
                at = start + i * lanes
                place = list(_vector((self.first + row, at), lanes))
                value = y[tuple(place)]
                if bias is not None:
                    value = value + bias[_vector((at,), lanes)]
                value = ACTIVATIONS[epilogue.activation](value)
                if residual is not None:
                    value = value + residual[tuple(place)]
                T.buffer_store(y, value, place)

    def _runs(self, n: int) -> Iterator[tuple[int, int, int]]:
        """Cut n features into (start, vectors, lanes) runs with ever fewer lanes."""
        start = 0
        for lanes in (self.isa.lanes, 4, 1):
            count = (n - start) // lanes
            if count:
                yield start, count, lanes
                start += count * lanes


def _vector(index: tuple, lanes: int) -> tuple:
    """Turn the last index into a vector of consecutive indices."""
    return index if lanes == 1 else (*index[:-1], T.ramp(index[-1], 1, lanes))


def _splat(value: float, lanes: int):
    return T.float32(value) if lanes == 1 else T.broadcast(T.float32(value), lanes)
