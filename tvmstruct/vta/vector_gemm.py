"""The proposed vector unit before the matrix unit, in the functional simulator."""

from __future__ import annotations

import numpy as np

from tvmstruct.vta.isa import VectorGemm

CHUNK = 4096  # tile operations at once


def vector_gemm(
    i: VectorGemm, uops: np.ndarray, acc: np.ndarray, inp: np.ndarray, wgt: np.ndarray
) -> None:
    """Add ``(inp[s] * inp[v]) @ wgt[w]`` to ``acc[d]``, wrapping at 32 bits.

    acc (depth, batch, out) is changed; inp (depth, batch, in), wgt (depth, in, out), uops
    (depth, 3).  Indices must have been checked.
    """
    words = uops[i.uop_bgn : i.uop_end].astype(np.int64)
    for y in range(i.iter_out):
        x = np.repeat(np.arange(i.iter_in), len(words))
        dst, src, weight = np.tile(words, (i.iter_in, 1)).T
        dst = dst + y * i.dst_factor_out + x * i.dst_factor_in
        src = src + y * i.src_factor_out + x * i.src_factor_in
        vec = i.vec_base + np.arange(i.vectors)
        for first in range(0, i.vectors, CHUNK):
            part = slice(first, first + CHUNK)
            scaled = inp[src[part]].astype(np.int64) * inp[vec[part]]
            product = scaled @ wgt[weight[part]].astype(np.int64)
            total = acc.astype(np.int64)
            np.add.at(total, dst[part], product)
            acc[...] = total.astype(np.int32)
