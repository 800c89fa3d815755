"""What a structured operator gives in low precision, in numpy: no code of the compiler.

Every product rounds the row that it reads, one row of features at a time, and its weights.
"""

from __future__ import annotations

from collections.abc import Callable

import ml_dtypes
import numpy as np

from tvmstruct import ops

Multiply = Callable[[np.ndarray, np.ndarray], np.ndarray]  # x (rows, g, p), w (g, p, q)


def evaluate(op: ops.Op, x: np.ndarray, multiply: Multiply) -> np.ndarray:
    """Return ``x @ op`` in float32 with products as ``multiply`` does them; x (rows, n_in)."""
    if isinstance(op, ops.Product):
        for factor in op.factors:
            x = evaluate(factor, x, multiply)
        return x
    if isinstance(op, ops.Sum):
        first, *rest = (evaluate(term, x, multiply) for term in op.terms)
        return sum(rest, first)
    if isinstance(op, ops.Dense | ops.BlockDiag | ops.SharedBlockDiag):
        w = op.w if op.w.ndim == 3 else op.w[None]
        groups = op.n_in // w.shape[1]
        blocks = np.broadcast_to(w.astype(np.float32), (groups, *w.shape[1:]))
        y = multiply(x.reshape(len(x), groups, w.shape[1]), blocks)
        return y.astype(np.float32).reshape(len(x), op.n_out)
    return op.apply(x).astype(np.float32)


def exactly(x: np.ndarray, w: np.ndarray) -> np.ndarray:
    """Multiply without rounding."""
    return np.einsum("rgp,gpq->rgq", x.astype(np.float64), w.astype(np.float64))


def in_int8(x: np.ndarray, w: np.ndarray) -> np.ndarray:
    """Multiply int8 by int8: a scale for each row of x, and for each block and output of w."""
    top = np.abs(x).max(axis=(1, 2), keepdims=True)
    inverse = np.where(top > np.float32(1e-30), np.float32(127) / np.maximum(top, 1e-30), 0)
    rows = np.rint(x.astype(np.float64) * inverse.astype(np.float32)).astype(np.int64)
    scale = (np.abs(w).max(axis=1, keepdims=True) / 127).astype(np.float32)
    whole = np.rint(w * np.divide(1, scale, out=np.zeros_like(scale), where=scale > 0))
    sums = np.einsum("rgp,gpq->rgq", rows, whole.astype(np.int64)).astype(np.float32)
    return sums * (top * np.float32(1 / 127)) * scale[:, 0]


def in_bf16(x: np.ndarray, w: np.ndarray) -> np.ndarray:
    """Multiply bfloat16 by bfloat16."""
    return exactly(*(a.astype(ml_dtypes.bfloat16) for a in (x, w)))


def unless_small(multiply: Multiply, least: int) -> Multiply:
    """Multiply blocks of less than ``least`` rows without rounding."""
    return lambda x, w: multiply(x, w) if w.shape[1] >= least else exactly(x, w)
