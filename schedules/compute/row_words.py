"""The rounding of features to bytes between the stages of a structured operator, row by row.

All of it on whole vectors: where a run of features is no multiple of their lanes, the last vector
of the run overlaps the one before it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from tvm.script.ir_builder import tirx as T

from tvmstruct.rounding import EACH, Dim, Round
from tvmstruct.schedules.builder import fma, i64, loops
from tvmstruct.schedules.compute.low_precision import LARGEST, ROUNDER, SMALLEST
from tvmstruct.schedules.compute.row_steps import RowSteps

VECTOR = 16  # features that are rounded together, whatever the registers
SIGN = 0x7FFFFFFF  # all bits but that of the sign


def round_rows(stage: Round, steps: RowSteps) -> None:
    """Emit the rounding of all rows."""
    with loops(steps.height) as (row,):
        code = _Row(stage, steps, row)
        code.scale()
        if stage.gathered:
            code.gather()
        else:
            code.keep_order()


@dataclass
class _Row:
    stage: Round
    steps: RowSteps
    row: object

    def scale(self) -> None:
        """Find the scale of the row: NaN where a feature is NaN or infinite."""
        stage, lanes = self.stage, _lanes(self.stage.runs[-1][0])
        bits = _small("int32", lanes)
        T.buffer_store(bits, _splat(T.int32(0), lanes), [_at(0, lanes)])

        def look(place, _target) -> None:
            # Magnitudes compare as their bits do, and nothing is larger than NaN.
            value = self._load(place, lanes)
            found = T.reinterpret(_typed("int32", lanes), value) & _splat(T.int32(SIGN), lanes)
            T.buffer_store(bits, T.max(bits[_at(0, lanes)], found), [_at(0, lanes)])

        self._walk(stage.runs, lanes, look)
        top = _small("float32", 1)
        T.buffer_store(top, T.reinterpret("float32", _largest(bits, lanes)), [0])
        held, row = self.steps.buffers[stage.scale], self.row
        poison = top[0] - top[0]
        T.buffer_store(held.buffer, top[0] * T.float32(1 / LARGEST) + poison, list(held.at(row, 0)))
        self.inverse = _small("float32", 1)
        reciprocal = T.float32(LARGEST) / T.max(top[0], T.float32(SMALLEST))
        fits = top[0] > T.float32(SMALLEST)
        T.buffer_store(self.inverse, T.if_then_else(fits, reciprocal, T.float32(0)), [0])

    def keep_order(self) -> None:
        """Put every byte where its feature was, from the first feature on."""
        lanes = _lanes(self.stage.runs[-1][0])

        def put(place, target) -> None:
            byte = T.cast(self._rounded(place, lanes), _typed("uint8", lanes))
            self._store(byte, target, lanes)

        self._walk(self.stage.runs, lanes, put)

    def gather(self) -> None:
        """Join the bytes of four steps of the depth, for a vector of groups at a time."""
        each, (groups, _) = EACH[self.stage.form], self.stage.source.groups
        *outer, (extent, step) = self.stage.source.depth
        lanes = _lanes(groups)
        words, rest = divmod(extent, each)
        row = groups * each * -(-extent // each)  # of one turn of the outer depth

        def put(turn: tuple, word, count: int) -> None:
            def join(place, group) -> None:
                first = place + turn[0] + word * (each * step)
                value = self._joined([first + i * step for i in range(count)], lanes)
                whole = T.reinterpret(_typed("uint8", each * lanes), value)
                target = turn[1] + (word * groups + group) * each
                self._store(whole, target, each * lanes)

            self._walk(((groups, 1),), lanes, join)

        with loops(*(e for e, _ in outer)) as at:
            turn = (i64(0), i64(0))
            for i, (_, stride) in zip(at, outer, strict=True):
                turn = (i * stride, i * row)
            with loops(words) as (word,):
                put(turn, word, each)
            if rest:
                put(turn, i64(words), rest)

    def _joined(self, places: list, lanes: int):
        """Return words with a byte of the features at each of ``places``."""
        *low, last = (
            T.reinterpret(_typed("uint32", lanes), self._rounded(place, lanes)) for place in places
        )
        shift = lambda value, by: value << _splat(T.uint32(by), lanes) if by else value  # noqa: E731
        total = shift(last, 8 * len(low))
        for i, value in enumerate(low):
            total = total | shift(value & _splat(T.uint32(255), lanes), 8 * i)
        return total

    def _walk(self, dims: tuple[Dim, ...], lanes: int, visit: Callable) -> None:
        """Visit all vectors of a nest: where they lie, and how far from the first feature."""
        *outer, (run, _) = dims
        start = i64(self.stage.source.offset)
        with loops(*(extent for extent, _ in outer)) as at:
            base = i64(0)
            for i, (_, stride) in zip(at, outer, strict=True):
                base = base + i * stride
            with loops(run // lanes) as (v,):
                visit(start + base + v * lanes, base + v * lanes)
            if run % lanes:
                visit(start + base + (run - lanes), base + (run - lanes))

    def _load(self, place, lanes: int):
        return self.steps.load(self.stage.src, self.row, place, lanes)

    def _store(self, value, place, lanes: int) -> None:
        self.steps.save(self.stage.dst, self.row, place, value, lanes)

    def _rounded(self, place, lanes: int):
        """Return floats with ``rint(127 v / t) + 128`` in their low bytes."""
        scale, magic = _splat(self.inverse[0], lanes), _splat(T.float32(ROUNDER), lanes)
        value = fma(self._load(place, lanes), scale, magic, lanes, fused=True)
        return T.reinterpret(_typed("uint32", lanes), value)


def _lanes(run: int) -> int:
    """Return the lanes for runs of so many features."""
    return min(VECTOR, 1 << (run.bit_length() - 1))


def _largest(bits, lanes: int):
    """Return the largest integer of a small buffer."""
    if lanes == 1:
        return bits[0]
    reduce = T.llvm_lookup_intrinsic_id("llvm.vector.reduce.smax")
    return T.call_llvm_pure_intrin(reduce, bits[_at(0, lanes)], dtype="int32")


def _small(dtype: str, lanes: int):
    return T.alloc_buffer((lanes,), dtype, scope="global")


def _at(index, lanes: int):
    return index if lanes == 1 else T.ramp(index, 1, lanes)


def _splat(value, lanes: int):
    return value if lanes == 1 else T.broadcast(value, lanes)


def _typed(dtype: str, lanes: int) -> str:
    return dtype if lanes == 1 else f"{dtype}x{lanes}"
