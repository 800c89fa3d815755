"""Embedding tables as tensor products: the rows of word2ketXS, made from trained factors."""

from __future__ import annotations

import math
from functools import reduce
from typing import Self

import numpy as np
import torch
from torch import Tensor, nn

from tvmstruct.embeddings import Word2KetXS
from tvmstruct.families.word2ket_xs import zero_factors
from tvmstruct.training.linear import to_array, to_parameter


class StructuredEmbedding(nn.Module):
    """Rows ``sum_k v_1k (x) ... (x) v_nk`` of a word2ketXS table; parameters ``factor_0``, ...

    Only the rows that are looked up are made. `of` draws the factors so that features have the
    variance 1 of ``nn.Embedding``.
    """

    def __init__(self, table: Word2KetXS) -> None:
        super().__init__()
        self.num_embeddings, self.embedding_dim = table.vocabulary, table.dimension
        self.names = tuple(f"factor_{j}" for j in range(len(table.factors)))
        for name, factor in zip(self.names, table.factors, strict=True):
            self.register_parameter(name, to_parameter(factor))

    @classmethod
    def of(cls, vocabulary: int, dimension: int, *, order: int = 2, r: int = 1) -> Self:
        """Return a table of ``order`` factors (r, t, q), the least that cover it."""
        factors = zero_factors(vocabulary, dimension, order=order, r=r)
        layer = cls(Word2KetXS(tuple(factors), vocabulary, dimension))
        layer.initialise()
        return layer

    def initialise(self) -> None:
        """Draw the factors, uniform: a feature is a sum of r products of variance 1 / r."""
        factors = list(self.parameters())
        bound = math.sqrt(3) * factors[0].shape[0] ** (-1 / (2 * len(factors)))
        with torch.no_grad():
            for factor in factors:
                factor.uniform_(-bound, bound)

    def table(self) -> Word2KetXS:
        """Return the table in numpy, with the parameters' very bits."""
        factors = tuple(to_array(getattr(self, name)) for name in self.names)
        return Word2KetXS(factors, self.num_embeddings, self.embedding_dim)

    def forward(self, ids: Tensor) -> Tensor:
        """Return rows (..., dimension) of ids (...) of integers."""
        rest, leaves = ids, list[Tensor]()
        for name in reversed(self.names):
            factor = getattr(self, name)
            digit = rest % factor.shape[1]
            rest = rest // factor.shape[1]
            leaves.append(factor.transpose(0, 1)[digit])  # (..., r, q)
        terms = reduce(_outer, leaves[::-1])
        return terms.sum(-2)[..., : self.embedding_dim]

    def extra_repr(self) -> str:
        """Return the sizes."""
        shapes = [tuple(getattr(self, name).shape) for name in self.names]
        size = int(np.sum([math.prod(s) for s in shapes]))
        return f"{self.num_embeddings}x{self.embedding_dim}, factors {shapes}, {size} parameters"


def _outer(a: Tensor, b: Tensor) -> Tensor:
    return (a.unsqueeze(-1) * b.unsqueeze(-2)).flatten(-2)
