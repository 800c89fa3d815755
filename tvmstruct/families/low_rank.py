"""Low rank: ``W = P Q``, the truncated singular value decomposition."""

from __future__ import annotations

from tvmstruct.fit import Fit, Solver, as_stored, as_weight, relative_error, truncate
from tvmstruct.ops import Array, Dense, Op, zeros


def low_rank(p: Array, q: Array) -> Op:
    """Return ``y = (x p) q`` for ``p`` (n_in, r) and ``q`` (r, n_out)."""
    return Dense(p) @ Dense(q)


def nearest_low_rank(w: Array, *, r: int, solver: Solver = truncate) -> Fit:
    """Return the best rank-``r`` approximation of ``w``, exact by Eckart, Young and Mirsky."""
    target = as_weight(w)
    if not 1 <= r <= min(target.shape):
        raise ValueError(
            f"low_rank: r={r} for a {target.shape[0]}x{target.shape[1]} weight; "
            f"want 1 <= r <= {min(target.shape)}"
        )
    p, q = solver(target, r)
    return Fit(as_stored(low_rank(p, q), w), relative_error(p @ q, target), "low_rank", {"r": r})


def low_rank_template(n_in: int, n_out: int, *, r: int) -> Op:
    """Return a member of zeros: the shapes that training starts from."""
    return low_rank(zeros(n_in, r), zeros(r, n_out))


def low_rank_params(n_in: int, n_out: int, *, r: int) -> int:
    """Return ``r (n_in + n_out)``."""
    return r * (n_in + n_out)
