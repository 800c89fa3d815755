"""Monarch: ``W = P' L P R`` in column form, both factors block diagonal (Dao et al., 2022)."""

from __future__ import annotations

import numpy as np

from tvmstruct.fit import Fit, Solver, as_stored, as_weight, relative_error, truncate
from tvmstruct.ops import Array, BlockDiag, Op, Permute, crop, pad, product, swap, zeros


def monarch(first: Array, second: Array) -> Op:
    """Return the operator of ``first`` (b, p, b r) and ``second`` (b, b r, s).

    Input group i sends r features to every output group j, which mixes its b r features;
    the outputs interleave: feature ``t b + j`` is output t of group j.
    """
    b, _, inner = first.shape
    if second.shape[:2] != (b, inner) or inner % b:
        raise ValueError(
            f"monarch: first has shape {first.shape} and second {second.shape}; "
            "want (b, p, b r) and (b, b r, s)"
        )
    route = Permute((b, b, inner // b), (1, 0, 2))
    return BlockDiag(first) @ route @ BlockDiag(second) @ swap(b, second.shape[2])


def nearest_monarch(w: Array, *, b: int, r: int | None = None, solver: Solver = truncate) -> Fit:
    """Return the Monarch operator of ``b`` blocks nearest to ``w``: the exact optimum.

    The part of ``w`` between input group i and output group j has rank r: b^2 separate
    truncated singular value decompositions.  ``r`` left out is ``n_in / b^2``, for which the
    first factor has square blocks.
    """
    target = as_weight(w)
    (n_in, n_out), r = target.shape, pair_rank(*target.shape, b=b, r=r)
    p, s = -(-n_in // b), -(-n_out // b)
    full = np.zeros((b * p, s * b))
    full[:n_in, :n_out] = target
    left, right = solver(full.reshape(b, p, s, b).transpose(0, 3, 1, 2), r)  # (b, b, p, s)
    fitted = (left @ right).transpose(0, 2, 3, 1).reshape(full.shape)[:n_in, :n_out]
    first = left.transpose(0, 2, 1, 3).reshape(b, p, b * r)
    second = right.transpose(1, 0, 2, 3).reshape(b, b * r, s)
    op = product(*pad(n_in, b * p), monarch(first, second), *crop(s * b, n_out))
    return Fit(as_stored(op, w), relative_error(fitted, target), "monarch", {"b": b, "r": r})


def monarch_template(n_in: int, n_out: int, *, b: int, r: int | None = None) -> Op:
    """Return a member of zeros: the shapes that training starts from."""
    r = pair_rank(n_in, n_out, b=b, r=r)
    p, s = -(-n_in // b), -(-n_out // b)
    core = monarch(zeros(b, p, b * r), zeros(b, b * r, s))
    return product(*pad(n_in, b * p), core, *crop(s * b, n_out))


def pair_rank(n_in: int, n_out: int, *, b: int, r: int | None = None) -> int:
    """Return the rank of each block pair, ``ceil(n_in / b^2)`` unless given, after checks."""
    if not 1 <= b <= min(n_in, n_out):
        raise ValueError(
            f"monarch: b={b} blocks for a {n_in}x{n_out} weight; want 1 <= b <= {min(n_in, n_out)}"
        )
    most = min(-(-n_in // b), -(-n_out // b))
    r = min(-(-n_in // (b * b)), most) if r is None else r
    if not 1 <= r <= most:
        raise ValueError(f"monarch: r={r} for {n_in}x{n_out} and b={b}; want 1 <= r <= {most}")
    return r


def monarch_params(n_in: int, n_out: int, *, b: int, r: int | None = None) -> int:
    """Return ``n_in^2 / b + n_in n_out / b`` (for the default rank), sides rounded up."""
    r = pair_rank(n_in, n_out, b=b, r=r)
    return b * b * r * (-(-n_in // b) + -(-n_out // b))
