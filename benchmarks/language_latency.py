"""Time per word of compiled language models, in turns, on one thread."""

from __future__ import annotations

import statistics
import time
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch

import tvmstruct
from tvmstruct.training import LanguageModel, export

LENGTHS = (1, 100)  # words of a call; batch 1
ROUNDS = 200


def _feed(model: LanguageModel, ids: torch.Tensor) -> dict[str, np.ndarray]:
    """Return one stream with a state of zeros: a model's inputs."""
    shape = (model.recurrent.num_layers, 1, model.recurrent.hidden_size)
    state = {name: np.zeros(shape, np.float32) for name in ("h", "c")}
    return {"ids": ids.reshape(-1, 1).numpy(), **state}


def measure(models: Mapping[str, LanguageModel], ids: torch.Tensor) -> dict[str, dict[str, Any]]:
    """Return, for each model, microseconds a word at `LENGTHS` and the distance to PyTorch.

    Medians of `ROUNDS` rounds in which every model is called once, one after the other.
    """
    feeds = {n: {k: _feed(m, ids[:k]) for k in LENGTHS} for n, m in models.items()}
    compiled = {}
    for name, model in models.items():
        compiled[name] = tvmstruct.compile(export(model), threads=1, buckets="exact")
    times = {(name, length): list[float]() for name in models for length in LENGTHS}
    for _ in range(ROUNDS):
        for (name, length), seconds in times.items():
            model, feed = compiled[name], feeds[name][length]
            model(**feed)
            start = time.perf_counter()
            model(**feed)
            seconds.append(time.perf_counter() - start)
    found: dict[str, dict[str, Any]] = {}
    for name, model in models.items():
        micro = {
            str(length): 1e6 * statistics.median(times[name, length]) / length for length in LENGTHS
        }
        error = _error(model, compiled[name], feeds[name][LENGTHS[-1]])
        found[name] = {"microseconds": micro, "error": error}
    return found


@torch.no_grad()
def _error(model: LanguageModel, compiled: Any, feed: dict[str, np.ndarray]) -> float:
    """Return the largest difference of the logits to PyTorch's, over their largest value."""
    want = model(torch.from_numpy(feed["ids"]))[0].numpy()
    return float(np.abs(np.asarray(compiled(**feed)[0]) - want).max() / np.abs(want).max())
