"""word2ketXS: a table of any order, ``E = sum_k F_1k (x) ... (x) F_nk`` (Panahi, equation 3.4).

In row form a factor has the shape t x q: t^n covers the vocabulary and q^n the dimension, both
cropped.  Order 2 is the sum of Kroneckers of Shapeshifter.
"""

from __future__ import annotations

import math
import os
from collections.abc import Sequence

import numpy as np

from tvmstruct.families.kronecker import kronecker, kronecker_factors, kronecker_macs
from tvmstruct.fit import Fit, as_stored, as_weight, relative_error
from tvmstruct.ops import Array, Op, SharedBlockDiag, add, crop, pad, product, swap, zeros
from tvmstruct.polyadic import compose, decompose

ARRAYS = 5  # of float64, as large as the uncropped table, that a fit holds at a time
SWEEPS = 20  # of least squares, at most
MOST = 6  # order, as in the paper's software; the fit's tensors have as many axes


def word2ket_xs(factors: Sequence[Array], n_in: int, n_out: int) -> Op:
    """Return ``y = x @ sum_k kron(factors[0][k], factors[1][k], ...)``, cropped to n_in x n_out.

    ``factors`` are ``order`` arrays (rank, t_j, q_j); ``n_in`` is the vocabulary of an
    embedding table and ``n_out`` its dimension.
    """
    rank, rows, columns = check_factors(factors, n_in, n_out)
    if len(factors) == 2:
        body = kronecker(*factors)
    else:
        body = add(*(_chain([f[k] for f in factors]) for k in range(rank)))
    return product(*pad(n_in, rows), body, *crop(columns, n_out))


def _chain(factors: Sequence[Array]) -> Op:
    """Return one term: the last digit of the index meets its factor, then comes to the front."""
    steps: list[Op] = []
    width = math.prod(f.shape[0] for f in factors)
    for f in reversed(factors):
        t, q = f.shape
        rest = width // t
        steps += [SharedBlockDiag(f, rest), swap(rest, q)]
        width = rest * q
    return product(*steps)


def nearest_word2ket_xs(w: Array, *, order: int, r: int, sweeps: int | None = None) -> Fit:
    """Return the word2ketXS table of ``r`` terms near ``w`` (vocabulary, dimension).

    The exact optimum for order 2 where the default factors divide the sides (see
    ``nearest_kronecker``); otherwise alternating least squares, which may stop at a local
    optimum: read ``Fit.error``.
    """
    factors, error = word2ket_xs_factors(w, order=order, r=r, sweeps=sweeps)
    n_in, n_out = np.shape(w)
    op = as_stored(word2ket_xs(factors, n_in, n_out), w)
    parameters = {"order": order, "r": factors[0].shape[0]}
    return Fit(op, error, "word2ket_xs", parameters | ({"sweeps": sweeps} if sweeps else {}))


def word2ket_xs_factors(
    w: Array, *, order: int, r: int, sweeps: int | None = None
) -> tuple[list[Array], float]:
    """Return float64 factors (r, t_j, q_j) of the nearest table, and its relative error."""
    target = as_weight(w)
    n_in, n_out = target.shape
    t, q = factor_sides(n_in, n_out, order=order, r=r)
    if order == 2:
        a, b, error = kronecker_factors(target, r=r)
        return [a, b], error
    _check_memory(n_in, n_out, (t * q) ** order)
    full = np.zeros((t**order, q**order))
    full[:n_in, :n_out] = target
    known = np.zeros(full.shape, bool)
    known[:n_in, :n_out] = True
    vectors = decompose(_rearrange(full, t, q), _rearrange(known, t, q), r, sweeps or SWEEPS)
    fitted = _restore(compose(vectors), t, q)[:n_in, :n_out]
    return [v.reshape(r, t, q) for v in vectors], relative_error(fitted, target)


def _check_memory(n_in: int, n_out: int, entries: int) -> None:
    """Refuse a fit whose tensors would not fit into the memory that is free."""
    need = ARRAYS * 8 * entries
    free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    if need > free:
        raise ValueError(
            f"word2ket_xs: fitting a {n_in}x{n_out} table takes {need / 1e9:.1f} GB, "
            f"{free / 1e9:.1f} GB are free; take order=2"
        )


def factor_sides(n_in: int, n_out: int, *, order: int, r: int) -> tuple[int, int]:
    """Return t and q, the least sides with t^order >= n_in and q^order >= n_out."""
    if not 2 <= order <= MOST or r < 1:
        raise ValueError(
            f"word2ket_xs: order={order}, r={r} for a {n_in}x{n_out} table; "
            f"want 2 <= order <= {MOST} and r >= 1"
        )
    return _root(n_in, order), _root(n_out, order)


def word2ket_xs_template(
    n_in: int, n_out: int, *, order: int, r: int, sweeps: int | None = None
) -> Op:
    """Return a member of zeros; ``sweeps`` is an option of fits and means nothing here."""
    del sweeps
    return word2ket_xs(zero_factors(n_in, n_out, order=order, r=r), n_in, n_out)


def zero_factors(n_in: int, n_out: int, *, order: int, r: int) -> list[Array]:
    """Return the ``order`` factors (r, t, q) of a table n_in x n_out, all zeros."""
    t, q = factor_sides(n_in, n_out, order=order, r=r)
    r = min(r, t * q) if order == 2 else r
    return [zeros(r, t, q) for _ in range(order)]


def word2ket_xs_params(
    n_in: int, n_out: int, *, order: int, r: int, sweeps: int | None = None
) -> int:
    """Return ``r n t q``: 380 for 118,655 x 300 at order 4 and rank 1 (Table 3)."""
    t, q = factor_sides(n_in, n_out, order=order, r=r)
    return (min(r, t * q) if order == 2 else r) * order * t * q


def word2ket_xs_macs(
    n_in: int, n_out: int, *, order: int, r: int, sweeps: int | None = None
) -> int:
    """Return the multiply-adds of ``x @ E`` for one row: each term meets its factors in turn.

    A lookup of one row costs none of them: it is ``r`` outer products of rows of the factors.
    """
    t, q = factor_sides(n_in, n_out, order=order, r=r)
    if order == 2:
        return kronecker_macs(n_in, n_out, r=r)
    return r * sum(t ** (order - j) * q ** (j + 1) for j in range(order))


def check_factors(factors: Sequence[Array], n_in: int, n_out: int) -> tuple[int, int, int]:
    """Return rank, rows and columns of the uncropped table after checking that they fit."""
    shapes = [np.shape(f) for f in factors]
    same = len({len(s) for s in shapes} | {3}) == 1 and len({s[0] for s in shapes}) == 1
    if not 2 <= len(shapes) <= MOST or not same or min(map(min, shapes)) < 1:
        raise ValueError(
            f"word2ket_xs: factors have the shapes {shapes}; "
            f"want 2 to {MOST} of (rank, t, q) with one rank of at least 1"
        )
    rows, columns = (math.prod(s[axis] for s in shapes) for axis in (1, 2))
    if not (1 <= n_in <= rows and 1 <= n_out <= columns):
        raise ValueError(
            f"word2ket_xs: factors {shapes} make a table {rows}x{columns}; it cannot be cropped "
            f"to {n_in}x{n_out}, are the factors transposed?"
        )
    return shapes[0][0], rows, columns


def _root(n: int, order: int) -> int:
    """Return the least integer whose ``order``-th power is at least ``n``."""
    root = max(1, round(n ** (1 / order)) - 1)
    while root**order < n:
        root += 1
    return root


def _rearrange(w: Array, t: int, q: int) -> Array:
    """Return the tensor with one axis of side ``t q`` per factor."""
    order = round(math.log(w.shape[0], t)) if t > 1 else round(math.log(w.shape[1], q))
    pairs = [axis for j in range(order) for axis in (j, order + j)]
    return w.reshape((t,) * order + (q,) * order).transpose(pairs).reshape((t * q,) * order)


def _restore(x: Array, t: int, q: int) -> Array:
    order = x.ndim
    back = [*range(0, 2 * order, 2), *range(1, 2 * order, 2)]
    return x.reshape((t, q) * order).transpose(back).reshape(t**order, q**order)
