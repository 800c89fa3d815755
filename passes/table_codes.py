"""What the codes of a lookup are made of: which bits of which features, and in which order.

A code is an affine function of bits ``z > 0`` of one group of features. The first probes turn
every feature of a group positive one at a time, which shows its place; the others are random
and show that nothing else matters.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from tvmstruct.lookup import MOST_BITS, entries, flipped
from tvmstruct.passes.probe import Gather

SIZES = (1e-30, 1e-12, 1e-7, 1e-4, 1e-2, 0.1, 0.3, 1, 1, 1, 2, 2, 3, 5, 10, 20)  # of random rows
UNIT = 4.0


class Refusal(Exception):
    """A lookup that is not one of LookupFFN's, with the condition that fails."""


@dataclass(frozen=True)
class Tables:
    """Tables (h, 2**tau, n), most significant bit first, and how many bits are flipped."""

    array: np.ndarray
    flips: int

    @property
    def tau(self) -> int:
        """Bits of a code."""
        return int(self.array.shape[1]).bit_length() - 1


def probes(features: int, tau: int) -> np.ndarray:
    """Return rows of z: all negative, each bit of every group alone positive, random, zeros."""
    rng = np.random.default_rng(features)
    units = np.full((tau + 1, features // tau, tau), -UNIT)
    units[np.arange(1, tau + 1), :, np.arange(tau)] = UNIT
    sizes = rng.normal(size=(len(SIZES), features)) * np.array(SIZES)[:, None]
    return np.concatenate([units.reshape(tau + 1, features), sizes, np.zeros((1, features))])


def splits(features: int, count: int) -> Iterator[tuple[int, int]]:
    """Yield (tau, flips) such that tables of tau bits are read ``count`` times in all."""
    for tau in range(1, min(features, MOST_BITS) + 1):
        if features % tau == 0:
            for flips in range(tau + 1):
                if entries(tau, flips) * (features // tau) == count:
                    yield tau, flips


@dataclass(frozen=True)
class _Code:
    """``first + sum(places * (bits ^ negated))`` of the bits of a group, as rows of ``data``."""

    data: np.ndarray
    group: int
    first: int
    places: tuple[int, ...]
    negated: tuple[bool, ...]


def read_tables(gathers: Sequence[Gather], z: np.ndarray, tau: int, flips: int) -> Tables:
    """Return the tables that gathers of probes ``z`` read, or raise Refusal."""
    groups = z.reshape(len(z), -1, tau)
    codes = [_read(g.data, column, groups, tau) for g in gathers for column in g.codes.T]
    by_group = [[c for c in codes if c.group == k] for k in range(groups.shape[1])]
    if any(len(found) != entries(tau, flips) for found in by_group):
        raise Refusal("some groups of features are looked up more often than others")
    parts = [_table(found, tau, flips) for found in by_group]
    return Tables(_stacked(parts), flips)


def _read(data: np.ndarray, code: np.ndarray, groups: np.ndarray, tau: int) -> _Code:
    bits = groups > 0
    base, units = int(code[0]), code[1 : tau + 1]
    steps = (units - base).astype(np.int64)
    if sorted(map(abs, steps.tolist())) != [1 << i for i in range(tau)]:
        raise Refusal(f"bits count {steps.tolist()} in a code, not powers of two")
    random = slice(tau + 1, -1)
    want = base + bits[random] @ steps  # (probes, h)
    fits = (want == code[random, None]).all(0)
    if not fits.any():
        raise Refusal(
            f"codes are not the bits z > 0 of {tau} neighbouring features: another threshold, or "
            "another order"
        )
    _check_zero(code[-1], base, steps)
    first = base + int(np.minimum(steps, 0).sum())
    if first < 0 or first + (1 << tau) > len(data):
        raise Refusal(
            f"codes go from {first} to {first + (1 << tau) - 1}, the table has {len(data)} rows"
        )
    places = tuple(abs(int(s)) for s in steps)
    return _Code(data, int(np.argmax(fits)), first, places, tuple(bool(s < 0) for s in steps))


def _check_zero(code: int, base: int, steps: np.ndarray) -> None:
    """A feature of zero counts as negative; halves of bits, as sign gives, count as nothing."""
    halves = base + int(np.trunc(steps.sum() / 2))
    if int(code) not in (base, halves):
        raise Refusal("the bit of a feature of zero is 1; want z > 0")


def _table(codes: Sequence[_Code], tau: int, flips: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the data of one table, and its rows by code."""
    first = codes[0]
    if any(not _same(c.data, first.data) or c.first != first.first for c in codes) or any(
        c.places != first.places for c in codes
    ):
        raise Refusal("entries of one table are looked up in different tables")
    masks = {c.negated for c in codes}
    sets = {tuple(i in bits for i in range(tau)) for bits in flipped(tau, flips)}
    for base in sorted(masks):
        moved = {tuple(a ^ b for a, b in zip(m, base, strict=True)) for m in masks}
        if moved == sets:
            code = np.arange(1 << tau)[:, None] >> np.arange(tau - 1, -1, -1) & 1
            rows = first.first + (code ^ np.array(base)) @ np.array(first.places)
            return first.data, rows
    raise Refusal(f"neighbours are not the codes within {flips} flipped bits")


def _same(a: np.ndarray, b: np.ndarray) -> bool:
    """Return whether two arrays are one constant, seen twice."""
    return a.shape == b.shape and a.ctypes.data == b.ctypes.data


def _stacked(parts: Sequence[tuple[np.ndarray, np.ndarray]]) -> np.ndarray:
    """Return tables (h, 2**tau, n): a view where they lie in order already."""
    data, rows = parts[0][0], np.concatenate([r for _, r in parts])
    shape = (len(parts), len(parts[0][1]), data.shape[1])
    if all(_same(d, data) for d, _ in parts):
        if np.array_equal(rows, np.arange(rows[0], rows[0] + len(rows))):
            return data[rows[0] : rows[0] + len(rows)].reshape(shape)
        return data[rows].reshape(shape)
    return np.stack([d[r] for d, r in parts])
