"""Checkpoints of the public word2ket code (github.com/panaali/word2ket).

``EmbeddingKet`` and ``EmbeddingKetXS`` each keep one tensor, ``weight_leafs``: (order, rank,
vocabulary, q) and (order, rank, t, q). Neither size of the table is stored, so the caller gives
both. The convention that is read here is that of its code:

- leaf 0 is the most significant digit of the id and of the feature;
- ids beyond the vocabulary are never read, features from ``dimension`` on are cut (the lazy form
  of ``EmbeddingKetXS``; its form without GPyTorch forgets to cut, which this import does not);
- no LayerNorm: the calls of it in the tree are commented out. The paper has one at each node:
  pass ``norm=1e-5`` for a checkpoint that was trained with them.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np

from tvmstruct.embeddings import Word2Ket, Word2KetXS
from tvmstruct.errors import ModelError
from tvmstruct.families.word2ket_xs import MOST
from tvmstruct.frontends.tensors import read_tensors

LEAVES = "weight_leafs"


def from_word2ket(
    state: Mapping[str, np.ndarray] | str | Path,
    *,
    vocabulary: int,
    dimension: int,
    name: str | None = None,
    norm: float | None = None,
) -> Word2KetXS | Word2Ket:
    """Return the embedding of a state dict, or of a file that `read_tensors` reads.

    ``name`` is the module that holds it, such as ``"encoder.embedding"``, where there are
    several. A tensor with a leaf for each row is word2ket, with fewer it is word2ketXS; ``norm``
    is the epsilon of a LayerNorm at the nodes of word2ket's tree.
    """
    tensors = read_tensors(state) if isinstance(state, str | Path) else state
    key = _find(tensors, name)
    leaves = np.asarray(tensors[key])
    if leaves.ndim != 4 or min(leaves.shape) < 1 or leaves.dtype.kind != "f":
        raise ModelError(
            f"{key}: is {leaves.dtype} of shape {leaves.shape}; want floats (order, rank, rows, q)"
        )
    leaves = leaves.astype(np.float32, copy=False)
    if not np.isfinite(leaves).all():
        raise ModelError(f"{key}: has NaN or infinite entries; was training stopped in time?")
    order, _, rows, side = leaves.shape
    if side**order < dimension or dimension < 1:
        raise ModelError(
            f"{key}: {order} leaves of {side} features make {side**order}; dimension={dimension}"
        )
    if rows == vocabulary and order > 1:
        return Word2Ket(leaves.transpose(2, 1, 0, 3).copy(), dimension, norm)
    if norm is not None:
        raise ModelError(f"{key}: norm={norm}, but word2ketXS has no LayerNorm; leave it out")
    if not 2 <= order <= MOST or not 1 <= vocabulary <= rows**order:
        raise ModelError(
            f"{key}: {order} factors of {rows} rows make a table of {rows**order}; want 2 to "
            f"{MOST} factors and at least vocabulary={vocabulary} rows, was the file cut short?"
        )
    return Word2KetXS(tuple(leaves), vocabulary, dimension)


def _find(tensors: Mapping[str, np.ndarray], name: str | None) -> str:
    """Return the key of the leaves."""
    if name is not None:
        wanted = [name, f"{name}.{LEAVES}"]
        found = [key for key in wanted if key in tensors and key.split(".")[-1] == LEAVES]
    else:
        found = [key for key in tensors if key.split(".")[-1] == LEAVES]
    if len(found) != 1:
        have = found or sorted(tensors)[:5]
        asked = "no name" if name is None else f"name={name!r}"
        raise ModelError(
            f"word2ket: {asked} and {len(found)} tensors called {LEAVES!r}; the state dict has "
            f"{have}; name the module of one"
        )
    return found[0]
