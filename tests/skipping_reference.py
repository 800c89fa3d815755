"""Zero and V-Gen skipping in float64 numpy, chunk of keys after chunk."""

from __future__ import annotations

import numpy as np


def limit(top, skip):
    """Return the score up to which weights are zero."""
    threshold, raw = skip
    far = threshold if raw else top - threshold
    return np.minimum(far, top - np.maximum(abs(top), 1) * 2.0**-22)


def reference(q, k, v, scale, skip, chunk, *, mask=0.0, causal=False, zero_ratio=None):
    """Return attention that drops weights up to the limit, and which values it does not read.

    With a ``zero_ratio`` those are (batch, heads, keys) that are zero for a larger share of the
    queries that see them, or for all; their weights stay in the sum that divides.
    """
    scores = (q @ k.swapaxes(-1, -2) * np.float32(scale)).astype(np.float64) + mask
    queries, keys = scores.shape[2:]
    hidden = np.arange(keys) > np.arange(queries)[:, None] if causal else np.zeros((1, 1), bool)
    scores = np.where(hidden, -np.inf, scores)
    see = np.maximum(queries - np.arange(keys), 0) if causal else np.full(keys, queries)
    top = np.full((*scores.shape[:3], 1), -np.inf)
    total, out, gone = np.zeros_like(top), 0.0, []
    for first in range(0, keys, chunk):
        here = slice(first, first + chunk)
        part = scores[..., here]
        new = np.maximum(top, part.max(-1, keepdims=True))
        finite = np.where(np.isneginf(new), 0, new)
        zero = part <= limit(finite, skip)
        weights = np.where(zero, 0, np.exp(part - finite))
        shrink = np.exp(top - finite)
        needed = (~zero).sum(2)
        idle = needed == 0
        if zero_ratio is not None:
            idle |= see[here] - needed > zero_ratio * see[here]
        gone.append(idle)
        total = total * shrink + weights.sum(-1, keepdims=True)
        read = np.where(idle[:, :, None], 0, weights)
        out = out * shrink + read @ v[..., here, :].astype(np.float64)
        top = new
    return out / np.where(total == 0, 1, total), np.concatenate(gone, -1)
