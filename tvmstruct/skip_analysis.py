"""What zero skipping saves and loses on given queries, keys and values, in numpy.

NLP-Fast, section III-C and Fig. 7: the share of zeros, the work that is left, the error, and how
evenly threads are busy when pairs of head and chunk cost unequal amounts (`skip_schedules`).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np

from tvmstruct.errors import InputError
from tvmstruct.skip_schedules import utilisations
from tvmstruct.skipping import Skip

EXP_OPS = 12  # of one weight: multiply-adds of exp and the sum of weights
BAND = 1 << 21  # scores held at a time
GUARD = np.float32(2.0**-22)  # limits stay so far below the maximum, relative to it


@dataclass(frozen=True)
class SkipStatistics:
    """What skipping does to one attention; shares are between 0 and 1.

    zeros: of the weights that ``causal`` does not hide, those that are skipped.
    executed: of the softmax and weighted sum of a kernel that skips nothing, what is left. The
        exponential of a key goes for all queries of a tile or none, its weighted sum for all
        queries of a group, and for none without a value; `EXP_OPS` and the width of a value weigh
        the two shares.
    error: ``norm(skipped - exact) / norm(exact)`` of the outputs, in the Frobenius norm.
    cosine: between the skipped and the exact output of a query, mean over queries.
    v_gen: of the rows of values, those that V-Gen skipping leaves out, see `Skip.zero_ratio`;
        where values come made (``unmade`` is None) those that it would.
    utilisation: mean busy time of ``threads`` threads over that of the busiest, by scheduler. The
        cost of a pair is its executed work and its scores, which nothing skips.
    """

    zeros: float
    executed: float
    error: float
    cosine: float
    v_gen: float
    utilisation: Mapping[str, float]
    threads: int
    unmade: int | None = None  # rows of values that the kernel did not make
    value_rows: int = 0  # rows of values of all heads that attention reads

    @property
    def saved(self) -> float:
        """Share of softmax and weighted sum that is not executed."""
        return 1 - self.executed

    def __str__(self) -> str:
        """Return zeros, savings, error and use of threads in one line."""
        threads = "1 thread" if self.threads == 1 else f"{self.threads} threads"
        rows = ""
        if self.unmade is not None:
            rows = f"{self.unmade} of {self.value_rows} value rows not made, "
        return (
            f"{self.zeros:.0%} of weights are zero, {self.saved:.0%} of softmax and weighted sum "
            f"saved, {rows}error {self.error:.1e}, {threads} busy "
            f"{self.utilisation['dynamic']:.0%}"
        )


def analyse(
    q: np.ndarray,
    k: np.ndarray,
    v: np.ndarray,
    *,
    scale: float,
    mask: np.ndarray | None,
    causal: bool,
    skip: Skip,
    chunk: int,
    tile: int,
    group: int,
    threads: int,
    makes_values: bool = False,
) -> SkipStatistics:
    """Return what ``skip`` does to ``softmax(scale * q @ k.T + mask) @ v``.

    q is (batch, heads, queries, dim), k (batch, kv_heads, keys, dim) and v (batch, kv_heads, keys,
    width), float32; query head h reads ``h // (heads // kv_heads)``. ``mask``, if any, broadcasts
    to (batch, heads, queries, keys). Keys go by in chunks of ``chunk``, queries in tiles of
    ``tile`` and groups of ``group`` inside a tile. ``makes_values`` says that the kernel makes v,
    for every query head, and leaves rows of it out. One head is worked on at a time, so that
    memory is bounded. Raises InputError for shapes that do not fit or sizes below 1.
    """
    _check(q, k, v, {"chunk": chunk, "tile": tile, "group": group, "threads": threads})
    batch, heads, queries, _ = q.shape
    if makes_values and heads > k.shape[1]:
        k, v = (np.repeat(x, heads // x.shape[1], axis=1) for x in (k, v))
    share, keys = heads // k.shape[1], k.shape[2]
    mask = _full(mask, (batch, heads, queries, keys))
    work = _Work(chunk, tile, group)
    sums = _Sums()
    unmade = 0
    costs = []
    with np.errstate(invalid="ignore", over="ignore"):
        for b, kv in np.ndindex(batch, k.shape[1]):
            needed = np.zeros(keys, np.int64)
            for h in range(kv * share, (kv + 1) * share):
                bias = None if mask is None else mask[b, h]
                head = _Head(q[b, h], k[b, kv], scale, bias, causal, skip, chunk, tile)
                needed += head.needed()
                gone = _unmade(needed, queries, causal, skip) if makes_values else None
                parts = []
                for first, scores, zero, top in head.bands():
                    sums.add(scores, zero, top, v[b, kv], first if causal else None, gone)
                    idle = zero if gone is None else zero | gone
                    parts.append(work.costs(zero, idle, first, causal, (k.shape[3], v.shape[3])))
                costs.append(np.concatenate(parts))
            unmade += int(_unmade(needed, queries, causal, skip, share).sum())
    rows = batch * k.shape[1] * keys
    return SkipStatistics(
        zeros=sums.zeros / sums.weights,
        executed=work.executed / work.whole,
        error=sums.error,
        cosine=sums.cosine / (batch * heads * queries),
        v_gen=unmade / rows,
        utilisation=utilisations(_pairs(np.stack(costs)), threads),
        threads=threads,
        unmade=unmade if makes_values else None,
        value_rows=rows,
    )


@dataclass
class _Head:
    """The scores of a head, a few of its queries at a time."""

    q: np.ndarray  # (queries, dim)
    k: np.ndarray  # (keys, dim)
    scale: float
    bias: np.ndarray | None  # (queries, keys)
    causal: bool
    skip: Skip
    chunk: int
    tile: int

    def bands(self) -> Iterator[tuple[int, np.ndarray, np.ndarray, np.ndarray]]:
        """Yield first query, scores, which are skipped, and maximum, of whole tiles of queries."""
        step = max(1, BAND // (len(self.k) * self.tile)) * self.tile
        if step >= len(self.q):
            yield self._whole
            return
        for first in range(0, len(self.q), step):
            yield self._band(first, step)

    def needed(self) -> np.ndarray:
        """Return for each key the queries that weigh it."""
        return np.sum([(~zero).sum(0) for _, _, zero, _ in self.bands()], axis=0)

    @cached_property
    def _whole(self) -> tuple[int, np.ndarray, np.ndarray, np.ndarray]:
        return self._band(0, len(self.q))

    def _band(self, first: int, count: int) -> tuple[int, np.ndarray, np.ndarray, np.ndarray]:
        rows = slice(first, first + count)
        bias = None if self.bias is None else self.bias[rows]
        scores = _scores(self.q[rows], self.k, self.scale, bias, first if self.causal else None)
        return first, scores, *find_zeros(scores, self.skip, self.chunk)


def _unmade(
    needed: np.ndarray, queries: int, causal: bool, skip: Skip, share: int = 1
) -> np.ndarray:
    """Return the keys whose values are not made, of those that ``needed`` queries weigh.

    ``share`` heads with so many queries each read a value.
    """
    see = np.full(len(needed), queries)
    if causal:
        see = np.maximum(queries - np.arange(len(needed)), 0)
    see = share * see
    return (needed == 0) | (see - needed > skip.zero_ratio * see)


def find_zeros(scores: np.ndarray, skip: Skip, chunk: int) -> tuple[np.ndarray, np.ndarray]:
    """Return which of (queries, keys) scores are skipped, and the maximum of each query.

    A score is compared with the maximum up to and including its chunk, not with the final one.
    """
    threshold = np.float32(skip.threshold)
    top = np.full((len(scores), 1), -np.inf, np.float32)
    zero = np.empty(scores.shape, bool)
    for first in range(0, scores.shape[1], chunk):
        part = scores[:, first : first + chunk]
        top = np.fmax(top, np.fmax.reduce(part, axis=1, keepdims=True))  # NaN is no maximum
        limit = threshold if skip.raw else top - threshold
        limit = np.fmin(limit, top - np.maximum(abs(top), np.float32(1)) * GUARD)
        zero[:, first : first + chunk] = part <= limit  # false for NaN
    return zero, np.where(np.isneginf(top), np.float32(0), top)


def _scores(
    q: np.ndarray, k: np.ndarray, scale: float, bias: np.ndarray | None, first: int | None
) -> np.ndarray:
    """Return scaled and masked scores of queries; causal ones start at query ``first``."""
    scores = (q @ k.T) * np.float32(scale)
    if bias is not None:
        scores = scores + bias.astype(np.float32)
    return scores if first is None else np.where(_hidden(scores.shape, first), -np.inf, scores)


def _hidden(shape: tuple[int, ...], first: int) -> np.ndarray:
    return np.arange(shape[1]) > np.arange(first, first + shape[0])[:, None]


@dataclass
class _Sums:
    """What adds up over heads: weights, and the outputs with and without skipping."""

    zeros: int = 0
    weights: int = 0
    cosine: float = 0.0
    square: float = 0.0
    squared_error: float = 0.0

    def add(
        self,
        scores: np.ndarray,
        zero: np.ndarray,
        top: np.ndarray,
        v: np.ndarray,
        first: int | None,
        gone: np.ndarray | None,
    ) -> None:
        """Add the queries of (queries, keys) scores, compared in float64.

        Keys that are ``gone`` have no value, but stay in the sum of weights.
        """
        hidden = 0 if first is None else int(_hidden(scores.shape, first).sum())
        self.zeros += int(zero.sum()) - hidden
        self.weights += scores.size - hidden
        weights = np.exp(scores.astype(np.float64) - top)
        values = v.astype(np.float64)
        exact = _output(weights, values)
        weights[zero] = 0
        if gone is not None:
            values = np.where(gone[:, None], 0, values)
        got = _output(weights, values)
        lengths = np.linalg.norm(exact, axis=1) * np.linalg.norm(got, axis=1)
        equal = (exact == got).all(1)
        dots = np.where(equal, 1, (exact * got).sum(1) / np.where(lengths == 0, 1, lengths))
        self.cosine += float(dots.sum())
        self.square += float((exact**2).sum())
        self.squared_error += float(((exact - got) ** 2).sum())

    @property
    def error(self) -> float:
        """Relative error in the Frobenius norm."""
        if self.squared_error == 0:
            return 0.0
        return (self.squared_error / self.square) ** 0.5 if self.square else float("inf")


def _output(weights: np.ndarray, values: np.ndarray) -> np.ndarray:
    total = weights.sum(1, keepdims=True)
    return (weights @ values) / np.where(total == 0, 1, total)  # no weight at all gives zeros


@dataclass
class _Work:
    """Counts the operations that a kernel executes; the whole is what it would without skipping."""

    chunk: int
    tile: int
    group: int
    executed: int = field(default=0, init=False)
    whole: int = field(default=0, init=False)

    def costs(
        self, zero: np.ndarray, idle: np.ndarray, first: int, causal: bool, sizes: tuple[int, int]
    ) -> np.ndarray:
        """Return the cost of every (tile, chunk) of queries from ``first`` on, and count it.

        ``zero`` weights go without exp, ``idle`` ones out of the weighted sum; ``sizes`` are dim
        of a key and width of a value.
        """
        (rows, keys), (dim, width) = zero.shape, sizes
        tiles = np.arange(0, rows, self.tile)
        groups = np.concatenate([np.arange(t, min(t + self.tile, rows), self.group) for t in tiles])
        exps = self._by_chunk(zero, tiles)
        sums = np.add.reduceat(self._by_chunk(idle, groups), np.searchsorted(groups, tiles), axis=0)
        done = EXP_OPS * exps + width * sums
        chunks = np.arange(0, keys, self.chunk)
        whole = np.outer(np.diff([*tiles, rows]), np.diff([*chunks, keys]))
        if causal:  # a kernel leaves out chunks that all queries of a tile are too early for
            last = first + np.minimum(tiles + self.tile, rows) - 1
            whole = np.where(chunks > last[:, None], 0, whole)
        self.executed += int(done.sum())
        self.whole += int(whole.sum()) * (EXP_OPS + width)
        return done + dim * whole

    def _by_chunk(self, zero: np.ndarray, starts: np.ndarray) -> np.ndarray:
        """Return the weights per (rows from each start, chunk) whose key not all rows skip."""
        needed = ~np.logical_and.reduceat(zero, starts, axis=0)
        per_chunk = np.arange(0, zero.shape[1], self.chunk)
        sizes = np.diff([*starts, len(zero)])
        return np.add.reduceat(needed, per_chunk, axis=1, dtype=np.int64) * sizes[:, None]


def _pairs(costs: np.ndarray) -> np.ndarray:
    """Return costs of (head, tile) pairs; of (head, chunk) where a head is a single tile."""
    return costs.sum(2) if costs.shape[1] > 1 else costs[:, 0]


def _full(mask: np.ndarray | None, shape: tuple[int, ...]) -> np.ndarray | None:
    """Return the mask of every score, without a copy."""
    if mask is None:
        return None
    try:
        return np.broadcast_to(mask, shape)
    except ValueError as error:
        raise InputError(f"mask {mask.shape} does not broadcast to the scores {shape}") from error


def _check(q: np.ndarray, k: np.ndarray, v: np.ndarray, sizes: Mapping[str, int]) -> None:
    shapes = f"q {q.shape}, k {k.shape}, v {v.shape}"
    if not q.ndim == k.ndim == v.ndim == 4 or not q.size or not k.size or not v.size:
        raise InputError(f"{shapes}: want (batch, heads, length, dim) each, none of them 0")
    fits = q.shape[0] == k.shape[0] and q.shape[3] == k.shape[3] and k.shape[:3] == v.shape[:3]
    if not fits or q.shape[1] % k.shape[1]:
        raise InputError(
            f"{shapes}: want one batch, dim of q = dim of k, heads and keys of v = those of k, "
            "and heads of q a multiple of heads of k"
        )
    for name, size in sizes.items():
        if size < 1:
            raise InputError(f"{name}={size!r}; want at least 1")
