"""GEMM and ALU of the simulator as TIR functions, compiled by LLVM once per design.

Indices must have been checked: nothing here looks at bounds.  Sums wrap at 32 bits by being
formed in 64 and cut, for TVM promises LLVM that int32 sums do not overflow.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any, NamedTuple

import tvm
from tvm.script import tirx as T

from tvmstruct.targets import resolve
from tvmstruct.vta.config import Config, Memory
from tvmstruct.vta.isa import AluOp

UNROLLED = 32


class Kernels(NamedTuple):
    """``gemm(acc, inp, wgt, uops, first, uops used, extents, factors)``, and one for each op."""

    gemm: Callable[..., None]
    alu: dict[AluOp, Callable[..., None]]


@cache
def kernels(config: Config) -> Kernels:
    """Return compiled kernels of a design; the first call takes about a second."""
    functions: dict[str, Any] = {"gemm": _gemm(config)}
    functions |= {f"alu_{op.name.lower()}": _alu(config, op) for op in AluOp}
    named = {name: f.with_attr("global_symbol", name) for name, f in functions.items()}
    built = tvm.compile(tvm.IRModule(named), target=resolve("host").target)
    return Kernels(built["gemm"], {op: built[f"alu_{op.name.lower()}"] for op in AluOp})


def element_dtype(config: Config, memory: Memory) -> str:
    """Return the dtype of an element on chip: whole bytes, however narrow it is in DRAM."""
    return f"int{max(8, config.width(memory))}"


def _gemm(config: Config) -> Any:
    batch, ci, co = config.batch, config.block_in, config.block_out
    inp_dtype, wgt_dtype = (element_dtype(config, m) for m in (Memory.INP, Memory.WGT))
    bits = config.width(Memory.INP) + config.width(Memory.WGT) - 1 + config.log_block
    sum_dtype = "int32" if bits < 32 else "int64"
    unroll = T.unroll if ci <= UNROLLED else T.serial

    @T.prim_func(s_tir=True)
    def gemm(
        acc_h: T.handle, inp_h: T.handle, wgt_h: T.handle, uop_h: T.handle,
        first: T.int32, uops: T.int32, outer: T.int32, inner: T.int32,
        d_out: T.int32, d_in: T.int32, s_out: T.int32, s_in: T.int32,
        w_out: T.int32, w_in: T.int32,
    ):  # fmt: skip
        accs, inps, wgts, words = T.int32(), T.int32(), T.int32(), T.int32()
        acc = T.match_buffer(acc_h, (accs, batch, co), "int32")
        inp = T.match_buffer(inp_h, (inps, batch, ci), inp_dtype)
        wgt = T.match_buffer(wgt_h, (wgts, ci, co), wgt_dtype)  # transposed when loaded
        uop = T.match_buffer(uop_h, (words, 3), "int32")
        total = T.alloc_buffer((co,), sum_dtype)
        for y, x, u in T.grid(outer, inner, uops):
            for b in range(batch):
                for o in T.vectorized(co):
                    total[o] = T.cast(0, sum_dtype)
                for k in unroll(ci):
                    for o in T.vectorized(co):
                        total[o] = total[o] + T.cast(
                            inp[uop[first + u, 1] + y * s_out + x * s_in, b, k], sum_dtype
                        ) * T.cast(wgt[uop[first + u, 2] + y * w_out + x * w_in, k, o], sum_dtype)
                for o in T.vectorized(co):
                    acc[uop[first + u, 0] + y * d_out + x * d_in, b, o] = T.cast(
                        T.cast(acc[uop[first + u, 0] + y * d_out + x * d_in, b, o], "int64")
                        + T.cast(total[o], "int64"),
                        "int32",
                    )

    return gemm


def _alu(config: Config, op: AluOp) -> Any:
    lanes = config.batch * config.block_out
    apply = _APPLY[op]

    @T.prim_func(s_tir=True)
    def alu(
        acc_h: T.handle, uop_h: T.handle, first: T.int32, uops: T.int32,
        outer: T.int32, inner: T.int32, d_out: T.int32, d_in: T.int32,
        s_out: T.int32, s_in: T.int32, use_imm: T.int32, imm: T.int32,
    ):  # fmt: skip
        accs, words = T.int32(), T.int32()
        acc = T.match_buffer(acc_h, (accs, lanes), "int32")
        uop = T.match_buffer(uop_h, (words, 3), "int32")
        if use_imm != 0:
            for y, x, u in T.grid(outer, inner, uops):
                for o in range(lanes):
                    acc[uop[first + u, 0] + y * d_out + x * d_in, o] = apply(
                        acc[uop[first + u, 0] + y * d_out + x * d_in, o], imm
                    )
        else:
            for y, x, u in T.grid(outer, inner, uops):
                for o in range(lanes):
                    acc[uop[first + u, 0] + y * d_out + x * d_in, o] = apply(
                        acc[uop[first + u, 0] + y * d_out + x * d_in, o],
                        acc[uop[first + u, 1] + y * s_out + x * s_in, o],
                    )

    return alu


def _shift(a: Any, b: Any) -> Any:
    """Amounts modulo 32, as the C++ of the reference simulator does on x86."""
    right = T.shift_right(a, T.bitwise_and(b, T.int32(31)))
    amount = T.cast(T.bitwise_and(T.int32(0) - b, T.int32(31)), "int64")
    left = T.cast(T.shift_left(T.cast(a, "int64"), amount), "int32")
    return T.Select(b >= 0, right, left)


def _wide(a: Any) -> Any:
    return T.cast(a, "int64")


_APPLY: dict[AluOp, Callable[[Any, Any], Any]] = {
    AluOp.MIN: lambda a, b: T.min(a, b),
    AluOp.MAX: lambda a, b: T.max(a, b),
    AluOp.ADD: lambda a, b: T.cast(_wide(a) + _wide(b), "int32"),
    AluOp.SHR: _shift,
    AluOp.MUL: lambda a, b: T.cast(_wide(a) * _wide(b), "int32"),
}
