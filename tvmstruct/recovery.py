"""Find structure that is exactly in a weight: small random minors reject, a full fit accepts.

A minor of a member has the rank that the form allows, so a few hundred gathered entries
refuse almost every weight in milliseconds.  What survives is fitted and checked in full:
``||W - What|| <= max(1e-6, 2u) ||W||`` with u the unit roundoff of the stored dtype.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np

from tvmstruct.families import FAMILIES
from tvmstruct.fit import Fit, sketch
from tvmstruct.ops import Array

UNIT_ROUNDOFF = {"float64": 2**-53, "float32": 2**-24, "float16": 2**-11, "bfloat16": 2**-8}
UNIT_ROUNDOFF |= {"int8": 2**-8, "uint8": 2**-8, "int16": 2**-16, "uint16": 2**-16}
LINE_ERROR = 1e-3  # relative error of a single row or column that still counts as rounding
REPLACEABLE = ("float64", "float32")  # rounding to fewer bits hides what was exact
PADDED_SIZES = (8, 16, 24, 32, 48, 64, 96, 128)
LEAST_SIDE = 16
WORTH_IT = 0.8  # of the dense multiply-adds
KRONECKER_TERMS = 4
ATTEMPTS = 3  # full fits per form
REPORTED_BLOCK = 8  # smaller VVMA blocks come near anything
BLOCKS, TESTED_ROWS = 16, 4  # the VVMA test
TRIED = (
    "low rank, VVMA, sums of up to 4 Kroneckers, block diagonal, LGP-shuffle and Monarch "
    "under 0.8 of the dense multiply-adds"
)


@dataclass(frozen=True)
class Candidate:
    """A form that passed the sampled test, cheapest first: ``macs``, then table order."""

    macs: int
    order: int
    family: str
    parameters: Mapping[str, Any] = field(default_factory=dict[str, Any])

    def __str__(self) -> str:
        details = ", ".join(f"{name}={value}" for name, value in self.parameters.items())
        return f"{FAMILIES[self.family].title} {details}"


@dataclass(frozen=True)
class Recovery:
    """What ``recover`` found: the fit to replace the weight by, or ``None`` and ``why`` not.

    ``alternatives`` passed the sampled test too, but cost more or cannot replace the weight.
    """

    fit: Fit | None
    why: str
    alternatives: tuple[Candidate, ...] = ()


@dataclass
class _Sample:
    """A weight with what the sampled tests need; ``nearest`` is the best miss so far."""

    w: Array  # (n_in, n_out), float64, root mean square 1
    tolerance: float
    rows: Array
    columns: Array  # entries (rows[t], columns[t]) are not zero
    rng: np.random.Generator
    nearest: tuple[float, str] = (math.inf, "")

    @property
    def limit(self) -> float:
        """Multiply-adds that a form must stay under to be worth it."""
        return WORTH_IT * self.w.size

    def negligible(self, minor: Array) -> Array:
        """Return the size under which a minor's singular value is rounding, (...,)."""
        size = math.sqrt(minor.shape[-1] * minor.shape[-2])
        return 10 * self.tolerance * (np.linalg.norm(minor, axis=(-2, -1)) + size)

    def ranks(self, minors: Array) -> Array:
        """Return the numerical rank of every minor."""
        values = np.linalg.svd(minors, compute_uv=False)
        return np.count_nonzero(values > self.negligible(minors)[..., None], axis=-1)


def recover(w: Array, *, stored_dtype: str = "float32") -> Recovery:
    """Return the cheapest form that ``w`` (n_in, n_out) exactly has, or why there is none.

    Fewest multiply-adds wins, ties go by the order of ``FAMILIES``.  Weights stored in 16
    or 8 bits are never replaced; what they look like is reported.
    """
    if stored_dtype not in UNIT_ROUNDOFF:
        raise ValueError(
            f"recover: stored_dtype={stored_dtype!r}; want one of {', '.join(UNIT_ROUNDOFF)}"
        )
    sample = _draw(np.asarray(w), max(1e-6, 2 * UNIT_ROUNDOFF[stored_dtype]))
    if isinstance(sample, str):
        return Recovery(None, sample)
    candidates = _screen(sample)
    chosen, found = _verify(candidates, np.asarray(w), sample.tolerance)
    if chosen is None or found is None:
        return Recovery(None, _explain_miss(sample, candidates))
    if stored_dtype not in REPLACEABLE:
        why = (
            f"looks like {chosen} to {found.error:.1e}, within the rounding of {stored_dtype}; "
            "not replaced, name it in a plan to accept it"
        )
        return Recovery(None, why, _per_family(candidates))
    saved = sample.w.size / max(chosen.macs, 1)
    why = f"{chosen}: error {found.error:.1e}, {saved:.1f}x fewer multiply-adds"
    rest = tuple(c for c in _per_family(candidates) if c.family != chosen.family)
    return Recovery(found, why, rest)


def _draw(w: Array, tolerance: float) -> _Sample | str:
    """Return the sample that the tests look at, or why the weight cannot be tested."""
    if w.ndim != 2:
        return f"weight has rank {w.ndim}, want 2"
    if min(w.shape) < LEAST_SIDE:
        return f"weight is {w.shape[0]}x{w.shape[1]}; a side under {LEAST_SIDE} saves nothing"
    scaled = w.astype(np.float64)
    peak = max(float(scaled.max()), -float(scaled.min()))  # NaN goes through max and min
    if not math.isfinite(peak):
        return "weight has NaN or infinite entries"
    if peak == 0:
        return "weight is all zeros"
    scaled *= 1 / peak
    scaled *= math.sqrt(scaled.size) / float(np.linalg.norm(scaled))
    rng = np.random.default_rng(0)
    rows, columns = _nonzero_entries(scaled, tolerance, rng)
    return _Sample(scaled, tolerance, rows, columns, rng)


def _nonzero_entries(w: Array, tolerance: float, rng: np.random.Generator) -> tuple[Array, Array]:
    """Return 64 random entries of ``w`` that rounding cannot explain."""
    rows, columns = (rng.integers(side, size=4096) for side in w.shape)
    usable = np.abs(w[rows, columns]) > 10 * tolerance
    if np.count_nonzero(usable) < 64:
        rows, columns = np.nonzero(np.abs(w) >= min(10 * tolerance, float(np.abs(w).max())))
        order = rng.permutation(rows.size)
        rows, columns, usable = rows[order], columns[order], np.ones(rows.size, bool)
    return rows[usable][:64], columns[usable][:64]


def _screen(sample: _Sample) -> list[Candidate]:
    """Return what passes the sampled tests and is worth it, cheapest first."""
    order = {name: i for i, name in enumerate(FAMILIES)}
    found: list[Candidate] = []
    for screen in (_low_rank, _vvma, _kronecker, _blocks, _monarch):
        for family, parameters in screen(sample):
            macs = FAMILIES[family].macs(*sample.w.shape, **parameters)
            if macs < sample.limit:
                found.append(Candidate(macs, order[family], family, parameters))
    return sorted(found, key=lambda c: (c.macs, c.order))


Forms = Iterator[tuple[str, dict[str, Any]]]


def _low_rank(sample: _Sample) -> Forms:
    rank = _rank_below(sample.w, sample)
    if rank is not None:
        yield "low_rank", {"r": rank}


def _rank_below(x: Array, sample: _Sample) -> int | None:
    """Return the rank of ``x`` if a factorisation would save work, judged by one minor.

    A Cholesky factorisation of the Gram matrix, shifted by what rounding can do, proves full
    rank in a third of the time of the eigenvalues that tell the rank.
    """
    most = math.ceil(WORTH_IT * x.size / sum(x.shape)) - 1
    if most < 1:
        return None
    x = x if x.shape[0] <= x.shape[1] else x.T
    active = [np.flatnonzero(x.any(axis=axis)) for axis in (1, 0)]
    rows = min(active[0].size, most + 8)
    columns = min(active[1].size, rows + rows // 4 + 8)
    minor = x[np.ix_(_some(active[0], rows, sample), _some(active[1], columns, sample))]
    gram = minor @ minor.T
    power = float(np.trace(gram))
    if _is_positive(gram - (10 * sample.tolerance) ** 2 * power * np.eye(rows)):
        return rows if rows <= most else None
    tail = np.cumsum(np.maximum(np.linalg.eigvalsh(gram), 0.0))[::-1]
    rank = int(np.count_nonzero(tail > (sample.tolerance / 2) ** 2 * power))
    return rank if rank <= most else None


def _some(indices: Array, count: int, sample: _Sample) -> Array:
    return np.sort(sample.rng.choice(indices, count, replace=False))


def _is_positive(matrix: Array) -> bool:
    try:
        np.linalg.cholesky(matrix)
    except np.linalg.LinAlgError:
        return False
    return True


def _vvma(sample: _Sample) -> Forms:
    n_in, n_out = sample.w.shape
    sizes = {k for k in _divisors(math.gcd(n_in, n_out)) if k >= 2} | set(PADDED_SIZES)
    for k in sorted(size for size in sizes if size <= max(n_in, n_out)):
        for transposed in (False, True):
            miss = _rank_one_miss(sample, k, transposed)
            if k >= REPORTED_BLOCK:
                sample.nearest = min(sample.nearest, (miss, f"VVMA k={k}"))
            if miss <= 10 * sample.tolerance:
                yield "vvma", {"k": k, "transposed": transposed}


def _rank_one_miss(sample: _Sample, k: int, transposed: bool) -> float:
    """Return how far some rows of 16 x 16 complete blocks are from multiples of one vector.

    The blocks are those of non-zero entries, and those between them.
    """
    w, rows, columns = sample.w, sample.rows, sample.columns
    if transposed:
        w, rows, columns = w.T, columns, rows
    inside = (rows < w.shape[0] // k * k) & (columns < w.shape[1] // k * k)
    rows, columns = rows[inside], columns[inside]
    blocks_in, blocks_out = (np.unique(index[:BLOCKS] // k) for index in (rows, columns))
    if blocks_in.size * blocks_out.size < 2:
        return math.inf
    within = (blocks_out[:, None] * k + np.arange(k)).reshape(-1)
    tested = np.unique(rows[:BLOCKS] % k)[:TESTED_ROWS]
    index = (tested[:, None] + blocks_in * k)[:, :, None]  # (tested, blocks in, 1)
    stack = w[index, within].reshape(tested.size, -1, k)
    norms = np.einsum("aij,aij->ai", stack, stack)
    best = norms.argmax(axis=1)[:, None, None]
    vector = np.take_along_axis(stack, best, axis=1)  # (tested, 1, k)
    power = np.maximum(norms.max(axis=1), np.finfo(float).tiny)[:, None, None]
    residual = stack - (stack @ vector.swapaxes(1, 2)) / power * vector
    misses = np.linalg.norm(residual, axis=(1, 2)) / np.sqrt(np.maximum(norms.sum(1), 1e-300))
    return float(misses.max())


def _kronecker(sample: _Sample) -> Forms:
    pairs = _kronecker_shapes(sample)
    for anchors in (KRONECKER_TERMS + 2, 6 * KRONECKER_TERMS):
        ranks = sample.ranks(_kronecker_minors(sample, pairs, anchors))
        keep = ranks <= KRONECKER_TERMS
        pairs, ranks = pairs[keep], ranks[keep]
        if not len(pairs):
            return
    n_in, n_out = sample.w.shape
    for (n2, m2), rank in zip(pairs.tolist(), ranks.tolist(), strict=True):
        parameters = {"r": rank, "a": (-(-n_in // n2), -(-n_out // m2)), "b": (n2, m2)}
        yield "kronecker", parameters


def _kronecker_shapes(sample: _Sample) -> Array:
    """Return the shapes ``(n2, m2)`` of inner factors for which one term is worth it."""
    sides: list[list[int]] = []
    for side in sample.w.shape:
        root = math.isqrt(side - 1) + 1
        sides.append(sorted({*_divisors(side), *PADDED_SIZES, root} & set(range(1, side + 1))))
    cost = partial(FAMILIES["kronecker"].macs, *sample.w.shape, r=1)
    shapes = [(n2, m2) for n2 in sides[0] for m2 in sides[1]]
    worth = [shape for shape in shapes if cost(b=shape) < sample.limit]
    return np.array(worth).reshape(-1, 2)


def _kronecker_minors(sample: _Sample, pairs: Array, count: int) -> Array:
    """Return ``count`` x ``count`` minors of ``w`` rearranged for every inner shape."""
    entries: list[Array] = []
    for side, anchors, inner in zip(
        sample.w.shape, (sample.rows, sample.columns), pairs.T, strict=True
    ):
        outer_index = np.minimum(anchors[:count] // inner[:, None], (side // inner - 1)[:, None])
        inner_index = anchors[:count] % inner[:, None]
        scaled = (outer_index * inner[:, None])[:, :, None]
        entries.append(scaled + inner_index[:, None, :])
    return sample.w[entries[0], entries[1]]


def _blocks(sample: _Sample) -> Forms:
    n_in, n_out = sample.w.shape
    g = np.arange(2, min(n_in, n_out) + 1)[:, None]
    group = sample.rows // -(-n_in // g)
    diagonal = np.all(group == sample.columns // -(-n_out // g), axis=1)
    shuffled = np.all(group == sample.columns % g, axis=1)
    for family, passed in (("block_diagonal", diagonal), ("lgp_shuffle", shuffled)):
        for groups in g[passed, 0].tolist():
            yield family, {"g": groups}


def _monarch(sample: _Sample) -> Forms:
    n_in, n_out = sample.w.shape
    for b in _divisors(math.gcd(n_in, n_out))[1:]:
        p = n_in // b
        ranks: list[int] = []
        for row, column in zip(sample.rows[:2].tolist(), sample.columns[:2].tolist(), strict=True):
            start = row // p * p
            rank = _rank_below(sample.w[start : start + p, column % b :: b], sample)
            if rank is None:
                break
            ranks.append(rank)
        else:
            yield "monarch", {"b": b, "r": max(ranks)}


def _verify(
    candidates: list[Candidate], w: Array, tolerance: float
) -> tuple[Candidate | None, Fit | None]:
    """Return the first candidate whose full fit is within the tolerance."""
    attempts = dict.fromkeys(FAMILIES, 0)
    for candidate in candidates:
        attempts[candidate.family] += 1
        if attempts[candidate.family] > ATTEMPTS:
            continue
        direct = candidate.family in ("block_diagonal", "lgp_shuffle")
        options = {} if direct else {"solver": sketch}
        found = FAMILIES[candidate.family].nearest(w, **candidate.parameters, **options)
        if found.error <= tolerance and _holds_everywhere(found, w, tolerance):
            return candidate, found
    return None, None


def _holds_everywhere(found: Fit, w: Array, tolerance: float) -> bool:
    """Return whether no row and no column is lost beside much larger ones.

    The Frobenius norm of a weight with one huge entry hides all its others.
    """
    wide = w.astype(np.float64)
    limit = max(LINE_ERROR, 10 * tolerance)
    norms = [np.linalg.norm(wide, axis=a) for a in (0, 1)]
    share = found.error * float(np.linalg.norm(norms[0]))  # the most that one line can be off
    if all(bool(np.all(limit * n >= share)) for n in norms):
        return True
    residual = wide - found.op.to_dense()
    return all(
        bool(np.all(np.linalg.norm(residual, axis=a) <= limit * n)) for a, n in enumerate(norms)
    )


def _per_family(candidates: list[Candidate]) -> tuple[Candidate, ...]:
    cheapest = {c.family: c for c in reversed(candidates)}
    return tuple(sorted(cheapest.values(), key=lambda c: (c.macs, c.order)))


def _explain_miss(sample: _Sample, candidates: list[Candidate]) -> str:
    miss, name = sample.nearest
    near = f" (nearest: {name}, sampled error {miss:.2g})" if math.isfinite(miss) else ""
    if candidates:
        near += f" ({candidates[0]} passed the sampled test but not the full one)"
    return f"no exact structure found{near}: tried {TRIED}"


def _divisors(n: int) -> list[int]:
    small = [d for d in range(1, math.isqrt(n) + 1) if n % d == 0]
    return sorted({*small, *(n // d for d in small)})
