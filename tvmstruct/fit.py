"""Nearest members: the rank-r kernels behind the closed forms, and least squares over leaves.

The families call ``truncate`` where their nearest member is a stack of rank-r problems,
``complete`` where ragged sizes leave entries that do not matter, and ``fit`` otherwise.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import reduce
from typing import Any

import numpy as np

from tvmstruct.ops import (
    Array,
    BlockDiag,
    Dense,
    Diag,
    Op,
    Product,
    SharedBlockDiag,
    Sum,
    cast,
    transpose,
)

Factors = tuple[Array, Array]  # (..., p, r), (..., r, s)
Solver = Callable[[Array, int], Factors]

CG_STEPS = 40
STALL = 1e-9  # relative gain of a sweep under which it has converged
CLEAR = 1e-3  # of the largest singular value: far above the rounding of any stored dtype
ROUNDING = 1e-7  # relative error that float32 storage explains
LAPACK_SIDE = 24  # below this side an SVD is quicker than the Gram matrix and its refinement


@dataclass(frozen=True, eq=False)
class Fit:
    """An operator near a weight, and how near: ``error = ||W - op|| / ||W||`` (Frobenius)."""

    op: Op
    error: float
    family: str
    parameters: Mapping[str, Any] = field(default_factory=dict[str, Any])


def relative_error(approximation: Array, w: Array) -> float:
    """Return ``||w - approximation|| / ||w||``, zero where both are zero."""
    norm = float(np.linalg.norm(w))
    residual = float(np.linalg.norm(w - approximation))
    return residual / norm if norm > 0 else residual


def as_weight(w: Array) -> Array:
    """Return ``w`` in float64 after checking that it is a finite, non-empty matrix."""
    w = np.asarray(w)
    if w.ndim != 2 or w.size == 0:
        raise ValueError(f"weight has shape {w.shape}; want a non-empty matrix (n_in, n_out)")
    if not np.all(np.isfinite(w64 := w.astype(np.float64))):
        bad = int(np.size(w64) - np.count_nonzero(np.isfinite(w64)))
        raise ValueError(f"weight {w.shape} has {bad} NaN or infinite entries; repair the source")
    return w64


def as_stored(op: Op, w: Array) -> Op:
    """Rebuild ``op`` in the dtype of ``w`` (float32 where that is half precision)."""
    dtype = np.asarray(w).dtype
    return cast(op, dtype if dtype.char in "fd" else np.float32)


def truncate(x: Array, rank: int) -> Factors:
    """Return the best rank-``rank`` factors of every matrix in ``x`` (Eckart, Young, Mirsky).

    Wide spectra go through the Gram matrix ``x^T x``, whose eigenvectors are good to half
    the digits; one step of subspace iteration then restores the rest.
    """
    if x.shape[-2] < x.shape[-1]:
        left, right = truncate(x.swapaxes(-1, -2), rank)
        return right.swapaxes(-1, -2), left.swapaxes(-1, -2)
    rank = min(rank, x.shape[-1])
    if x.shape[-1] <= LAPACK_SIDE:
        u, s, vt = np.linalg.svd(x, full_matrices=False)
        return u[..., :rank] * s[..., None, :rank], vt[..., :rank, :]
    gram = x.swapaxes(-1, -2) @ x
    basis = np.linalg.eigh(gram)[1][..., ::-1][..., :rank]
    basis = np.linalg.qr(x.swapaxes(-1, -2) @ (x @ basis))[0]
    return x @ basis, basis.swapaxes(-1, -2)


def sketch(x: Array, rank: int) -> Factors:
    """Return factors of matrices that *are* of rank ``rank`` up to rounding, in three passes.

    The randomised range finder of Halko, Martinsson and Tropp (2011) with one power step,
    ``range(x x^T probe)``.  The first pass may run in float32: whatever it rounds to, the
    second maps it into the range of ``x``.  For other matrices use ``truncate``.
    """
    if x.shape[-2] > x.shape[-1]:
        left, right = sketch(x.swapaxes(-1, -2), rank)
        return right.swapaxes(-1, -2), left.swapaxes(-1, -2)
    rank = min(rank, x.shape[-2])
    probe = np.random.default_rng(0).standard_normal((x.shape[-2], rank), np.float32)
    unit = (x / max(float(np.abs(x).max()), np.finfo(np.float32).tiny)).astype(np.float32)
    basis = np.linalg.qr(x @ (unit.swapaxes(-1, -2) @ probe).astype(np.float64))[0]  # (..., p, r)
    return basis, basis.swapaxes(-1, -2) @ x


def complete(
    x: Array, known: Array, rank: int, sweeps: int = 20, solver: Solver = truncate
) -> Factors:
    """Return rank-``rank`` factors of ``x`` (..., p, s) near it where ``known`` (p, s) is true.

    Entries outside ``known`` are free.  Starts from the complete rows, which settles exact
    members at once, and goes on with alternating least squares, which never gets worse.
    With ``sketch``, which serves who looks for exact members only, it ends where the complete
    rows leave no choice: they span ``rank`` dimensions, so other factors are no nearer to exact.
    """
    if known.all():
        return solver(x, rank)
    x = np.where(known, x, 0.0)
    complete_rows = known.all(axis=1)
    start = x[..., complete_rows, :] if complete_rows.any() else x
    right = solver(start, rank)[1]
    left = _solve_rows(x, known, right)
    size, error = float(np.linalg.norm(x)), _residual(x, known, left, right)
    if solver is sketch and complete_rows.any() and _spans(start, rank):
        return left, right
    for _ in range(sweeps):
        if error <= ROUNDING * size:
            break
        right = _solve_rows(x.swapaxes(-1, -2), known.T, left.swapaxes(-1, -2)).swapaxes(-1, -2)
        left = _solve_rows(x, known, right)
        before, error = error, _residual(x, known, left, right)
        if before - error <= STALL * before:
            break
    return left, right


def _spans(x: Array, rank: int) -> bool:
    """Return whether the rows of every matrix clearly span ``rank`` dimensions."""
    if x.shape[-2] < rank:
        return False
    values = np.linalg.svd(x @ x.swapaxes(-1, -2), compute_uv=False)  # squares of those of x
    return bool(np.all(values[..., rank - 1] > CLEAR**2 * values[..., 0]))


def _solve_rows(x: Array, known: Array, right: Array) -> Array:
    """Return ``left`` minimising ``||known * (x - left @ right)||``, row by row."""
    first, which = _row_patterns(known)
    left = np.zeros((*x.shape[:-1], right.shape[-2]))
    for i, columns in enumerate(known[first]):
        rows = which == i
        inverse = np.linalg.pinv(right[..., :, columns])
        left[..., rows, :] = x[..., rows, :][..., columns] @ inverse
    return left


def _row_patterns(known: Array) -> tuple[Array, Array]:
    """Return the first row of every distinct pattern and, for each row, which it follows."""
    weights: Array = np.random.default_rng(0).integers(1 << 20, size=len(known[0]))
    codes: Array = known.astype(np.float64) @ weights  # integers: equal rows agree exactly
    return np.unique(codes, return_index=True, return_inverse=True)[1:]


def _residual(x: Array, known: Array, left: Array, right: Array) -> float:
    return float(np.linalg.norm(np.where(known, x - left @ right, 0.0)))


def fit(template: Op, w: Array, *, sweeps: int = 20) -> Fit:
    """Return the operator shaped like ``template`` nearest to ``w`` in Frobenius norm.

    Alternating least squares: the expression is linear in each leaf.  The error falls with
    every sweep but may stop at a local optimum: start from a good template, read ``Fit.error``.
    """
    target = as_weight(w)
    if (template.n_in, template.n_out) != target.shape:
        raise ValueError(
            f"fit: the template is {template.n_in}x{template.n_out} but the weight is "
            f"{target.shape[0]}x{target.shape[1]}; want one shape, is w transposed?"
        )
    if sum(1 for _ in template.arrays()) != sum(1 for _ in template.leaf_arrays()):
        raise ValueError("fit: the template uses one array twice; it is not linear in that leaf")
    op, error = cast(template, np.float64), np.inf
    for _ in range(sweeps):
        op = _improve(op, None, None, target)
        before, error = error, relative_error(op.to_dense(), target)
        if error < 1e-13 or before - error <= STALL * error:
            break
    error = relative_error(op.to_dense(), target)
    return Fit(as_stored(op, w), error, "custom")


def _improve(op: Op, left: Array | None, right: Array | None, target: Array) -> Op:
    """Lower ``||target - left @ op @ right||`` one leaf at a time; ``None`` is the identity."""
    match op:
        case Product(factors):
            return _improve_product(factors, left, right, target)
        case Sum(terms):
            return _improve_sum(terms, left, right, target)
        case Dense(w):
            return Dense(_solve_blocks(w[None], False, left, right, target)[0])
        case BlockDiag(w):
            return BlockDiag(_solve_blocks(w, False, left, right, target))
        case Diag(d):
            return Diag(_solve_blocks(d[:, None, None], False, left, right, target).reshape(-1))
        case SharedBlockDiag(w, blocks):
            stack = np.broadcast_to(w, (blocks, *w.shape))
            return SharedBlockDiag(_solve_blocks(stack, True, left, right, target)[0], blocks)
        case _:
            return op


def _improve_product(
    factors: tuple[Op, ...], left: Array | None, right: Array | None, target: Array
) -> Op:
    suffixes = [right]
    for factor in reversed(factors[1:]):
        suffixes.append(_before(factor, suffixes[-1]))
    done: list[Op] = []
    for factor, suffix in zip(factors, reversed(suffixes), strict=True):
        done.append(_improve(factor, left, suffix, target))
        left = _after(left, done[-1])
    return Product(tuple(done))


def _improve_sum(
    terms: tuple[Op, ...], left: Array | None, right: Array | None, target: Array
) -> Op:
    done = list(terms)
    parts = [_before_matrix(_after(left, term), right) for term in terms]
    for i, term in enumerate(terms):
        others = reduce(np.add, parts[:i] + parts[i + 1 :], np.zeros(target.shape))
        done[i] = _improve(term, left, right, target - others)
        parts[i] = _before_matrix(_after(left, done[i]), right)
    return Sum(tuple(done))


def _after(left: Array | None, op: Op) -> Array:
    return op.to_dense() if left is None else op.apply(left)


def _before(op: Op, right: Array | None) -> Array:
    return op.to_dense() if right is None else transpose(op).apply(right.T).T


def _before_matrix(matrix: Array, right: Array | None) -> Array:
    return matrix if right is None else matrix @ right


def _solve_blocks(
    start: Array, shared: bool, left: Array | None, right: Array | None, target: Array
) -> Array:
    """Return the blocks ``w`` (g, p, q) minimising ``||target - left @ blockdiag(w) @ right||``.

    Conjugate gradients on the normal equations ``blocks(L^T L D(w) R R^T) = blocks(L^T T R^T)``,
    preconditioned by each block's own equations: exact in one step for a single block, or
    where ``left`` or ``right`` is the identity.
    """
    g, p, q = start.shape
    gram_left = np.eye(g * p) if left is None else left.T @ left
    gram_right = np.eye(g * q) if right is None else right @ right.T
    moment = target if left is None else left.T @ target
    moment = moment if right is None else moment @ right.T

    def pool(blocks: Array) -> Array:
        return np.broadcast_to(blocks.sum(0), blocks.shape) if shared else blocks

    def normal(w: Array) -> Array:
        spread = w @ gram_right.reshape(g, q, g * q)  # rows of D(w) @ gram_right
        columns = spread.reshape(g * p, g, q).swapaxes(0, 1)
        return pool(gram_left.reshape(g, p, g * p) @ columns)

    rows = np.linalg.pinv(pool(_diagonal_blocks(gram_left, g)), hermitian=True)
    columns = np.linalg.pinv(pool(_diagonal_blocks(gram_right, g)), hermitian=True)
    return _conjugate_gradients(
        normal, pool(_diagonal_blocks(moment, g)), start, lambda r: rows @ r @ columns
    )


def _conjugate_gradients(
    normal: Callable[[Array], Array],
    moment: Array,
    start: Array,
    precondition: Callable[[Array], Array],
) -> Array:
    x, residual = start, moment - normal(start)
    direction = step = precondition(residual)
    energy = float(np.vdot(residual, step))
    limit = 1e-28 * max(float(np.vdot(moment, precondition(moment))), np.finfo(float).tiny)
    for _ in range(CG_STEPS):
        if energy <= limit:
            break
        image = normal(direction)
        curvature = float(np.vdot(direction, image))
        if curvature <= 0:
            break
        x = x + (energy / curvature) * direction
        residual = residual - (energy / curvature) * image
        step = precondition(residual)
        previous, energy = energy, float(np.vdot(residual, step))
        direction = step + (energy / previous) * direction
    return x


def _diagonal_blocks(matrix: Array, g: int) -> Array:
    p, q = matrix.shape[0] // g, matrix.shape[1] // g
    return matrix.reshape(g, p, g, q)[np.arange(g), :, np.arange(g), :]
