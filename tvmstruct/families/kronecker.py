"""Sums of Kronecker products: ``W = sum_r A_r (x) B_r`` (Van Loan, Pitsianis; Shapeshifter).

With the factors stacked, the whole sum is one chain of two shared matmuls: the second
reduces over ``r`` as it multiplies, so ``r`` terms cost no additions.
"""

from __future__ import annotations

import math

import numpy as np

from tvmstruct.fit import Fit, Solver, as_stored, as_weight, complete, relative_error, truncate
from tvmstruct.ops import Array, Op, Permute, SharedBlockDiag, crop, pad, product, swap, zeros

Shape = tuple[int, int]


def kronecker(a: Array, b: Array) -> Op:
    """Return ``y = x @ sum_r kron(a[r], b[r])`` for ``a`` (r, n1, m1) and ``b`` (r, n2, m2).

    The factor that costs fewer multiply-adds in first place is applied first.
    """
    (r, n1, m1), (_, n2, m2) = a.shape, b.shape
    if _b_first_cost(n1, m1, n2, m2) < _a_first_cost(n1, m1, n2, m2):
        inner = SharedBlockDiag(_side_by_side(b), n1)  # (n1, n2) -> (n1, m2, r)
        outer = SharedBlockDiag(a.reshape(r * n1, m1), m2)  # (m2, r, n1) -> (m2, m1)
        return inner @ Permute((n1, m2, r), (1, 2, 0)) @ outer @ swap(m2, m1)
    inner = SharedBlockDiag(_side_by_side(a), n2)  # (n2, n1) -> (n2, m1, r)
    outer = SharedBlockDiag(b.reshape(r * n2, m2), m1)  # (m1, r, n2) -> (m1, m2)
    return swap(n1, n2) @ inner @ Permute((n2, m1, r), (1, 2, 0)) @ outer


def nearest_kronecker(
    w: Array,
    *,
    r: int,
    a: Shape | None = None,
    b: Shape | None = None,
    solver: Solver = truncate,
) -> Fit:
    """Return the sum of ``r`` Kronecker products nearest to ``w``.

    ``a`` and ``b`` are the factor shapes ``(n1, m1)`` and ``(n2, m2)``; left out, both are
    ``(ceil(sqrt(n_in)), ceil(sqrt(n_out)))`` and the product is cropped (Shapeshifter).
    The exact optimum by the singular value decomposition of the rearranged ``w`` where the
    shapes divide; where they are cropped, alternating least squares on the entries that count.
    """
    target = as_weight(w)
    a, b = factor_shapes(*target.shape, r=r, a=a, b=b)
    factor_a, factor_b, error = kronecker_factors(target, r=r, a=a, b=b, solver=solver)
    op = product(
        *pad(target.shape[0], a[0] * b[0]),
        kronecker(factor_a, factor_b),
        *crop(a[1] * b[1], target.shape[1]),
    )
    return Fit(as_stored(op, w), error, "kronecker", {"r": len(factor_a), "a": a, "b": b})


def kronecker_factors(
    target: Array,
    *,
    r: int,
    a: Shape | None = None,
    b: Shape | None = None,
    solver: Solver = truncate,
) -> tuple[Array, Array, float]:
    """Return the factors (r, n1, m1) and (r, n2, m2) nearest to ``target``, and the error."""
    (n1, m1), (n2, m2) = a, b = factor_shapes(*target.shape, r=r, a=a, b=b)
    full = np.zeros((n1 * n2, m1 * m2))
    full[: target.shape[0], : target.shape[1]] = target
    known = np.zeros(full.shape, bool)
    known[: target.shape[0], : target.shape[1]] = True
    left, right = complete(_rearrange(full, a, b), _rearrange(known, a, b), r, solver=solver)
    r_found = left.shape[-1]
    factor_a, factor_b = left.T.reshape(r_found, n1, m1), right.reshape(r_found, n2, m2)
    approximation = _restore(left @ right, a, b)[: target.shape[0], : target.shape[1]]
    return factor_a, factor_b, relative_error(approximation, target)


def factor_shapes(
    n_in: int,
    n_out: int,
    *,
    r: int,
    a: Shape | None = None,
    b: Shape | None = None,
) -> tuple[Shape, Shape]:
    """Return the shapes of both factors, completed and checked against the weight's."""
    root = (math.isqrt(n_in - 1) + 1, math.isqrt(n_out - 1) + 1)
    if a is None and b is None:
        a = b = root
    elif a is None or b is None:
        (p, q) = a or b or root
        other = (-(-n_in // p), -(-n_out // q)) if min(p, q) > 0 else root
        a, b = a or other, b or other
    cover = (a[0] * b[0], a[1] * b[1])
    if r < 1 or min(*a, *b) < 1 or cover[0] < n_in or cover[1] < n_out:
        raise ValueError(
            f"kronecker: r={r}, a={a}, b={b} cover {cover[0]}x{cover[1]} of a {n_in}x{n_out} "
            "weight; want r >= 1 and a[i] * b[i] of at least its sides"
        )
    return a, b


def kronecker_template(
    n_in: int, n_out: int, *, r: int, a: Shape | None = None, b: Shape | None = None
) -> Op:
    """Return a member of zeros: the shapes that training starts from."""
    a, b = factor_shapes(n_in, n_out, r=r, a=a, b=b)
    r = min(r, math.prod(a), math.prod(b))
    core = kronecker(zeros(r, *a), zeros(r, *b))
    return product(*pad(n_in, a[0] * b[0]), core, *crop(a[1] * b[1], n_out))


def kronecker_params(
    n_in: int, n_out: int, *, r: int, a: Shape | None = None, b: Shape | None = None
) -> int:
    """Return ``r (n1 m1 + n2 m2)``."""
    (n1, m1), (n2, m2) = factor_shapes(n_in, n_out, r=r, a=a, b=b)
    return min(r, n1 * m1, n2 * m2) * (n1 * m1 + n2 * m2)


def kronecker_macs(
    n_in: int, n_out: int, *, r: int, a: Shape | None = None, b: Shape | None = None
) -> int:
    """Return ``r min(n1 n2 m2 + m2 n1 m1, n2 n1 m1 + m1 n2 m2)``."""
    (n1, m1), (n2, m2) = factor_shapes(n_in, n_out, r=r, a=a, b=b)
    cost = min(_a_first_cost(n1, m1, n2, m2), _b_first_cost(n1, m1, n2, m2))
    return min(r, n1 * m1, n2 * m2) * cost


def _a_first_cost(n1: int, m1: int, n2: int, m2: int) -> int:
    return n2 * n1 * m1 + m1 * n2 * m2


def _b_first_cost(n1: int, m1: int, n2: int, m2: int) -> int:
    return n1 * n2 * m2 + m2 * n1 * m1


def _side_by_side(a: Array) -> Array:  # (r, n, m) -> (n, m r): what meets later lies together
    return np.ascontiguousarray(a.transpose(1, 2, 0)).reshape(a.shape[1], -1)


def _rearrange(w: Array, a: Shape, b: Shape) -> Array:
    """Return the ``(n1 m1, n2 m2)`` matrix whose rank is the number of Kronecker terms."""
    (n1, m1), (n2, m2) = a, b
    return w.reshape(n1, n2, m1, m2).swapaxes(1, 2).reshape(n1 * m1, n2 * m2)


def _restore(x: Array, a: Shape, b: Shape) -> Array:
    (n1, m1), (n2, m2) = a, b
    return x.reshape(n1, m1, n2, m2).swapaxes(1, 2).reshape(n1 * n2, m1 * m2)
