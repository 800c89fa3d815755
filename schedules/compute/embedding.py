"""Sums of embedding rows: what a kernel computes, and its tables in the layout that it reads.

``out[i] = norm(sum of terms)``, where a term is a row of a dense table, the row ``i mod size`` of
a small one, or a row that is made of the leaves of a tensor product.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import prod

import numpy as np

from tvmstruct.embeddings import TensorTable, Word2Ket, Word2KetXS

SLACK = 16  # values before and after a packed table: vectors may begin or end outside a leaf


@dataclass(frozen=True)
class Rows:
    """Rows of a dense table of ``size`` rows: by id, or without ``ids`` (their dtype) in turn."""

    size: int
    ids: str = ""
    scale: float = 1.0

    def arguments(self, n: int) -> tuple[tuple[int, ...], ...]:
        """Shape of the table for rows of n features."""
        return ((self.size, n),)


@dataclass(frozen=True)
class Tensors:
    """Rows made of leaves of ``sides`` features each, ``rank`` terms of them.

    With ``digits`` leaf j lies in row ``digit j of the id`` of a table of its own (word2ketXS),
    else all leaves of a row lie together (word2ket), normalised in the tree where ``norm`` is set.
    """

    size: int
    ids: str
    rank: int
    sides: tuple[int, ...]
    digits: tuple[int, ...] = ()
    norm: float | None = None
    scale: float = 1.0

    @property
    def middle(self) -> int:
        """Leaves left of the root of the balanced tree."""
        return len(self.sides) // 2

    @property
    def widths(self) -> tuple[int, int]:
        """Features of the left and of the right subtree: a row is their outer product."""
        return prod(self.sides[: self.middle]), prod(self.sides[self.middle :])

    @property
    def steps(self) -> tuple[int, ...]:
        """Values of one id (or digit) in each packed table."""
        if self.digits:
            return tuple(self.rank * q for q in self.sides)
        return (self.rank * sum(self.sides),)

    def arguments(self, n: int) -> tuple[tuple[int], ...]:
        """Shapes of the packed tables, whatever the features of a row."""
        counts = self.digits or (self.size,)
        return tuple((2 * SLACK + t * s,) for t, s in zip(counts, self.steps, strict=True))


Term = Rows | Tensors


@dataclass(frozen=True)
class EmbeddingSum:
    """``out (rows, n)``: the sum of ``terms``, of which one at most is `Tensors`, then norm."""

    n: int
    terms: tuple[Term, ...]
    norm: float | None = None

    @property
    def work(self) -> int:
        """Multiply-adds of a row, for reports."""
        return self.n * sum(t.rank if isinstance(t, Tensors) else 1 for t in self.terms)


def tensors_of(table: TensorTable, ids: str, scale: float = 1.0) -> Tensors:
    """Return the term that looks up rows of a table."""
    digits = tuple(f.shape[1] for f in table.factors) if isinstance(table, Word2KetXS) else ()
    norm = table.norm if isinstance(table, Word2Ket) else None
    return Tensors(table.vocabulary, ids, table.rank, table.sides, digits, norm, scale)


def pack_table(table: TensorTable) -> list[np.ndarray]:
    """Return what a kernel reads of a table: all terms of one digit (or of one id) together."""
    if isinstance(table, Word2KetXS):
        parts = [f.transpose(1, 0, 2) for f in table.factors]  # (t, rank, q)
    else:
        assert isinstance(table, Word2Ket)
        parts = [table.tensors]
    return [np.pad(p.reshape(-1).astype(np.float32), SLACK) for p in parts]
