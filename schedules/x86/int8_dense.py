"""Dense layers on int8 weights, with rows of x rounded to int8 on the fly and exact int32 sums.

The weight has one scale per column, x one per row and call: ``y = (q_x @ q_w) s_x s_w``.
``vpdpbusd`` multiplies unsigned by signed bytes, so a row is kept as q_x + 128 and the sums start
at ``-128 * q_w.sum(axis=0)``; nothing saturates on the way, int32 wraps and unwraps.

A row with NaN or infinity gives NaN in all columns; a row with no magnitude over 1e-30 counts
as zero.
"""

from __future__ import annotations

from itertools import product

from tvm.script.ir_builder import tirx as T

from tvmstruct.schedules.builder import argument, i64, loops
from tvmstruct.schedules.compute.dense import Epilogue
from tvmstruct.schedules.compute.low_precision import LARGEST
from tvmstruct.schedules.registry import Kernel
from tvmstruct.schedules.x86.bf16_dense import padded_tail, row_stride, scratch
from tvmstruct.schedules.x86.register_tile import accumulate
from tvmstruct.schedules.x86.word_dense import VECTORS, Problem, Tile, word_dense
from tvmstruct.targets import Isa

STEP = 16  # elements of x that are rounded together
OFFSET = 128  # makes bytes of x unsigned
ROUNDER = 1.5 * 2**23 + OFFSET  # added to v, its low byte is rint(v) + 128 in two's complement
SMALLEST = 1e-30  # below, the reciprocal of a row's scale could overflow


def int8_dense(
    isa: Isa, n: int, k: int, epilogue: Epilogue, rows: int, *, multiple: int = 1
) -> Kernel:
    """Return dense on words of four int8: x, w, start, scale, [bias], [residual], y."""
    problem = Problem.of(isa, n, k, epilogue, rows, multiple=multiple)
    return word_dense("int8_dense", problem, _Dot)


class _Dot:
    """Groups of four bytes by ``vpdpbusd``."""

    prepares, llvm = True, ""

    def __init__(self, problem: Problem) -> None:
        self.problem = problem
        self.words = -(-problem.k // 4)

    def declare(self) -> None:
        self.w = self.problem.words(4)
        self.start, self.scale = declare_columns(self.problem)

    def prepare(self, x, m, parallel: bool) -> None:
        k, rows = self.problem.k, T.max(m, i64(1))
        self.stride = 4 * row_stride(-(-k // STEP) * (STEP // 4))
        self.x = scratch(m, self.stride, "uint8")
        self.row_scale = T.alloc_buffer((rows,), "float32", scope="global")
        with loops(m, kind=T.parallel if parallel else None) as (row,):
            quantize_row(x, (self.x, row * self.stride), self.row_scale, row, k)

    def sums(self, tile: Tile) -> list[list]:
        height, row, panel = tile
        lanes, base = self.problem.isa.lanes, panel * self.problem.width

        def step(p, add) -> None:
            for i, v in product(range(height), range(VECTORS)):
                place = T.ramp((row + i) * self.stride + p * 4, 1, 4)
                word = T.reinterpret("int32", self.x[place])
                right = self.w[panel, p, T.ramp(i64(v * lanes), 1, lanes)]
                add(i, v, T.broadcast(word, lanes), right)

        def start(_line: int, v: int):
            return self.start[T.ramp(base + v * lanes, 1, lanes)]

        def dot(total, left, right):
            return byte_dot(total, left, right, lanes)

        tile_shape = (height, VECTORS)
        sums = accumulate(
            self.problem.isa, lanes, tile_shape, self.words, step, start, dtype="int32", dot=dot
        )

        def scaled(value, i: int, v: int):
            value = T.cast(value, f"float32x{lanes}")
            row_scale = T.broadcast(self.row_scale[row + i], lanes)
            return value * row_scale * self.scale[T.ramp(base + v * lanes, 1, lanes)]

        return [[scaled(sums[v][i], i, v) for i in range(height)] for v in range(VECTORS)]


def declare_columns(problem: Problem) -> tuple:
    """Declare what int8 knows of every column: where its sums start, and its scale."""
    columns = i64(problem.panels * problem.width)
    return argument("start", (columns,), "int32"), argument("scale", (columns,))


def quantize_row(x, out: tuple, scales, row, k: int) -> None:
    """Emit the rounding of one row of x to bytes ``rint(127 x / max |x|) + 128`` and its scale."""
    quantized, place = out
    whole, rest = divmod(k, STEP)
    at = T.ramp(0, 1, STEP)
    largest = T.alloc_buffer((STEP,), "float32", scope="global")
    poison = T.alloc_buffer((STEP,), "float32", scope="global")  # zero, or NaN for NaN and inf
    tail = padded_tail(x, row, whole * STEP, rest, STEP) if rest else None
    for total in (largest, poison):
        T.buffer_store(total, T.broadcast(T.float32(0), STEP), [at])

    def look(value) -> None:
        T.buffer_store(largest, T.max(_absolute(value), largest[at]), [at])
        zero = T.broadcast(T.float32(0), STEP)
        T.buffer_store(poison, poison[at] + value * zero, [at])

    with loops(whole) as (chunk,):
        look(x[row, T.ramp(chunk * STEP, 1, STEP)])
    if rest:
        look(tail)
    top, bad = _fold(largest, T.max), _fold(poison, lambda a, b: a + b)
    inverse = T.alloc_buffer((1,), "float32", scope="global")
    fits = top > T.float32(SMALLEST)
    reciprocal = T.float32(LARGEST) / T.max(top, T.float32(SMALLEST))
    T.buffer_store(inverse, T.if_then_else(fits, reciprocal, T.float32(0)), [0])
    T.buffer_store(scales, top * T.float32(1 / LARGEST) + bad, [row])

    def put(value, column) -> None:
        shifted = _fma(value, T.broadcast(inverse[0], STEP), T.broadcast(T.float32(ROUNDER), STEP))
        byte = T.cast(T.reinterpret(f"uint32x{STEP}", shifted), f"uint8x{STEP}")
        T.buffer_store(quantized, byte, [T.ramp(place + column, 1, STEP)])

    with loops(whole) as (chunk,):
        put(x[row, T.ramp(chunk * STEP, 1, STEP)], chunk * STEP)
    if rest:
        put(tail, i64(whole * STEP))


def _fold(vector, join):
    """Return one value from the ``STEP`` elements of a small buffer, by a tree of ``join``."""
    values = [vector[i] for i in range(STEP)]
    while len(values) > 1:
        values = [join(a, b) for a, b in zip(values[::2], values[1::2], strict=True)]
    return values[0]


def _absolute(value):
    mask = T.broadcast(T.int32(0x7FFFFFFF), STEP)
    bits = T.reinterpret(f"int32x{STEP}", value) & mask
    return T.reinterpret(f"float32x{STEP}", bits)


def _fma(a, b, c):
    return T.call_llvm_pure_intrin(
        T.llvm_lookup_intrinsic_id("llvm.fma"), a, b, c, dtype=f"float32x{STEP}"
    )


def byte_dot(total, left, right, lanes: int, *, dots: bool = True):
    """Return ``total`` plus the products of words, by the instruction of 512 or of 256 bits.

    Without ``dots`` pairs of bytes are widened to 16 bits first: exact on every CPU.
    """
    if not dots:
        return _pair_dot(total, left, right, lanes)
    name = f"llvm.x86.avx512.vpdpbusd.{lanes * 32}"
    words = (T.reinterpret(f"int8x{4 * lanes}", value) for value in (left, right))
    return T.call_llvm_pure_intrin(
        T.llvm_lookup_intrinsic_id(name), total, *words, dtype=f"int32x{lanes}"
    )


PAIRS = {4: "sse2.pmadd.wd", 8: "avx2.pmadd.wd", 16: "avx512.pmaddw.d.512"}


def _pair_dot(total, left, right, lanes: int):
    """Return ``total`` plus products of unsigned by signed bytes: those in even places, then odd.

    ``pmaddubsw`` multiplies bytes, but its sums of two saturate.
    """
    mask = T.broadcast(T.int32(0x00FF00FF), lanes)
    eight = T.broadcast(T.int16(8), 2 * lanes)
    whole = T.reinterpret(f"int16x{2 * lanes}", right)
    unsigned = left & mask, (left >> T.broadcast(T.int32(8), lanes)) & mask
    signed = (whole << eight) >> eight, whole >> eight
    number = T.llvm_lookup_intrinsic_id(f"llvm.x86.{PAIRS[lanes]}")
    for a, b in zip(unsigned, signed, strict=True):
        pairs = T.reinterpret(f"int16x{2 * lanes}", a)
        total = total + T.call_llvm_pure_intrin(number, pairs, b, dtype=f"int32x{lanes}")
    return total
