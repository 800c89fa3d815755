"""How long each kernel of a bucket takes, inside compiled code and on random data."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING, Any

import numpy as np
import tvm

from tvmstruct.layers import Attention, Embedding, HashTables, Node, weights_of

if TYPE_CHECKING:
    from tvmstruct.model import Bucket
    from tvmstruct.passes.emit_kernels import KernelCall

REPEATS = 5  # medians over so many timings, each of at least MIN_MS
MIN_MS = 2
IDS = 1 << 15  # ids up to here; beyond its table's end an id reads the last row
WORD = 0x3F803F80  # packed weights: twice 1 in bfloat16, or four bytes


def measure_layers(bucket: Bucket) -> dict[str, float]:
    """Return the median seconds of each layer's kernel; merged layers share by multiply-adds."""
    assert bucket.lowered is not None
    times: Counter[str] = Counter()
    cache: dict[tuple[Any, ...], float] = {}
    attentions = 0
    for call in bucket.lowered.calls:
        key = (call.symbol, call.shapes)
        if key not in cache:
            cache[key] = _seconds(bucket, call)
        if isinstance(call.node, Attention):
            times[f"attention.{attentions}"] = cache[key]
            attentions += 1
        if isinstance(call.node, HashTables):
            times[call.node.names[0]] += cache[key]
        if isinstance(call.node, Embedding):
            times[call.node.record] += cache[key]
        for name, share in _shares(call.node).items():
            times[name] += cache[key] * share
    return dict(times)


def _seconds(bucket: Bucket, call: KernelCall) -> float:
    rng = np.random.default_rng(0)
    arrays = [
        tvm.runtime.tensor(random_array(rng, *a))
        for a in zip(call.shapes, call.dtypes, strict=True)
    ]
    if isinstance(call.node, HashTables):  # codes of all kinds, not those of positive features
        arrays[0] = tvm.runtime.tensor(rng.standard_normal(call.shapes[0], np.float32))
    library = next(lib for lib in bucket.libraries if lib.implements_function(call.symbol))
    evaluate = library.time_evaluator(
        call.symbol, tvm.cpu(), number=1, repeat=REPEATS, min_repeat_ms=MIN_MS
    )
    return float(evaluate(*arrays).median)


def random_array(rng: np.random.Generator, shape: tuple[int, ...], dtype: str) -> np.ndarray:
    """Return data for timing: uniform floats, ids, and packed words without denormal numbers."""
    if dtype == "float32":
        return rng.random(shape, np.float32)
    if dtype == "int64":
        return rng.integers(0, IDS, shape)
    return np.full(shape, WORD, dtype)  # random bits would hold denormal numbers and NaN


def _shares(node: Node) -> dict[str, float]:
    """Return which part of a kernel's time belongs to which layer."""
    parts = weights_of(node)
    total = sum(part.op.macs for part in parts) or 1
    return {part.names[0]: part.op.macs / total for part in parts}
