"""Dense layers as ONNX's ``DynamicQuantizeLinear`` and ``MatMulInteger`` compute them.

All rows of x are rounded to bytes with one scale and one zero point (`rounding`), weights are the
integers that they came as, sums are exact. ``y = sum * (scale_x * scale_w)`` is the only float
operation on a sum, so results equal those of ONNX Runtime bit for bit.
"""

from __future__ import annotations

from itertools import product

from tvm.ir import Expr
from tvm.script.ir_builder import tirx as T

from tvmstruct.schedules.builder import argument, i64, loops
from tvmstruct.schedules.compute.dense import Epilogue
from tvmstruct.schedules.registry import Kernel
from tvmstruct.schedules.x86.attention_tile import ramp
from tvmstruct.schedules.x86.bf16_dense import padded_tail, row_stride, scratch
from tvmstruct.schedules.x86.intrinsics import byte_dot
from tvmstruct.schedules.x86.register_tile import accumulate
from tvmstruct.schedules.x86.rounding import Extremes, Rounding, fence, sum_lanes
from tvmstruct.schedules.x86.word_dense import VECTORS, Problem, Tile, word_dense
from tvmstruct.targets import Isa

STEP = 16  # elements of x that are rounded together


def dynamic_dense(isa: Isa, n: int, k: int, epilogue: Epilogue, rows: int) -> Kernel:
    """Return dense on words of four int8: x, words, sums, shift, scale, [bias], [residual], y."""
    name = "dynamic_dense" if isa.dots else "dynamic_dense_pairs"
    return word_dense(name, Problem.of(isa, n, k, epilogue, rows), _Dot)


class _Dot:
    """Groups of four bytes, of x rounded as a whole."""

    prepares, llvm = True, ""

    def __init__(self, problem: Problem) -> None:
        self.problem = problem
        self.words = -(-problem.k // 4)

    def declare(self) -> None:
        problem = self.problem
        columns = i64(problem.panels * problem.width)
        self.w = problem.words(4)
        self.column_sums = argument("sums", (columns,), "int32")
        self.shift = argument("shift", (i64(1),), "int32")
        self.scale = argument("scale", (columns,))

    def prepare(self, x, m, parallel: bool) -> None:
        k, rows = self.problem.k, T.max(m, i64(1))
        kind = T.parallel if parallel else None
        self.stride = 4 * row_stride(-(-k // STEP) * (STEP // 4))
        self.x = scratch(m, self.stride, "uint8")
        self.shifts = T.alloc_buffer((rows,), "int32", scope="global")
        low, high = self._range(x, m, rows, kind)
        self.rounding = Rounding.of(low, high)
        with loops(m, kind=kind) as (row,):
            self._round(x, row)

    def _range(self, x, m, rows, kind) -> tuple[Expr, Expr]:
        """Return the range of all rows: first of each, so that threads may share them."""
        k = self.problem.k
        found = [T.alloc_buffer((rows,), "float32", scope="global") for _ in range(2)]
        with loops(m, kind=kind) as (row,):
            extremes = Extremes(STEP)
            extremes.add_all(k // STEP, lambda v: x[row, T.ramp(v * STEP, 1, STEP)])
            if rest := k % STEP:
                extremes.add(padded_tail(x, row, k - rest, rest, STEP))
            for held, value in zip(found, extremes.pair(), strict=True):
                T.buffer_store(held, value, [row])
        ends = [T.alloc_buffer((1,), "float32", scope="global") for _ in range(2)]
        for end in ends:
            T.buffer_store(end, T.float32(0), [0])
        with loops(m) as (row,):
            for end, held, join in zip(ends, found, (T.min, T.max), strict=True):
                T.buffer_store(end, join(end[0], held[row]), [0])
        return ends[0][0], ends[1][0]

    def _round(self, x, row: Expr) -> None:
        """Emit the bytes of a row, and what the shift of the weights adds to its sums."""
        whole, rest = divmod(self.problem.k, STEP)
        at = T.ramp(0, 1, STEP)
        steps = T.alloc_buffer((STEP,), "int32", scope="global")
        total = T.alloc_buffer((STEP,), "int32", scope="global")
        T.buffer_store(total, T.broadcast(T.int32(0), STEP), [at])

        def put(value, column) -> None:
            T.buffer_store(steps, self.rounding.steps(value, STEP), [at])
            place = T.ramp(row * self.stride + column, 1, STEP)
            T.buffer_store(self.x, self.rounding.bytes(steps[at], STEP), [place])
            T.buffer_store(total, total[at] + steps[at], [at])

        with loops(whole) as (chunk,):
            put(x[row, T.ramp(chunk * STEP, 1, STEP)], chunk * STEP)
        if rest:  # zeros are the zero point, which adds nothing
            put(padded_tail(x, row, whole * STEP, rest, STEP), i64(whole * STEP))
        T.buffer_store(self.shifts, self.shift[0] * sum_lanes(total, STEP), [row])

    def sums(self, tile: Tile) -> list[list]:
        height, row, panel = tile
        lanes, base = self.problem.isa.lanes, panel * self.problem.width

        def step(p, add) -> None:
            for i, v in product(range(height), range(VECTORS)):
                place = T.ramp((row + i) * self.stride + p * 4, 1, 4)
                word = T.reinterpret("int32", self.x[place])
                right = self.w[panel, p, T.ramp(i64(v * lanes), 1, lanes)]
                add(i, v, T.broadcast(word, lanes), right)

        def start(line: int, v: int):
            zero = T.broadcast(T.int32(0) - self.rounding.zero, lanes)
            shift = T.broadcast(self.shifts[row + line], lanes)
            return shift + zero * self.column_sums[ramp(base + v * lanes, lanes)]

        def dot(total, left, right):
            return byte_dot(total, left, right, lanes, dots=self.problem.isa.dots)

        sums = accumulate(
            self.problem.isa, lanes, (height, VECTORS), self.words, step, start, dtype="int32",
            dot=dot,
        )  # fmt: skip

        def scaled(value, v: int):
            scale = T.broadcast(self.rounding.scale, lanes)
            unit = scale * self.scale[ramp(base + v * lanes, lanes)]
            return fence(T.cast(value, f"float32x{lanes}") * unit, lanes)

        return [[scaled(sums[v][i], v) for i in range(height)] for v in range(VECTORS)]
