"""A second simulator for tests, one tile operation at a time in plain Python and numpy."""

import numpy as np

from tvmstruct.vta.isa import Alu, AluOp, Gemm


def wrap(values: np.ndarray) -> np.ndarray:
    """Return int64 values cut to 32 bits."""
    return values.astype(np.uint64).astype(np.uint32).view(np.int32)


def tile_ops(i, uops):
    """Yield dst, src, wgt of every tile operation in order."""
    wgt = (i.wgt_factor_out, i.wgt_factor_in) if isinstance(i, Gemm) else (0, 0)
    factors = ((i.dst_factor_out, i.dst_factor_in), (i.src_factor_out, i.src_factor_in), wgt)
    for y in range(i.iter_out):
        for x in range(i.iter_in):
            for u in range(i.uop_bgn, i.uop_end):
                yield tuple(
                    int(w) + y * fo + x * fi for w, (fo, fi) in zip(uops[u], factors, strict=True)
                )


def gemm(i, uops, acc, inp, wgt) -> None:
    """Change acc (n, batch, out) in place; inp (n, batch, in), wgt (n, out, in)."""
    for d, s, w in tile_ops(i, uops):
        product = inp[s].astype(np.int64) @ wgt[w].astype(np.int64).T
        acc[d] = 0 if i.reset else wrap(acc[d].astype(np.int64) + product)


def shift(a: int, b: int) -> int:
    return a >> (b % 32) if b >= 0 else a << (-b % 32)


OPS = {
    AluOp.MIN: min,
    AluOp.MAX: max,
    AluOp.ADD: lambda a, b: a + b,
    AluOp.SHR: shift,
    AluOp.MUL: lambda a, b: a * b,
}


def alu(i: Alu, uops, acc) -> None:
    """Change acc (n, batch, out) in place."""
    for d, s, _ in tile_ops(i, uops):
        for place in np.ndindex(acc.shape[1:]):
            b = i.imm if i.use_imm else int(acc[s][place])
            value = OPS[i.alu_opcode](int(acc[d][place]), b) & 0xFFFFFFFF
            acc[d][place] = value - (1 << 32) if value >> 31 else value
