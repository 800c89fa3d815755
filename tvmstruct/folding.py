"""Put constants of an expression into the weights beside them: fewer passes over the features.

``fold(op)`` is equal to ``op`` but for rounding (products in float64). A Hadamard transform next
to a block diagonal is ``H_n = H_{n/t} (x) H_t`` with t dividing the blocks: the part within the
blocks goes into their weights, so that 512 features in blocks of 64 are left with three levels
of butterflies between whole blocks out of nine. Constant factors go into any weight of the same
product, and features repeated by a sum of paddings become one small product.
"""

from __future__ import annotations

import math

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
    Sum,
    WalshHadamard,
    add,
    product,
)

Weighted = Dense | BlockDiag | SharedBlockDiag


def fold(op: Op) -> Op:
    """Return an operator equal to ``op`` up to rounding with constants folded into weights."""
    match op:
        case Sum(terms):
            return _repeated(terms) or add(*map(fold, terms))
        case Product(factors):
            folded = product(*map(fold, factors))
            return _fold_factors(list(folded.factors)) if isinstance(folded, Product) else folded
        case _:
            return op


def hadamard(n: int) -> Array:
    """Return Sylvester's matrix of order ``n``, a power of two."""
    return WalshHadamard(n).apply(np.eye(n))


def _fold_factors(factors: list[Op]) -> Op:
    for i in range(len(factors)):
        factors = _fold_transform(factors, i)
    return product(*_fold_scales(factors))


def _fold_transform(factors: list[Op], i: int) -> list[Op]:
    """Fold as much of the transform at ``i`` as the larger of its neighbours takes."""
    node = factors[i]
    if not isinstance(node, WalshHadamard) or node.inner > 1 or node.n == 1:
        return factors
    before = factors[i - 1] if i > 0 else None
    after = factors[i + 1] if i + 1 < len(factors) else None
    left, right = _side(before, -1), _side(after, -2)
    t, at = max((math.gcd(node.n, right), i + 1), (math.gcd(node.n, left), i - 1))
    if t == 1:
        return factors
    rest = WalshHadamard(node.n // t, node.scale, node.blocks, inner=t)
    neighbour = factors[at]
    assert isinstance(neighbour, Weighted)
    out = list(factors)
    out[i], out[at] = rest, _with_transform(neighbour, t, outputs=at < i)
    return out


def _side(op: Op | None, axis: int) -> int:
    """Return how many inputs (-2) or outputs (-1) a block of weights has; 1 without weights."""
    return op.w.shape[axis] if isinstance(op, Weighted) else 1


def _with_transform(op: Weighted, t: int, *, outputs: bool) -> Weighted:
    """Return ``op`` with ``I (x) H_t`` applied to the outputs or the inputs of every block."""
    w = op.w.astype(np.float64)
    side = w.shape[-1] if outputs else w.shape[-2]
    within = WalshHadamard(t, blocks=side // t)
    folded = within.apply(w) if outputs else within.apply(w.swapaxes(-1, -2)).swapaxes(-1, -2)
    if isinstance(op, SharedBlockDiag):
        return SharedBlockDiag(folded, op.blocks)
    return type(op)(folded)


def _fold_scales(factors: list[Op]) -> list[Op]:
    """Move the constants of a product into the first factor that has weights."""
    scale = math.prod(f.scale for f in factors if isinstance(f, WalshHadamard))
    plain = [
        WalshHadamard(f.n, 1.0, f.blocks, f.inner) if isinstance(f, WalshHadamard) else f
        for f in factors
    ]
    kept = [f for f in plain if not (isinstance(f, WalshHadamard) and f.n == 1)]
    at = next((i for i, f in enumerate(kept) if isinstance(f, Weighted | Diag)), None)
    if at is None:
        return factors
    if scale != 1:
        kept[at] = _scaled(kept[at], scale)
    return kept


def _scaled(op: Op, scale: float) -> Op:
    match op:
        case Dense(w) | BlockDiag(w):
            return type(op)(w.astype(np.float64) * scale)
        case SharedBlockDiag(w, blocks):
            return SharedBlockDiag(w.astype(np.float64) * scale, blocks)
        case Diag(d):
            return Diag(d.astype(np.float64) * scale)
        case _:
            raise AssertionError(op)


def _repeated(terms: tuple[Op, ...]) -> Op | None:
    """Return all features once more for each term as one product, if that is what a sum does."""
    size, count = terms[0].n_in, len(terms)
    for i, term in enumerate(terms):
        if not isinstance(term, Pad) or (term.width, term.start) != (count * size, i * size):
            return None
    return product(SharedBlockDiag(np.ones((1, count)), size), Permute((size, count), (1, 0)))
