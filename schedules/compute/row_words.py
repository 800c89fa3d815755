"""The rounding of features to words between the stages of a structured operator, row by row.

All of it on whole vectors: where a run of features is no multiple of their lanes, the last vector
of the run overlaps the one before it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from tvm.script.ir_builder import tirx as T

from tvmstruct.rounding import BYTES, EACH, TYPES, Dim, Round
from tvmstruct.schedules.builder import fma, i64, loops
from tvmstruct.schedules.compute.low_precision import LARGEST, ROUNDER, SMALLEST
from tvmstruct.schedules.compute.row_steps import RowSteps

ROUND, JOIN = "tvmstruct_bf16_round{lanes}", "tvmstruct_bf16_join{lanes}"  # a target has these
VECTOR = 16  # features that are rounded together, whatever the registers
MAGNITUDE = 0x7FFFFFFF  # all bits but that of the sign
INFINITY, NAN = 0x7F800000, 0x7FC00000


def round_rows(stage: Round, steps: RowSteps) -> None:
    """Emit the rounding of all rows."""
    with loops(steps.height) as (row,):
        code = (_Bytes if stage.form == BYTES else _Halves)(stage, steps, row)
        code.prepare()
        if stage.gathered:
            code.gather()
        else:
            code.keep_order()


@dataclass
class _Row:
    stage: Round
    steps: RowSteps
    row: object
    vector = VECTOR

    def prepare(self) -> None:
        """Look at the whole row before anything is rounded."""

    def run(self, place, lanes: int):
        """Return the rounded features of a run."""
        raise NotImplementedError

    def join(self, places: list, lanes: int):
        """Return words with the rounded features at each of ``places``."""
        raise NotImplementedError

    def keep_order(self) -> None:
        """Put every feature where it was, from the first one on."""
        lanes = _lanes(self.stage.runs[-1][0], self.vector)

        def put(place, target) -> None:
            self._store(self.run(place, lanes), target, lanes)

        self._walk(self.stage.runs, lanes, put)

    def gather(self) -> None:
        """Join neighbours in the depth to words, for a vector of groups at a time."""
        each, (groups, _) = EACH[self.stage.form], self.stage.source.groups
        *outer, (extent, step) = self.stage.source.depth
        lanes = _lanes(groups, VECTOR)
        words, rest = divmod(extent, each)
        row = groups * each * -(-extent // each)  # of one turn of the outer depth

        def put(turn: tuple, word, count: int) -> None:
            def visit(place, group) -> None:
                first = place + turn[0] + word * (each * step)
                value = self.join([first + i * step for i in range(count)], lanes)
                whole = T.reinterpret(_typed(TYPES[self.stage.form], each * lanes), value)
                target = turn[1] + (word * groups + group) * each
                self._store(whole, target, each * lanes)

            self._walk(((groups, 1),), lanes, visit)

        with loops(*(e for e, _ in outer)) as at:
            turn = (i64(0), i64(0))
            for i, (_, stride) in zip(at, outer, strict=True):
                turn = (i * stride, i * row)
            with loops(words) as (word,):
                put(turn, word, each)
            if rest:
                put(turn, i64(words), rest)

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


class _Bytes(_Row):
    """Bytes of features, with one scale for the row."""

    def prepare(self) -> None:
        """Find the scale of the row: NaN where a feature is NaN or infinite."""
        stage, lanes = self.stage, _lanes(self.stage.runs[-1][0], VECTOR)
        bits = _small("int32", lanes)
        T.buffer_store(bits, _splat(T.int32(0), lanes), [_at(0, lanes)])

        def look(place, _target) -> None:
            # Magnitudes compare as their bits do, and nothing is larger than NaN.
            value = self._load(place, lanes)
            found = T.reinterpret(_typed("int32", lanes), value) & _splat(T.int32(MAGNITUDE), lanes)
            T.buffer_store(bits, T.max(bits[_at(0, lanes)], found), [_at(0, lanes)])

        self._walk(stage.runs, lanes, look)
        found, top = _small("int32", 1), _small("float32", 1)
        T.buffer_store(found, _largest(bits, lanes), [0])
        T.buffer_store(top, T.reinterpret("float32", found[0]), [0])
        nan, scale = T.reinterpret("float32", T.int32(NAN)), top[0] * T.float32(1 / LARGEST)
        held = self.steps.buffers[stage.scale]
        place = list(held.at(self.row, 0))
        T.buffer_store(held.buffer, T.Select(found[0] < T.int32(INFINITY), scale, nan), place)
        self.inverse = _small("float32", 1)
        reciprocal = T.float32(LARGEST) / T.max(top[0], T.float32(SMALLEST))
        fits = top[0] > T.float32(SMALLEST)
        T.buffer_store(self.inverse, T.if_then_else(fits, reciprocal, T.float32(0)), [0])

    def run(self, place, lanes: int):
        """Return the bytes of a run."""
        return T.cast(self._rounded(place, lanes), _typed("uint8", lanes))

    def join(self, places: list, lanes: int):
        """Return words with a byte of the features at each of ``places``."""
        *low, last = (
            T.reinterpret(_typed("uint32", lanes), self._rounded(place, lanes)) for place in places
        )
        shift = lambda value, by: value << _splat(T.uint32(by), lanes) if by else value  # noqa: E731
        total = shift(last, 8 * len(low))
        for i, value in enumerate(low):
            total = total | shift(value & _splat(T.uint32(255), lanes), 8 * i)
        return total

    def _rounded(self, place, lanes: int):
        """Return floats with ``rint(127 v / t) + 128`` in their low bytes."""
        scale, magic = _splat(self.inverse[0], lanes), _splat(T.float32(ROUNDER), lanes)
        value = fma(self._load(place, lanes), scale, magic, lanes, fused=True)
        return T.reinterpret(_typed("uint32", lanes), value)


class _Halves(_Row):
    """Features as bfloat16, by functions that the target has."""

    vector = 2 * VECTOR

    def prepare(self) -> None:
        """Clear what lies in the last words of odd runs: NaN times zero would be NaN."""
        if self.stage.gathered or self.stage.source.depth[-1][0] % 2 == 0:
            return
        with loops(-(-self.stage.size // self.vector)) as (v,):
            zero = _splat(T.uint16(0), self.vector)
            self._store(zero, v * self.vector, self.vector)

    def run(self, place, lanes: int):
        """Return a run in bfloat16."""
        words, name = _typed("int32", lanes // 2), ROUND.format(lanes=lanes)
        found = T.call_pure_extern(words, name, self._load(place, lanes))
        return T.reinterpret(_typed("uint16", lanes), found)

    def join(self, places: list, lanes: int):
        """Return words of two features, or of one that is there twice."""
        low, high = (self._load(place, lanes) for place in (places[0], places[-1]))
        return T.call_pure_extern(_typed("int32", lanes), JOIN.format(lanes=lanes), low, high)


def _lanes(run: int, most: int) -> int:
    """Return the lanes for runs of so many features."""
    return min(most, 1 << (run.bit_length() - 1))


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
