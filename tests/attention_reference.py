"""Attention in float64 numpy, and the row buffers that kernels take."""

import numpy as np


def reference(q, k, v, scale, mask=0.0, causal=False):
    """Return (batch, heads, length, dim) attention; rows of -inf alone give zeros."""
    q, k, v = (x.astype("float64") for x in (q, k, v))
    scores = (q @ k.swapaxes(-1, -2) * scale).astype("float32") + np.float32(mask)
    if causal:
        later = np.arange(k.shape[2]) > np.arange(q.shape[2])[:, None]
        scores = np.where(later, -np.inf, scores)
    top = scores.max(-1, keepdims=True)
    weights = np.exp(scores.astype("float64") - np.where(np.isneginf(top), 0, top))
    total = weights.sum(-1, keepdims=True)
    return np.where(total == 0, 0, weights / np.where(total == 0, 1, total)) @ v


def as_rows(x):
    """(batch, heads, length, dim) -> (batch * length, heads * dim)."""
    batch, heads, length, dim = x.shape
    return np.ascontiguousarray(x.transpose(0, 2, 1, 3).reshape(batch * length, heads * dim))


def random_heads(*shapes, seed=0):
    rng = np.random.default_rng(seed)
    return [rng.standard_normal(shape, "float32") for shape in shapes]
