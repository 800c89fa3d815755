"""How evenly threads are busy when pairs of head and chunk cost unequal amounts of time.

NLP-Fast, section III-C, 2: three schedulers that hand pairs out beforehand, and one that gives
the next pair to the thread that is idle.
"""

from __future__ import annotations

import heapq

import numpy as np

SEED = 0  # of the random scheduler


def utilisations(costs: np.ndarray, threads: int) -> dict[str, float]:
    """Return mean busy time over the longest for each scheduler, of (heads, chunks) costs.

    "head-first" gives neighbouring chunks of a head to one thread, "chunk-first" the same chunk of
    neighbouring heads, "random" equally many at random, "dynamic" the next to the idle thread.
    """
    by_head, by_chunk = costs.ravel(), costs.T.ravel()
    shuffled = np.random.default_rng(SEED).permutation(by_head)
    return {
        "head-first": _static(by_head, threads),
        "chunk-first": _static(by_chunk, threads),
        "random": _static(shuffled, threads),
        "dynamic": _dynamic(by_head, threads),
    }


def _static(costs: np.ndarray, threads: int) -> float:
    """Give every thread equally many neighbours."""
    return _share([float(part.sum()) for part in np.array_split(costs, threads)])


def _dynamic(costs: np.ndarray, threads: int) -> float:
    """Give every pair, in order, to the thread that is idle first."""
    busy = [0.0] * threads
    for cost in costs:
        heapq.heapreplace(busy, busy[0] + float(cost))
    return _share(busy)


def _share(busy: list[float]) -> float:
    longest = max(busy)
    return min(1.0, sum(busy) / len(busy) / longest) if longest else 1.0
