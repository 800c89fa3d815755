"""Embedding tables as tensor products: single rows, and inner products without any row.

``Word2KetXS`` keeps one set of factors for the whole table, ``Word2Ket`` one for each row
(Panahi, equations 3.3 and 3.4).  Both cut a row of q^n features to ``dimension``.

>>> table = tvmstruct.embeddings.Word2KetXS(factors, vocabulary=30522, dimension=384)
>>> table.rows(ids)  # (..., 384); only these rows are made
>>> table.inner(ids, other_ids)  # r^2 n q multiply-adds for a pair, no row is made
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar

import numpy as np
from numpy.typing import ArrayLike

from tvmstruct.errors import InputError
from tvmstruct.families.kronecker import kronecker_factors
from tvmstruct.families.word2ket_xs import check_factors, word2ket_xs, word2ket_xs_factors
from tvmstruct.fit import Fit, as_weight
from tvmstruct.ops import Array, Op

EPSILON = 1e-5  # of the LayerNorm at nodes of the tree: PyTorch's default


class TensorTable:
    """What both forms of table have in common: their leaves by id."""

    vocabulary: int
    dimension: int
    family: ClassVar[str]

    @property
    def rank(self) -> int:
        """Terms of the sum."""
        raise NotImplementedError

    @property
    def sides(self) -> tuple[int, ...]:
        """Features of each leaf, q_1 to q_n: a row has their product of them, then is cut."""
        raise NotImplementedError

    @property
    def params(self) -> int:
        """Stored parameters."""
        raise NotImplementedError

    def leaves(self, ids: ArrayLike) -> list[Array]:
        """Return one (..., rank, q_j) array per leaf."""
        raise NotImplementedError

    def rows(self, ids: ArrayLike) -> Array:
        """Return the rows (..., dimension) of ``ids`` (...): ``sum_k v_1k (x) ... (x) v_nk``."""
        return _tree(self.leaves(ids), None).sum(axis=-2)[..., : self.dimension]

    def inner(self, i: ArrayLike, j: ArrayLike) -> Array:
        """Return the inner products of rows ``i`` and ``j``, whose shapes broadcast.

        ``sum_kl prod_m <v_mk, w_ml>`` (equation 3.2); a row that is cut adds one such product
        per leaf, for the last leaf that the cut leaves whole.
        """
        left, right = self.leaves(i), self.leaves(j)
        return _cut_product(left, right, self.dimension).sum(axis=(-2, -1))

    def _checked(self, ids: ArrayLike) -> Array:
        found = np.asarray(ids)
        if found.dtype.kind not in "iu":
            raise InputError(f"embedding ids are {found.dtype}; want integers")
        if found.size and not (0 <= found.min() and found.max() < self.vocabulary):
            raise InputError(
                f"embedding ids from {found.min()} to {found.max()}; "
                f"the table has the rows 0 to {self.vocabulary - 1}"
            )
        return found


@dataclass(frozen=True, eq=False)
class Word2KetXS(TensorTable):
    """A table of n factors (rank, t_j, q_j): digit j of an id, to base t_j, picks a row of each."""

    factors: tuple[Array, ...]
    vocabulary: int
    dimension: int

    family: ClassVar[str] = "word2ket_xs"

    def __post_init__(self) -> None:
        """Check that the factors make a table of at least this size."""
        check_factors(self.factors, self.vocabulary, self.dimension)

    @property
    def rank(self) -> int:
        return self.factors[0].shape[0]

    @property
    def sides(self) -> tuple[int, ...]:
        return tuple(f.shape[2] for f in self.factors)

    @property
    def params(self) -> int:
        return sum(f.size for f in self.factors)

    @cached_property
    def operator(self) -> Op:
        """The table as an operator: ``x @ E``; ``ops.transpose`` of it is a tied output layer."""
        return word2ket_xs(self.factors, self.vocabulary, self.dimension)

    def leaves(self, ids: ArrayLike) -> list[Array]:
        """Return the rows of the factors that the digits of ``ids`` pick."""
        rest, found = self._checked(ids), list[Array]()
        for factor in reversed(self.factors):
            rest, digit = np.divmod(rest, factor.shape[1])
            found.append(np.moveaxis(factor[:, digit], 0, -2))
        return found[::-1]


@dataclass(frozen=True, eq=False)
class Word2Ket(TensorTable):
    """A table with tensors of its own for each row: ``tensors`` is (vocabulary, rank, order, q).

    With ``norm`` (an epsilon) every inner node of the balanced tree of a term, its root too, is
    normalised to mean 0 and variance 1 over its features, without scale or shift.  The tree of n
    leaves splits after n // 2 of them.
    """

    tensors: Array
    dimension: int
    norm: float | None = None

    family: ClassVar[str] = "word2ket"

    def __post_init__(self) -> None:
        """Check that there is a leaf and that a row has at least ``dimension`` features."""
        shape = np.shape(self.tensors)
        if len(shape) != 4 or min(shape) < 1 or shape[2] < 2:
            raise ValueError(
                f"word2ket: tensors have the shape {shape}; want (vocabulary, rank, order, q), "
                "order 2 or more"
            )
        if not 1 <= self.dimension <= shape[3] ** shape[2]:
            raise ValueError(
                f"word2ket: dimension={self.dimension} of {shape[3]}^{shape[2]} features; "
                f"want 1 to {shape[3] ** shape[2]}"
            )
        if self.norm is not None and not (math.isfinite(self.norm) and self.norm > 0):
            raise ValueError(f"word2ket: norm={self.norm}; want a positive epsilon or None")

    @property
    def vocabulary(self) -> int:  # pyright: ignore[reportIncompatibleVariableOverride]
        return self.tensors.shape[0]

    @property
    def rank(self) -> int:
        return self.tensors.shape[1]

    @property
    def sides(self) -> tuple[int, ...]:
        return (self.tensors.shape[3],) * self.tensors.shape[2]

    @property
    def params(self) -> int:
        return self.tensors.size

    def leaves(self, ids: ArrayLike) -> list[Array]:
        """Return the leaves of the rows ``ids``."""
        return list(np.moveaxis(self.tensors[self._checked(ids)], -2, 0))

    def rows(self, ids: ArrayLike) -> Array:
        """Return the rows, each term normalised at the nodes of its tree where ``norm`` is set."""
        return _tree(self.leaves(ids), self.norm).sum(axis=-2)[..., : self.dimension]

    def inner(self, i: ArrayLike, j: ArrayLike) -> Array:
        """Return the inner products of rows; only without LayerNorm do they factor."""
        if self.norm is not None:
            raise ValueError(
                "word2ket: inner products of rows with LayerNorm do not factor; "
                "multiply rows(i) and rows(j)"
            )
        return super().inner(i, j)


TABLE_FAMILIES = ("word2ket_xs", "kronecker")
"""The forms of which single rows can be looked up."""


def nearest_table(family: str, w: Array, **parameters: Any) -> tuple[Word2KetXS, Fit]:
    """Return the table of one of ``TABLE_FAMILIES`` nearest to ``w`` (vocabulary, dimension).

    ``parameters`` are those of the family (``order`` and ``r``; ``r``, ``a`` and ``b``); factors
    come in the dtype of ``w``, and ``Fit.op`` is the table's ``operator``.
    """
    target = as_weight(w)
    if family == "kronecker":
        a, b, error = kronecker_factors(target, **parameters)
        factors = [a, b]
        found = {"r": len(a), "a": a.shape[1:], "b": b.shape[1:]}
    else:
        factors, error = word2ket_xs_factors(target, **parameters)
        found = {"order": len(factors), "r": len(factors[0])}
    dtype = np.asarray(w).dtype if np.asarray(w).dtype.char in "fd" else np.dtype(np.float32)
    table = Word2KetXS(tuple(f.astype(dtype) for f in factors), *target.shape)
    return table, Fit(table.operator, error, family, found)


def _tree(leaves: Sequence[Array], norm: float | None) -> Array:
    """Return (..., rank, q_1 ... q_n): outer products along the balanced tree."""
    if len(leaves) == 1:
        return leaves[0]
    middle = len(leaves) // 2
    left, right = _tree(leaves[:middle], norm), _tree(leaves[middle:], norm)
    node = (left[..., :, None] * right[..., None, :]).reshape(*left.shape[:-1], -1)
    if norm is None:
        return node
    centred = node - node.mean(axis=-1, keepdims=True)
    return centred / np.sqrt((centred**2).mean(axis=-1, keepdims=True) + norm)


def _cut_product(left: Sequence[Array], right: Sequence[Array], width: int) -> Array:
    """Return (..., rank, rank): inner products of the first ``width`` features of two terms."""
    (x, *xs), (y, *ys) = left, right
    rest = math.prod(v.shape[-1] for v in xs)
    whole, cut = divmod(width, rest)
    total = np.einsum("...kq,...lq->...kl", x[..., :whole], y[..., :whole])
    if xs:
        total = total * _cut_product(xs, ys, rest)
    if cut:
        last = x[..., :, None, whole] * y[..., None, :, whole]
        total = total + last * _cut_product(xs, ys, cut)
    return total
