"""Shorten an expression of the algebra: the same map with fewer and larger nodes.

``simplify(op)`` drops identities, pulls what all terms of a sum share out of it, runs chains that
write side by side as one chain, and finds the Walsh-Hadamard transforms among factors without
parameters, however they were spelled: butterflies of slices, sums and pads, or small Sylvester
matrices. A factor is one only if it equals the transform on a vector of random numbers, which no
other linear map does but with probability zero.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import cache

import numpy as np

from tvmstruct.ops import (
    Array,
    BlockDiag,
    Dense,
    Diag,
    Op,
    Pad,
    Permute,
    Product,
    SharedBlockDiag,
    Slice,
    Sum,
    WalshHadamard,
    add,
    product,
    scaling,
)

Factors = tuple[Op, ...]
LONGEST_RUN = 24  # factors without parameters of which every part is tried; else the whole only
TOLERANCE = 1e-9  # relative, of float64 sums of random numbers


def simplify(op: Op) -> Op:
    """Return a shorter expression of the same map; arrays are shared, or stacked copies."""
    return chain(op.n_in, _factors(op))


def chain(n: int, factors: Sequence[Op]) -> Op:
    """Return the product of factors; none at all is the identity on ``n`` features."""
    return product(*factors) if factors else scaling(n, 1.0)


def split_prefix(terms: Sequence[Factors]) -> tuple[Factors, list[Factors]]:
    """Return the factors that all terms begin with, and what is left of each term."""
    count = 0
    for column in zip(*terms, strict=False):
        if not all(same(column[0], f) for f in column[1:]):
            break
        count += 1
    return terms[0][:count], [t[count:] for t in terms]


def same(a: Op, b: Op) -> bool:
    """Return whether two factors are one object, or equal and without parameters."""
    if a is b:
        return True
    plain = isinstance(a, Permute | Pad | Slice | WalshHadamard)
    return plain and type(a) is type(b) and vars(a) == vars(b)


def _factors(op: Op) -> Factors:
    """Return the factors of the simplified expression; an identity has none."""
    if isinstance(op, Product):
        return _shorten(f for factor in op.factors for f in _factors(factor))
    if isinstance(op, Sum):
        return _sum(op.n_in, [_factors(t) for t in op.terms])
    if isinstance(op, BlockDiag) and op.w.shape[0] == 1:
        op = Dense(op.w[0])
    if isinstance(op, SharedBlockDiag) and op.blocks == 1:
        op = Dense(op.w)
    if isinstance(op, Dense | SharedBlockDiag) and (scale := _sylvester(op.w)) is not None:
        n = op.w.shape[0]
        op = WalshHadamard(n, scale, op.n_in // n)
    return () if _is_identity(op) else (op,)


def _is_identity(op: Op) -> bool:
    match op:
        case Permute(dims, axes):
            moved = [a for a in axes if dims[a] != 1]
            return moved == sorted(moved)
        case WalshHadamard(n, scale):
            return n == 1 and scale == 1
        case Pad() | Slice():
            return op.n_in == op.n_out
        case _:
            return False


def _sylvester(w: Array) -> float | None:
    """Return s where a matrix is ``s`` times Sylvester's of at least 2, else None."""
    n, scale = w.shape[0], float(w[0, 0])
    if w.shape != (n, n) or n < 2 or n & (n - 1) or not scale or not (w[0] == w[0, 0]).all():
        return None
    h = WalshHadamard(n).apply(np.eye(n, dtype=w.dtype))
    return scale if np.array_equal(w, h * w[0, 0]) else None


def _shorten(factors: Iterator[Op]) -> Factors:
    """Gather constant factors into one, join transposes, and find transforms."""
    scale, kept = 1.0, []
    for f in factors:
        if isinstance(f, WalshHadamard):
            scale, f = scale * f.scale, replace(f, scale=1.0)
        if _is_identity(f):
            continue
        before = kept[-1] if kept else None
        if isinstance(before, Permute) and isinstance(f, Permute) and _undoes(before, f):
            kept.pop()
        else:
            kept.append(f)
    kept, found = _find_transforms(kept)
    return _place(scale * found, kept)


def _undoes(a: Permute, b: Permute) -> bool:
    order = np.arange(a.n_in)
    return bool((b.apply(a.apply(order)) == order).all())


def _place(scale: float, factors: list[Op]) -> Factors:
    """Put one constant factor into the last transform, else where there are fewest features."""
    if scale == 1 or not factors:
        return tuple(factors)
    for i in reversed(range(len(factors))):
        if isinstance(f := factors[i], WalshHadamard):
            return (*factors[:i], replace(f, scale=scale), *factors[i + 1 :])
    first, last = factors[0].n_in, factors[-1].n_out
    if first < last:
        return (scaling(first, scale), *factors)
    return (*factors, scaling(last, scale))


def _find_transforms(factors: list[Op]) -> tuple[list[Op], float]:
    """Replace what equals a Walsh-Hadamard transform in each run of factors without parameters."""
    out: list[Op] = []
    run: list[Op] = []
    total = 1.0
    for f in [*factors, None]:
        if f is not None and next(f.leaf_arrays(), None) is None:
            run.append(f)
            continue
        found, scale = _transforms(run)
        out, run, total = [*out, *found], [], total * scale
        out += [] if f is None else [f]
    return out, total


def _transforms(run: list[Op]) -> tuple[list[Op], float]:
    starts = range(len(run)) if len(run) <= LONGEST_RUN else range(1)
    for start in starts:
        stops = range(len(run), start, -1) if len(run) <= LONGEST_RUN else [len(run)]
        for stop in stops:
            part = run[start:stop]
            if len(part) == 1 and isinstance(part[0], WalshHadamard):
                continue
            if (found := _transform(part)) is None:
                continue
            rest, scale = _transforms(run[stop:])
            return [*run[:start], *found[0], *rest], found[1] * scale
    return run, 1.0


def _transform(part: list[Op]) -> tuple[list[Op], float] | None:
    """Return the transform that some factors are, and the number it is multiplied by."""
    n = part[0].n_in
    if part[-1].n_out != n or not any(isinstance(f, Sum | WalshHadamard) for f in part):
        return None
    y = product(*part).apply(_probe(n))
    for a, b, c in _grids(n):
        want = _transformed(n, b, c)
        scale = float(y @ want / (want @ want))
        if scale and np.abs(y - scale * want).max() <= TOLERANCE * np.abs(y).max():
            return [WalshHadamard(b, blocks=a, inner=c)], _exact(scale)
    return None


def _exact(scale: float) -> float:
    """Return the number with few digits that a sum of random numbers came near, if there is one."""
    near = float(np.float32(scale))
    return near if math.isclose(near, scale, rel_tol=1e-12) else scale


def _grids(n: int) -> Iterator[tuple[int, int, int]]:
    """Yield (a, b, c) with a b c = n and b a power of two, from large b and small c on."""
    b = n & -n
    while b > 1:
        c = 1
        while n % (b * c) == 0:
            yield n // (b * c), b, c
            c *= 2
        b //= 2


@cache
def _probe(n: int) -> Array:
    return np.random.default_rng(n).standard_normal(n)


@cache
def _transformed(n: int, b: int, c: int) -> Array:
    """Return the probe transformed by ``I (x) H_b (x) I_c``."""
    return WalshHadamard(b, blocks=n // (b * c), inner=c).apply(_probe(n))


def _sum(n: int, terms: list[Factors]) -> Factors:
    """Return the factors of a sum of chains on ``n`` features."""
    before, terms = split_prefix(terms)
    width = before[-1].n_out if before else n
    after, reverse = split_prefix([t[::-1] for t in terms])
    terms = [t[::-1] for t in reverse]
    if (joined := _side_by_side(terms)) is not None:
        return (*before, *joined, *after[::-1])
    ops = [chain(width, t) for t in terms]
    return (*before, add(*ops), *after[::-1])


def _side_by_side(terms: list[Factors]) -> Factors | None:
    """Run chains that fill parts of the output one after the other as a single chain."""
    if len(terms) < 2 or not all(len(t) > 1 and isinstance(t[-1], Pad) for t in terms):
        return None
    pads = [(t[-1], t[:-1]) for t in terms]
    pads.sort(key=lambda pair: pair[0].start)  # type: ignore[attr-defined]
    size, width = pads[0][0].n_in, pads[0][0].n_out
    starts = [pad.start for pad, _ in pads]  # type: ignore[attr-defined]
    if starts != [i * size for i in range(len(pads))] or size * len(pads) != width:
        return None
    columns = list(zip(*(t for _, t in pads), strict=False))
    if len({len(t) for _, t in pads}) > 1:
        return None
    cut = _cuts_in_order(columns[0])
    out: list[Op] = []
    for i, column in enumerate(columns[1:] if cut else columns):
        made = _fan_out(column) if i == 0 and not cut else _stack(column)
        if made is None:
            return None
        out += made
    return tuple(out)


def _cuts_in_order(column: Sequence[Op]) -> bool:
    """Return whether operators take the features apart, one part after the other."""
    size = column[0].n_out
    return all(
        isinstance(f, Slice) and (f.width, f.start, f.n_out) == (size * len(column), i * size, size)
        for i, f in enumerate(column)
    )


def _fan_out(column: Sequence[Op]) -> Factors | None:
    """Return the factors that apply several operators to one input, their results in order."""
    r = len(column)
    match column[0]:
        case Dense(w) if _alike(column):
            return (Dense(np.concatenate([f.w for f in column], axis=1)),)  # type: ignore
        case BlockDiag(w) if _alike(column):
            g, _, q = w.shape
            wide = np.concatenate([f.w for f in column], axis=2)  # type: ignore[attr-defined]
            return BlockDiag(wide), Permute((g, r, q), (1, 0, 2))
        case SharedBlockDiag(w, blocks) if _alike(column):
            wide = np.concatenate([f.w for f in column], axis=1)  # type: ignore[attr-defined]
            return SharedBlockDiag(wide, blocks), Permute((blocks, r, w.shape[1]), (1, 0, 2))
        case _:
            return None


def _stack(column: Sequence[Op]) -> Factors | None:
    """Return the factor that applies each operator to its own part of the input."""
    first, r = column[0], len(column)
    if all(same(first, f) for f in column[1:]):
        match first:
            case WalshHadamard():
                return (replace(first, blocks=first.blocks * r),)
            case Permute(dims, axes):
                return (Permute((r, *dims), (0, *(a + 1 for a in axes))),)
            case SharedBlockDiag(w, blocks):
                return (SharedBlockDiag(w, blocks * r),)
            case Dense(w):
                return (SharedBlockDiag(w, r),)
    if not _alike(column):
        return None
    match first:
        case Dense():
            return (BlockDiag(np.stack([f.w for f in column])),)  # type: ignore[attr-defined]
        case BlockDiag():
            return (BlockDiag(np.concatenate([f.w for f in column])),)  # type: ignore
        case Diag():
            return (Diag(np.concatenate([f.d for f in column])),)  # type: ignore
        case _:
            return None


def _alike(column: Sequence[Op]) -> bool:
    """Return whether all are one type of node with arrays of one shape."""
    first = column[0]
    shapes = [a.shape for a in first.leaf_arrays()]
    return all(
        type(f) is type(first)
        and [a.shape for a in f.leaf_arrays()] == shapes
        and getattr(f, "blocks", 1) == getattr(first, "blocks", 1)
        for f in column
    )
