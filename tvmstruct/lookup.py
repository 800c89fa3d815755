"""LookupFFN: hash a token, gather one row of each table, add them up (Zeng et al. 2023, eq. 7).

The projection ``z = x @ R + b`` falls into ``h`` groups of ``tau``. A group's code is its bits
``z > 0``, most significant first; with ``s = sum |z|`` its score is ``s / prod(1 + exp(-2 |z|))``
(the linear scaling of section 4; without it the numerator is 1) and it adds
``score * table[code]`` to the output. The softmax-neighbour form takes more rows of a table:
those whose code differs in at most ``flips`` bits, each flipped bit j taking ``2 |z_j|`` from s
and multiplying the weight by ``exp(-2 |z_j|)``.

A NaN is not over zero: its bit is 0, so the code stays in range, and its score is NaN, so the
whole output row is.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from itertools import combinations
from math import comb

import numpy as np

from tvmstruct.ops import Array, Op

MOST_BITS = 20  # of a code: a table of a million rows
ROWS = 256  # that `Lookup.apply` takes at a time: it holds rows x h x entries x n_out of none


@dataclass(frozen=True, eq=False)
class Lookup:
    """``y = sum_k sum_i score_ki * tables[k, code_ki] + bias`` of ``z = x @ projection + b``.

    ``tables`` is (h, 2**tau, n_out), ``projection`` an operator from ``n_in`` to ``h * tau``,
    ``projection_bias`` (h * tau,) or None, ``bias`` (n_out,) or None. Raises ValueError for
    shapes that do not go together, for tau over `MOST_BITS` and for flips outside 0 to tau.
    """

    projection: Op
    tables: Array
    projection_bias: Array | None = None
    bias: Array | None = None
    flips: int = 0
    scaled: bool = True

    def __post_init__(self) -> None:
        if self.tables.ndim != 3 or 0 in self.tables.shape:
            raise ValueError(f"lookup: tables have shape {self.tables.shape}; want (h, 2**tau, n)")
        h, rows, n = self.tables.shape
        if rows & (rows - 1) or rows < 2 or self.tau > MOST_BITS:
            raise ValueError(
                f"lookup: tables of {rows} rows; want a power of two from 2 to 2**{MOST_BITS}"
            )
        if self.projection.n_out != h * self.tau:
            raise ValueError(
                f"lookup: projection to {self.projection.n_out} features for {h} tables of "
                f"2**{self.tau} rows; want h * tau = {h * self.tau}"
            )
        for name, array, size in (
            ("projection_bias", self.projection_bias, h * self.tau),
            ("bias", self.bias, n),
        ):
            if array is not None and array.shape != (size,):
                raise ValueError(f"lookup: {name} has shape {array.shape}; want ({size},)")
        if not 0 <= self.flips <= self.tau:
            raise ValueError(f"lookup: flips={self.flips}; want 0 to tau={self.tau}")

    @property
    def h(self) -> int:
        """Number of tables."""
        return self.tables.shape[0]

    @cached_property
    def tau(self) -> int:
        """Bits of a code."""
        return int(self.tables.shape[1]).bit_length() - 1

    @property
    def n_in(self) -> int:
        """Features that the layer takes."""
        return self.projection.n_in

    @property
    def n_out(self) -> int:
        """Features that the layer yields."""
        return self.tables.shape[2]

    @property
    def entries(self) -> int:
        """Rows taken of each table: the codes within ``flips`` bits of the sign."""
        return entries(self.tau, self.flips)

    @property
    def params(self) -> int:
        """Stored parameters: projection, tables and biases."""
        biases = (b.size for b in (self.projection_bias, self.bias) if b is not None)
        return self.projection.params + self.tables.size + sum(biases)

    @property
    def macs(self) -> int:
        """Multiply-adds for one row: the projection's, and those with rows of tables."""
        return self.projection.macs + self.h * self.entries * self.n_out

    def hash(self, z: Array) -> tuple[Array, Array]:
        """Return codes (..., h, entries) int32 and scores of ``z`` (..., h * tau)."""
        return hash_codes(z, self.tau, flips=self.flips, scaled=self.scaled)

    def apply(self, x: Array) -> Array:
        """Return y (..., n_out) of x (..., n_in)."""
        rows = x.reshape(-1, self.n_in)
        parts = [self._apply(rows[i : i + ROWS]) for i in range(0, len(rows), ROWS)]
        out = np.concatenate(parts) if parts else np.zeros((0, self.n_out), rows.dtype)
        return out.reshape(*x.shape[:-1], self.n_out)

    def _apply(self, x: Array) -> Array:
        z = self.projection.apply(x)
        if self.projection_bias is not None:
            z = z + self.projection_bias
        codes, scores = self.hash(z)
        y = np.zeros((len(x), self.n_out), np.result_type(z, self.tables))
        for k in range(self.h):
            y += np.einsum("te,ten->tn", scores[:, k], self.tables[k][codes[:, k]])
        return y if self.bias is None else y + self.bias


def entries(tau: int, flips: int) -> int:
    """Return how many codes differ in at most ``flips`` of ``tau`` bits from a given one."""
    return sum(comb(tau, f) for f in range(flips + 1))


def flipped(tau: int, flips: int) -> Iterator[tuple[int, ...]]:
    """Yield the sets of flipped bits (positions from the first) in the order of entries."""
    for f in range(flips + 1):
        yield from combinations(range(tau), f)


def hash_codes(z: Array, tau: int, *, flips: int = 0, scaled: bool = True) -> tuple[Array, Array]:
    """Return codes (..., h, entries) int32 and scores of ``z`` (..., h * tau), eq. 7.

    The entry without a flipped bit comes first, then one flipped bit after the other, then two.
    """
    groups = z.reshape(*z.shape[:-1], -1, tau)
    size = np.abs(groups)
    place = 1 << np.arange(tau - 1, -1, -1)
    code = ((groups > 0) * place).sum(-1, dtype=np.int32)
    decay = np.exp(-2 * size)
    total, weight = size.sum(-1), 1 / np.prod(1 + decay, -1)
    codes, scores = [], []
    for bits in flipped(tau, flips):
        at = list(bits)
        taken = total - 2 * size[..., at].sum(-1) if scaled else 1
        scores.append(taken * (weight * np.prod(decay[..., at], -1)))
        codes.append(code ^ np.int32(place[at].sum()))
    return np.stack(codes, -1), np.stack(scores, -1)
