"""What the tables of a LookupFFN layer are in memory, independent of how they are read.

A table is cut into slices of columns, and a slice of all tables lies together:
``[ceil(n / columns)][h * 2**tau + gap][columns]``. So the part of a few tables that many tokens
read stays in cache while they pass, and a row of a slice is whole cache lines. Without a gap the
slices of a row would lie a power of two apart, so that all of them compete for one set of each
cache, of lines and of addresses.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import numpy as np

from tvmstruct.lookup import entries
from tvmstruct.schedules.compute.dense import Epilogue
from tvmstruct.schedules.compute.low_precision import LARGEST, pair_vectors, round_bf16

ITEM = {"f32": 4, "bf16": 2, "int8": 1}  # bytes of an element
ROW_BYTES = 128  # of a slice: two cache lines, which are fetched together
GAP_BYTES = 68 << 10  # after a slice of many pages: an odd number of them, see `Tables.stored_rows`
PAGES = 1 << 20  # bytes of a slice from which on the gap is that large
LONG = 9  # bits from which on a table in slices of one line is as large as others in two


@dataclass(frozen=True)
class Tables:
    """The static side: ``h`` tables of 2**tau rows of n features, and what is added to their sum.

    ``dtype`` is "f32", "bf16" or "int8" with one scale for each row; ``scaled`` says whether a
    score has the linear factor.
    """

    h: int
    tau: int
    n: int
    flips: int
    scaled: bool
    dtype: str
    epilogue: Epilogue

    @property
    def entries(self) -> int:
        """Rows taken of each table."""
        return entries(self.tau, self.flips)

    @property
    def words(self) -> str:
        """The parameters in words, by which records of tuning find them."""
        score = "scaled" if self.scaled else "unscaled"
        sizes = f"{self.h} {self.tau} {self.n} flips {self.flips}"
        return f"{sizes} {score} {self.dtype} {self.epilogue.words}"

    def columns(self, lanes: int) -> int:
        """Columns of a slice: no more vectors than hold n, and in bf16 an even number of them."""
        row = ROW_BYTES // (2 if self.tau >= LONG else 1)
        least = lanes * (2 if self.dtype == "bf16" else 1)
        most = -(-self.n // least) * least
        return max(least, min(row // ITEM[self.dtype], most) // least * least)

    def slices(self, lanes: int) -> int:
        """Slices of a table."""
        return -(-self.n // self.columns(lanes))

    def stored_rows(self, lanes: int) -> int:
        """Rows of a slice with the gap: one row, so that lines of a row lie in different sets.

        After a large slice 17 pages more, so that the addresses of its pages do too.
        """
        rows, row = self.h << self.tau, self.columns(lanes) * ITEM[self.dtype]
        return rows + 1 + (GAP_BYTES // row if rows * row >= PAGES else 0)

    def pack(self, tables: np.ndarray, lanes: int) -> dict[str, np.ndarray]:
        """Return what the kernel reads of ``tables`` (h, 2**tau, n): tables, and scales in int8."""
        rows = tables.reshape(-1, self.n)
        if self.dtype == "int8":
            scale = (np.abs(rows).max(axis=1) / LARGEST).astype(np.float32)
            inverse = np.divide(1.0, scale, out=np.zeros(scale.shape), where=scale > 0)
            q = np.rint(rows * inverse[:, None]).clip(-LARGEST, LARGEST).astype(np.int8)
            return {"tables": self._cut(q, lanes), "scales": scale}
        cut = self._cut(rows.astype(np.float32, copy=False), lanes)
        if self.dtype == "bf16":
            words = pair_vectors(cut, lanes)
            return {"tables": words.reshape(*cut.shape[:2], -1)}
        return {"tables": cut}

    def stored(self, tables: np.ndarray) -> np.ndarray:
        """Return ``tables`` as the kernel sees them, in float32."""
        if self.dtype == "f32":
            return tables.astype(np.float32)
        if self.dtype == "bf16":
            return round_bf16(tables).astype(np.float32)
        packed = self.pack(tables, 1)
        rows = self.h << self.tau
        q = packed["tables"][:, :rows].transpose(1, 0, 2).reshape(rows, -1)[:, : self.n]
        return (q.astype(np.float32) * packed["scales"][:, None]).reshape(tables.shape)

    @property
    def bytes(self) -> int:
        """Bytes of all tables without padding, scales included."""
        rows = self.h << self.tau
        return rows * self.n * ITEM[self.dtype] + (4 * rows if self.dtype == "int8" else 0)

    def error(self, tables: np.ndarray) -> float:
        """Return the relative Frobenius error of the tables as they are stored."""
        if self.dtype == "f32":
            return 0.0
        lost = norm = 0.0
        for one in tables:  # of one table at a time: all of them may be gigabytes
            alone = replace(self, h=1).stored(one[None])[0].astype(np.float64)
            lost += float(((alone - one) ** 2).sum())
            norm += float((one.astype(np.float64) ** 2).sum())
        return math.sqrt(lost / norm) if norm else 0.0

    def _cut(self, rows: np.ndarray, lanes: int) -> np.ndarray:
        columns, slices = self.columns(lanes), self.slices(lanes)
        cut = np.zeros((slices, self.stored_rows(lanes), columns), rows.dtype)
        for i in range(slices):
            part = rows[:, i * columns : (i + 1) * columns]
            cut[i, : len(rows), : part.shape[1]] = part
        return cut
