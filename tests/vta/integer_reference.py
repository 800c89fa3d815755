"""What VTA computes for a linear step, in plain integers: independent of the product's code."""

from __future__ import annotations

import numpy as np

from tvmstruct import ops


def linear(op: ops.Op, bias, shift, x: np.ndarray, *, relu: bool) -> np.ndarray:
    """Return int8 rows: int32 sums, + bias, ReLU, arithmetic right shift, clip."""
    w = np.rint(op.to_dense()).astype(np.int64)
    total = np.zeros((len(x), op.n_out), np.int64)
    for k in range(op.n_in):  # one input after the other, as an accumulator does
        total += np.outer(x[:, k].astype(np.int64), w[k])
        assert np.abs(total).max(initial=0) < 1 << 31
    total += np.asarray(bias, np.int64)
    assert np.abs(total).max(initial=0) < 1 << 31
    if relu:
        total[total < 0] = 0
    shifted = np.floor_divide(total, 2 ** np.broadcast_to(np.asarray(shift), (op.n_out,)))
    return np.where(shifted > 127, 127, np.where(shifted < -128, -128, shifted)).astype(np.int8)
