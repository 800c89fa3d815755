"""Which value becomes 127: ranges of activations, and how the CPU scales what a launch reads.

The CPU multiplies the rows that a launch reads by a float for each feature anyway. A feature with
outliers gets a larger scale, which the rows of the weight take up (Xiao et al., SmoothQuant 2023,
eq. 4: ``max|x|**a / max|w|**(1 - a)``); whether, and where to clip, is decided by what the layer
then yields on the samples.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np

from tvmstruct import ops
from tvmstruct.errors import InputError
from tvmstruct.ops import Array
from tvmstruct.vta.integer import LARGEST

METHODS = ("mse", "minmax", "percentile")
SCALES = ("channel", "tensor")
RATIOS = np.geomspace(0.35, 1.0, 16)  # clipping points that "mse" tries, of the largest value
VALUES = 1 << 15  # values that one tensor's clipping point is chosen on
SIGMAS = 4.0  # a channel's range is never less than so many times its root mean square
STRENGTHS = (0.0, 0.5, 0.75)  # exponents of the smoothing that are tried
CLIPS = (1.0, 0.85, 0.7, 0.55)  # clipping points of the input that "mse" tries with them
PROBES = 128  # samples that decide
TINY = 1e-30


@dataclass(frozen=True)
class Options:
    """How scales are chosen.

    ``method`` says which value becomes 127: "mse" the one with the least mean square error,
    "minmax" the largest seen, "percentile" the one that ``percentile`` % of values stay under.
    """

    method: str = "mse"
    scales: str = "channel"
    percentile: float = 99.99

    def __post_init__(self) -> None:
        for name, value, known in (
            ("method", self.method, METHODS),
            ("scales", self.scales, SCALES),
        ):
            if value not in known:
                raise InputError(
                    f"calibration: {name}={value!r} is unknown; known: {', '.join(known)}"
                )
        if not 50 < self.percentile <= 100:
            raise InputError(f"calibration: percentile={self.percentile}; want 50 to 100")


@dataclass(frozen=True, eq=False)
class Input:
    """How a layer reads int8: ``x = scale * channels * q``, and the operator on x / channels."""

    scale: float
    channels: Array  # (1,) or (n_in,)
    op: ops.Op


def choose_input(op: ops.Op, x: Array, options: Options) -> Input:
    """Return the scales of ``x`` (rows, n_in) that change ``x @ op`` least."""
    tried = list(_candidates(op, x, options))
    if len(tried) == 1:
        return tried[0]
    step = -(-len(x) // PROBES)
    some = x[::step].astype(np.float32)
    want = ops.cast(op, np.float32).apply(some)
    return min(tried, key=lambda given: float(np.linalg.norm(_result(given, some) - want)))


def _candidates(op: ops.Op, x: Array, options: Options) -> Iterator[Input]:
    first = op.factors[0] if isinstance(op, ops.Product) else op
    smooth = options.scales == "channel" and isinstance(first, ops.Dense | ops.BlockDiag)
    for strength in STRENGTHS if smooth else STRENGTHS[:1]:
        channels, scaled = _smoothed(op, x, strength) if strength else (np.ones(1), op)
        if options.method == "mse":
            top = float(np.abs(x / channels).max(initial=0.0))
            limits = [top * clip for clip in CLIPS]
        else:
            limits = [float(range_of(x / channels, options))]
        for limit in limits:
            yield Input(scale_of(limit, options), channels, scaled)


def _smoothed(op: ops.Op, x: Array, strength: float) -> tuple[Array, ops.Op]:
    """Return divisors of the features of x, and the operator that reads the quotients."""
    first, *rest = op.factors if isinstance(op, ops.Product) else (op,)
    assert isinstance(first, ops.Dense | ops.BlockDiag)
    w = first.w
    largest = np.abs(w).max(axis=-1)  # of each row, by block
    channels = np.abs(x).max(axis=0).reshape(largest.shape) ** strength
    channels = channels / np.maximum(largest, TINY) ** (1 - strength)
    alive = (channels > 0) & (largest > 0)
    mean = np.exp(
        np.log(channels, where=alive, out=np.zeros_like(channels)).sum() / max(alive.sum(), 1)
    )
    channels = np.where(alive, channels / mean, 1.0).clip(1e-3, 1e3)
    scaled = replace(first, w=w * channels[..., None])
    return channels.reshape(-1), ops.product(scaled, *rest)


def _result(given: Input, x: Array) -> Array:
    """Return what a layer yields with int8 inputs and int8 columns in its weights."""
    scale = (given.scale * given.channels).astype(np.float32)
    q = np.rint(x / scale).clip(-LARGEST, LARGEST) * np.float32(given.scale)
    return ops.map_arrays(given.op, _rounded).apply(q)


def _rounded(w: Array) -> Array:
    w = w.astype(np.float32)
    if w.ndim < 2:
        return w
    scale = np.maximum(np.abs(w).max(axis=-2, keepdims=True), TINY) / LARGEST
    return np.rint(w / scale) * scale


def scale_of(limit: float, options: Options) -> float:
    """Return the scale that makes ``limit`` 127, or the next power of two."""
    scale = max(limit, TINY) / LARGEST
    return float(2.0 ** np.ceil(np.log2(scale))) if options.scales == "tensor" else scale


def range_of(values: Array, options: Options) -> Array:
    """Return the value of one tensor that becomes 127."""
    flat = values.reshape(-1, 1)
    step = -(-flat.size // VALUES)
    top = np.abs(flat).max(initial=0.0)
    chosen = _clipping(flat[::step], options, np.array([top]))
    return chosen[0]


def channel_range_of(values: Array, options: Options) -> Array:
    """Return the value of every channel (all axes but the first) that becomes 127."""
    flat = values.reshape(len(values), -1)
    floor = SIGMAS * np.sqrt((flat**2).mean(axis=0))
    found = _clipping(flat, options, np.abs(flat).max(axis=0, initial=0.0))
    return np.maximum(found, floor).reshape(values.shape[1:])


def _clipping(values: Array, options: Options, top: Array) -> Array:
    """Return where to clip each column of ``values`` (rows, n), whose largest are ``top``."""
    if options.method == "minmax":
        return top
    if options.method == "percentile":
        return np.percentile(np.abs(values), options.percentile, axis=0)
    best, least = top, np.full(top.shape, np.inf)
    for ratio in RATIOS:
        scale = np.maximum(top * ratio, TINY) / LARGEST
        rounded = np.rint(values / scale).clip(-LARGEST, LARGEST) * scale
        error = ((rounded - values) ** 2).mean(axis=0)
        best, least = np.where(error < least, top * ratio, best), np.minimum(error, least)
    return best
