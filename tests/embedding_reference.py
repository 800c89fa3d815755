"""Rows of tensor-product embeddings in float64, written out term by term as in the paper."""

from __future__ import annotations

from collections.abc import Sequence
from functools import reduce

import numpy as np


def xs_row(factors: Sequence[np.ndarray], token: int, dimension: int) -> np.ndarray:
    """Equation 3.4: row ``token`` of a sum of Kronecker products, cut to ``dimension``."""
    digits = np.unravel_index(token, [f.shape[1] for f in factors])
    terms = range(factors[0].shape[0])
    pick = lambda k: [f[k, d].astype(np.float64) for f, d in zip(factors, digits, strict=True)]  # noqa: E731
    return sum((reduce(np.kron, pick(k)) for k in terms), np.zeros(1))[:dimension]


def ket_row(leaves: np.ndarray, dimension: int, norm: float | None = None) -> np.ndarray:
    """Equation 3.3 for the ``leaves`` (rank, order, q) of one row; LayerNorm at inner nodes."""
    return sum((_node(list(term), norm) for term in leaves.astype(np.float64)), np.zeros(1))[
        :dimension
    ]


def _node(leaves: list[np.ndarray], norm: float | None) -> np.ndarray:
    if len(leaves) == 1:
        return leaves[0]
    half = len(leaves) // 2
    node = np.outer(_node(leaves[:half], norm), _node(leaves[half:], norm)).ravel()
    return node if norm is None else (node - node.mean()) / np.sqrt(node.var() + norm)


def layer_norm(x: np.ndarray, gamma: np.ndarray, beta: np.ndarray, epsilon: float) -> np.ndarray:
    """Normalise the rows of ``x``."""
    x = x.astype(np.float64)
    deviation = np.sqrt(x.var(axis=-1, keepdims=True) + epsilon)
    return (x - x.mean(axis=-1, keepdims=True)) / deviation * gamma + beta
