"""Canonical polyadic decomposition: a tensor as a sum of ``r`` outer products of vectors.

The factors of a tensor whose terms are linearly independent in two axes come from an
eigenvalue problem (Leurgans, Ross and Abel, 1993); alternating least squares polishes them,
and goes on alone where there is no such member.
"""

from __future__ import annotations

from functools import reduce

import numpy as np

from tvmstruct.fit import ROUNDING
from tvmstruct.ops import Array

GAIN = 1e-6  # of a sweep, relative, under which it has converged

Vectors = list[Array]  # one (r, d_j) per axis: term k is the outer product of row k of each


def compose(vectors: Vectors) -> Array:
    """Return the tensor ``sum_k outer(vectors[0][k], vectors[1][k], ...)``."""
    sides = tuple(v.shape[1] for v in vectors)
    half = len(vectors) // 2
    return (_rows(vectors[:half]).T @ _rows(vectors[half:])).reshape(sides)


def decompose(x: Array, known: Array, r: int, sweeps: int) -> Vectors:
    """Return ``r`` terms near ``x`` where ``known`` (of the same shape) is true.

    Entries outside ``known`` are free.  Starts from the indices of the first axis that are
    known throughout, which settles exact members at once.  A sweep fills the free entries
    from the terms and solves for each axis in turn, so the error never grows.
    """
    size = float(np.linalg.norm(x[known]))
    if size == 0:
        return [np.zeros((r, d)) for d in x.shape]
    x = np.where(known, x / size, 0.0)
    whole = known.reshape(len(x), -1).all(axis=1)
    start = x[whole] if whole.any() else x
    vectors = _polish(start, _by_eigenvectors(start, r), sweeps)
    if start.shape != x.shape:
        vectors = [_solve_first(x, known, vectors), *vectors[1:]]
    if not known.all():
        vectors = _polish_known(x, known, vectors, sweeps)
    return [vectors[0] * size, *vectors[1:]]


def _polish(x: Array, vectors: Vectors, sweeps: int) -> Vectors:
    """Solve for each axis in turn until the error stalls."""
    error = float(np.linalg.norm(x - compose(vectors)))
    for _ in range(sweeps):
        if error <= np.finfo(np.float64).eps:
            break
        found = _sweep(x, vectors)
        before, error = error, float(np.linalg.norm(x - compose(found)))
        if error < before:
            vectors = found
        if before - error <= GAIN * before:
            break
    return vectors


def _polish_known(x: Array, known: Array, vectors: Vectors, sweeps: int) -> Vectors:
    """Do the same with the free entries filled from the terms before each sweep."""
    filled = compose(vectors)
    error = _residual(x, filled, known)
    for _ in range(sweeps):
        if error <= ROUNDING**2:
            break
        np.copyto(filled, x, where=known)
        found = _sweep(filled, vectors)
        filled = compose(found)
        before, error = error, _residual(x, filled, known)
        if error < before:
            vectors = found
        if before - error <= GAIN * before:
            break
    return vectors


def _residual(x: Array, fitted: Array, known: Array) -> float:
    return float(np.linalg.norm((x - fitted) * known))


def _sweep(x: Array, vectors: Vectors) -> Vectors:
    """Solve the normal equations of each axis with the others fixed."""
    vectors = list(vectors)
    for axis in range(x.ndim):
        others = vectors[:axis] + vectors[axis + 1 :]
        gram = reduce(np.multiply, (v @ v.T for v in others))
        solved = np.linalg.pinv(gram, hermitian=True) @ _moment(x, vectors, axis)
        scale = np.linalg.norm(solved, axis=1, keepdims=True)
        last = axis == x.ndim - 1  # terms keep their size in the axis that is solved last
        vectors[axis] = solved if last else solved / np.where(scale > 0, scale, 1.0)
    return vectors


def _moment(x: Array, vectors: Vectors, axis: int) -> Array:
    """Return (r, d_axis): ``x`` contracted with the vectors of every other axis."""
    r, side = vectors[axis].shape
    left, right = _rows(vectors[:axis], r), _rows(vectors[axis + 1 :], r)
    part = (x.reshape(-1, right.shape[1]) @ right.T).reshape(left.shape[1], side, r)
    return np.einsum("kl,ldk->kd", left, part, optimize=True)


def _rows(vectors: Vectors, r: int = 1) -> Array:
    """Return (r, d_1 d_2 ...): row k is the outer product of row k of each, flattened."""
    outer = np.ones((r, 1))
    for v in vectors:
        outer = (outer[:, :, None] * v[:, None, :]).reshape(len(v), -1)
    return outer


def _solve_first(x: Array, known: Array, vectors: Vectors) -> Array:
    """Return the vectors of the first axis that fit the known entries, index by index."""
    design = _rows(vectors[1:])
    flat, seen = x.reshape(len(x), -1), known.reshape(len(x), -1)
    found = np.zeros((len(design), len(x)))
    patterns, which = np.unique(seen, axis=0, return_inverse=True)
    for i, pattern in enumerate(patterns):
        rows = which.reshape(-1) == i
        found[:, rows] = (flat[rows][:, pattern] @ np.linalg.pinv(design[:, pattern])).T
    return found


def _by_eigenvectors(x: Array, r: int) -> Vectors:
    """Return start vectors: exact where the terms are independent in the two largest axes.

    Two random contractions over the other axes are ``A D_1 B`` and ``A D_2 B`` in the leading
    subspaces of both; the eigenvectors of their quotient are A.  With A known, the other axes
    of each term are a tensor of rank one.
    """
    first, second = (int(axis) for axis in np.argsort(x.shape, kind="stable")[::-1][:2])
    rng = np.random.default_rng(0)
    vectors = [rng.standard_normal((r, side)) for side in x.shape]
    front = np.moveaxis(x, (first, second), (0, 1)).reshape(x.shape[first], x.shape[second], -1)
    a, b = _leading(front, r), _leading(front.swapaxes(0, 1), r)
    core = np.einsum("abc,ai,bj->cij", front, a, b, optimize=True)
    mixed = np.tensordot(rng.standard_normal((2, len(core))), core, 1)
    eigenvectors = np.real(np.linalg.eig(mixed[0] @ np.linalg.pinv(mixed[1]))[1])
    found = len(eigenvectors)
    vectors[first][:found] = eigenvectors.T @ a.T
    others = [axis for axis in range(x.ndim) if axis != first]
    rest = np.linalg.pinv(vectors[first].T) @ np.moveaxis(x, first, 0).reshape(len(front), -1)
    for k, term in enumerate(rest[:found].reshape(found, *(x.shape[axis] for axis in others))):
        for i, axis in enumerate(others):
            vectors[axis][k] = _leading(np.moveaxis(term, i, 0), 1)[:, 0]
    return vectors


def _leading(x: Array, r: int) -> Array:
    """Return (d, r): the leading left singular vectors of ``x`` with the first axis of side d."""
    flat = x.reshape(len(x), -1)
    r = min(r, *flat.shape)
    return np.linalg.eigh(flat @ flat.T)[1][:, ::-1][:, :r]
