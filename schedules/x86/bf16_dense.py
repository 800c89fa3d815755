"""Dense layers on bfloat16 weights with float32 sums.

Where the CPU has AVX512-BF16, x is rounded to bfloat16 once per call and pairs of k are
multiplied by ``vdpbf16ps``. Elsewhere, and for weights in bfloat16 alone, a word of two weights
is widened to float32 by a shift and a mask: the arithmetic is that of float32 and only the
weight takes half of the memory.

``vdpbf16ps`` takes denormal numbers as zero. NaN and infinity pass as in float32; a finite x
over 3.39e38 rounds to infinity.
"""

from __future__ import annotations

from itertools import product

from tvm.script.ir_builder import tirx as T

from tvmstruct.schedules.builder import i64, loops
from tvmstruct.schedules.compute.dense import Epilogue
from tvmstruct.schedules.compute.product_tile import widen
from tvmstruct.schedules.registry import Kernel
from tvmstruct.schedules.x86.register_tile import accumulate
from tvmstruct.schedules.x86.word_dense import VECTORS, Problem, Tile, word_dense
from tvmstruct.targets import Isa

DOT = "avx512bf16"  # the feature with the instructions
STEP = 32  # elements of x that one instruction rounds

LLVM = """
declare <16 x float> @llvm.x86.avx512bf16.dpbf16ps.512(<16 x float>, <32 x bfloat>, <32 x bfloat>)
define linkonce_odr <16 x float> @tvmstruct_bf16_dot(<16 x float> %c, <16 x i32> %a, <16 x i32> %b)
    alwaysinline nounwind {
  %x = bitcast <16 x i32> %a to <32 x bfloat>
  %w = bitcast <16 x i32> %b to <32 x bfloat>
  %y = call <16 x float> @llvm.x86.avx512bf16.dpbf16ps.512(
    <16 x float> %c, <32 x bfloat> %x, <32 x bfloat> %w)
  ret <16 x float> %y
}
define linkonce_odr <16 x i32> @tvmstruct_bf16_round(<32 x float> %x) alwaysinline nounwind {
  %b = fptrunc <32 x float> %x to <32 x bfloat>
  %w = bitcast <32 x bfloat> %b to <16 x i32>
  ret <16 x i32> %w
}
"""


def bf16_dense(
    isa: Isa, n: int, k: int, epilogue: Epilogue, rows: int, *, multiple: int = 1
) -> Kernel:
    """Return dense on words of two bfloat16 with x rounded to bfloat16 (needs AVX512-BF16)."""
    problem = Problem.of(isa, n, k, epilogue, rows, multiple=multiple)
    return word_dense("bf16_dense", problem, _Dot)


def bf16_weight_dense(isa: Isa, n: int, k: int, epilogue: Epilogue, rows: int) -> Kernel:
    """Return dense on the same weights with x and the arithmetic in float32 (any CPU)."""
    problem = Problem.of(isa, n, k, epilogue, rows)
    return word_dense("bf16_weight_dense", problem, _Widen)


class _Dot:
    """Pairs of bfloat16 by ``vdpbf16ps``."""

    prepares, llvm = True, LLVM

    def __init__(self, problem: Problem) -> None:
        self.problem = problem
        self.pairs = -(-problem.k // 2)

    def declare(self) -> None:
        self.w = self.problem.words(2)

    def prepare(self, x, m, parallel: bool) -> None:
        k = self.problem.k
        self.stride = row_stride(-(-k // STEP) * (STEP // 2))
        self.x = scratch(m, self.stride, "int32")
        with loops(m, kind=T.parallel if parallel else None) as (row,):
            round_row(x, self.x, row, row * self.stride, k)

    def sums(self, tile: Tile) -> list[list]:
        height, row, panel = tile
        lanes = self.problem.isa.lanes

        def step(p, add) -> None:
            for i, v in product(range(height), range(VECTORS)):
                left = T.broadcast(self.x[(row + i) * self.stride + p], lanes)
                add(i, v, left, self.w[panel, p, T.ramp(i64(v * lanes), 1, lanes)])

        tile_shape = (height, VECTORS)
        return accumulate(self.problem.isa, lanes, tile_shape, self.pairs, step, dot=_dot)


class _Widen:
    """Weights widened to float32 by a shift (even k) and a mask (odd k)."""

    prepares, llvm = False, ""

    def __init__(self, problem: Problem) -> None:
        self.problem = problem

    def declare(self) -> None:
        self.w = self.problem.words(2)

    def prepare(self, x, m, parallel: bool) -> None:
        self.x = x

    def sums(self, tile: Tile) -> list[list]:
        height, row, panel = tile
        lanes, k = self.problem.isa.lanes, self.problem.k

        def left(i: int, p):
            return T.broadcast(self.x[row + i, p], lanes)

        def words(p, v: int):
            return self.w[panel, p, T.ramp(i64(v * lanes), 1, lanes)]

        def step(p, add) -> None:
            for i, v in product(range(height), range(VECTORS)):
                add(i, v, left(i, p * 2), widen(words(p, v), 0, lanes))
            for i, v in product(range(height), range(VECTORS)):
                add(i, v, left(i, p * 2 + 1), widen(words(p, v), 1, lanes))

        def last(i: int, v: int):
            return left(i, k - 1) * widen(words(k // 2, v), 0, lanes)

        tile_shape = (height, VECTORS)
        start = last if k % 2 else None
        return accumulate(self.problem.isa, lanes, tile_shape, k // 2, step, start)


def row_stride(words: int) -> int:
    """Return the words from one row to the next: rows a power of two apart share cache sets."""
    return -(-words // 16) * 16 + 16


def scratch(m, stride: int, dtype: str):
    """Allocate m rows; flat, because TVM would compact the padding of a second axis away."""
    return T.alloc_buffer((T.max(m, i64(1)) * i64(stride),), dtype, scope="global")


def round_row(x, words, row, place, k: int) -> None:
    """Emit the rounding of one row of x into words of two bfloat16, padded with zeros."""
    lanes = STEP // 2
    with loops(k // STEP) as (chunk,):
        value = x[row, T.ramp(chunk * STEP, 1, STEP)]
        T.buffer_store(words, _round(value), [T.ramp(place + chunk * lanes, 1, lanes)])
    if rest := k % STEP:
        whole = k // STEP
        value = padded_tail(x, row, whole * STEP, rest, STEP)
        T.buffer_store(words, _round(value), [T.ramp(place + whole * lanes, 1, lanes)])


def padded_tail(x, row, start: int, rest: int, size: int):
    """Emit a copy of ``x[row, start : start + rest]`` and return it as a vector of ``size``."""
    tail = T.alloc_buffer((size,), "float32", scope="global")
    T.buffer_store(tail, T.broadcast(T.float32(0), size), [T.ramp(0, 1, size)])
    with loops(rest) as (j,):
        T.buffer_store(tail, x[row, start + j], [j])
    return tail[T.ramp(0, 1, size)]


def _round(value):
    return T.call_extern("int32x16", "tvmstruct_bf16_round", value)


def _dot(total, left, right):
    return T.call_pure_extern("float32x16", "tvmstruct_bf16_dot", total, left, right)
