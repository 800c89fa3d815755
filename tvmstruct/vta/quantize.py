"""Symmetric int8 quantisation of layers, with every rescaling a right shift.

With ``scales="channel"`` each output channel has its own weight scale and its own shift. The
step from int32 sums to int8 must multiply by ``x_scale * w_scale / y_scale``, for which VTA has
only shifts, so ``w_scale`` is chosen as ``y_scale / x_scale * 2**-shift``: the largest shift
whose scale still holds the weights. Where the CPU reads the result it multiplies by a float for
each channel anyway, so there the shift may also be rounded up and ``y_scale`` follow it, which
ever costs less resolution: never more than half a bit. Between factors all channels share one
scale. On VTA the shifts are one vector of SHR by register, all of them non-negative.

With ``scales="tensor"`` input, weights and output have one power of two each and the shift is
one number, the immediate of SHR: integers only, and coarser.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from tvmstruct import ops
from tvmstruct.errors import InputError
from tvmstruct.ops import Array
from tvmstruct.vta.integer import (
    LARGEST,
    MOST_SHIFT,
    IntLinear,
    Program,
    Reorder,
    Step,
    factors,
    terms,
)

METHODS = ("mse", "minmax", "percentile")
SCALES = ("channel", "tensor")
RATIOS = np.geomspace(0.35, 1.0, 16)  # clipping points that "mse" tries, of the largest value
VALUES = 1 << 15  # values that one tensor's clipping point is chosen on
SIGMAS = 4.0  # a channel's range is never less than so many times its root mean square
LARGEST_BIAS = 1 << 30
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
class Quantised:
    """A layer as integer programs whose results are added, and what that loses on the samples.

    A sum of operators is several programs, added in float on the CPU, which then also adds
    ``bias`` and applies ``relu``; anything else is one program with both inside.
    """

    programs: tuple[Program, ...]
    bias: Array | None  # (n_out,) float32, and
    relu: bool  # still to do after the sum
    error: float  # relative, of the samples' results (Frobenius)

    def __call__(self, x: Array) -> Array:
        """Return float32 rows for float32 rows."""
        return self.finish([program(x) for program in self.programs])

    def finish(self, results: Sequence[Array]) -> Array:
        """Return the layer's result for those of its programs, in float32."""
        total = sum(results[1:], results[0])
        if self.bias is not None:
            total = total + self.bias
        return np.maximum(total, 0) if self.relu else total


def quantise_layer(
    op: ops.Op,
    bias: Array | None,
    x: Array,
    options: Options | None = None,
    *,
    relu: bool = False,
    uniform: bool = False,
    x_scale: float | None = None,
) -> Quantised:
    """Return ``relu(x @ op + bias)`` in int8 with scales for inputs like ``x`` (rows, n_in).

    ``uniform`` asks for one scale of all outputs, which the next layer reads as int8; ``x_scale``
    is that of inputs which are int8 already.

    Raises ValueError where the operator has no int8 form.
    """
    options = options or Options()
    x = x.astype(np.float64)
    wide = ops.cast(op, np.float64)
    added = terms(wide)
    one = len(added) == 1
    b = np.zeros(op.n_out) if bias is None else np.asarray(bias, np.float64)
    if x_scale is None:
        x_scale = _scale(float(_range(x, options)), options)
    inside = b if one else np.zeros_like(b)
    programs = tuple(
        _program(term, inside, x, x_scale, options, relu and one, uniform and one) for term in added
    )
    after = None if one or bias is None else b.astype(np.float32)
    found = Quantised(programs, after, relu and not one, 0.0)
    want = wide.apply(x) + b
    want = np.maximum(want, 0) if relu else want
    norm = float(np.linalg.norm(want))
    error = float(np.linalg.norm(found(x.astype(np.float32)) - want)) / norm if norm else 0.0
    return replace(found, error=error)


def quantise_chain(
    layers: Sequence[tuple[ops.Op, Array | None, bool]], x: Array, options: Options | None = None
) -> Program:
    """Return layers ``(op, bias, relu)``, one reading the other's int8 rows, as one program.

    Raises ValueError where a layer has no int8 form, or is a sum, which the CPU adds.
    """
    steps: list[Step] = []
    first: float | None = None
    scale: float | None = None
    y_scale = np.ones(0, np.float32)
    h = x.astype(np.float64)
    for i, (op, bias, relu) in enumerate(layers):
        if len(terms(op)) > 1:
            raise ValueError("a sum of operators is added on the CPU")
        last = i == len(layers) - 1
        made = quantise_layer(
            op, bias, h, options, relu=relu, uniform=not last, x_scale=scale
        ).programs[0]
        first = made.x_scale if first is None else first
        steps += made.steps
        y_scale, scale = made.y_scale, float(made.y_scale[0])
        h = ops.cast(op, np.float64).apply(h) + (0 if bias is None else bias)
        h = np.maximum(h, 0) if relu else h
    assert first is not None
    return Program(first, tuple(steps), y_scale)


def _program(
    op: ops.Op,
    bias: Array,
    x: Array,
    x_scale: float,
    options: Options,
    relu: bool,
    uniform: bool,
) -> Program:
    """Return a product, factor by factor; the last linear factor takes bias and ReLU."""
    parts = factors(op)
    ends = [i for i, part in enumerate(parts) if not isinstance(part, Reorder)]
    if not ends:  # nothing but moved features: a product with the identity gives VTA the bias
        side = np.eye(op.n_out)
        parts, ends = [*parts, ops.Dense(side)], [len(parts)]
    steps: list[Step] = []
    scale, h = x_scale, x
    after = parts[ends[-1] + 1 :]
    order = _moved(after, parts[ends[-1]].n_out)
    y_scale = np.full(op.n_out, scale, np.float32)
    for i, part in enumerate(parts):
        if isinstance(part, Reorder):
            steps.append(part)
            h = part.run(h)
            continue
        last = i == ends[-1]
        b = _unmoved(bias, order, part.n_out) if last else np.zeros(part.n_out)
        h = part.apply(h) + b
        h = np.maximum(h, 0) if last and relu else h
        step, scales = _linear(part, b, h, scale, options, last and not uniform)
        steps.append(replace(step, relu=last and relu))
        scale, y_scale = float(scales[0]), scales
    return Program(x_scale, tuple(steps), Reorder(order).run(y_scale[None])[0])


def _linear(
    op: ops.Op, bias: Array, y: Array, x_scale: float, options: Options, free: bool
) -> tuple[IntLinear, Array]:
    """Return one factor in int8 and the scales of its outputs.

    ``y`` (rows, n_out) are results that its outputs must hold; ``free`` says that outputs may
    have a scale for each channel.
    """
    if isinstance(op, ops.Dense | ops.BlockDiag | ops.SharedBlockDiag):
        w = op.w
    else:
        raise ValueError(f"{type(op).__name__} has no int8 form")
    grouped = y.reshape(-1, *_channels(op))  # rows (and shared blocks), then weight channels
    least = np.abs(w).max(axis=-2) / LARGEST
    if options.scales == "tensor":
        w_scale, shift, y_scale = _tensor_scales(least, grouped, x_scale, options)
    else:
        w_scale, shift, y_scale = _channel_scales(least, grouped, x_scale, options, free)
    q = np.rint(w / w_scale[..., None, :]).clip(-LARGEST, LARGEST).astype(np.int8)
    repeat = op.n_out // shift.size
    shift = np.tile(shift.reshape(-1), repeat)
    units = np.tile(w_scale.reshape(-1), repeat) * x_scale
    b = np.rint(bias / units) + np.where(shift > 0, 1 << np.maximum(shift - 1, 0), 0)
    b = b.clip(-LARGEST_BIAS, LARGEST_BIAS).astype(np.int32)
    scales = np.tile(y_scale.reshape(-1), repeat).astype(np.float32)
    return IntLinear(replace(op, w=q), b, shift.astype(np.int32)), scales


def _channels(op: ops.Dense | ops.BlockDiag | ops.SharedBlockDiag) -> tuple[int, ...]:
    """Return the shape of what has a weight scale of its own: columns of every stored block."""
    return (op.w.shape[0], op.w.shape[2]) if isinstance(op, ops.BlockDiag) else op.w.shape[1:]


def _channel_scales(
    least: Array, y: Array, x_scale: float, options: Options, free: bool
) -> tuple[Array, Array, Array]:
    """Return weight scale, shift and output scale of every channel; ``least`` fits the weights."""
    least = np.maximum(least, TINY)
    if free:
        spread = _channel_range(y, options)
        y_scale = np.maximum(spread, 1e-3 * spread.max(initial=TINY)) / LARGEST
    else:
        y_scale = np.full(least.shape, max(float(_range(y, options)), TINY) / LARGEST)
    want = np.maximum(y_scale / x_scale, least if free else least.max())
    exact = np.log2(want / least).clip(0, MOST_SHIFT)
    shift = np.floor(exact)
    up = free & (exact - shift > 0.5) & (shift < MOST_SHIFT)
    shift = np.where(up, shift + 1, shift)
    w_scale = np.where(up, least, want * 2.0**-shift)
    return w_scale, shift.astype(np.int64), x_scale * w_scale * 2.0**shift


def _tensor_scales(
    least: Array, y: Array, x_scale: float, options: Options
) -> tuple[Array, Array, Array]:
    """Return one power of two for all weights, one shift, and the output scale they make."""
    w_scale = 2.0 ** np.ceil(np.log2(max(float(least.max()), TINY)))
    y_scale = _scale(float(_range(y, options)), options)
    shift = np.clip(np.round(np.log2(y_scale / (x_scale * w_scale))), 0, MOST_SHIFT)
    full = np.full(least.shape, 1.0)
    return full * w_scale, np.full(least.shape, int(shift)), full * x_scale * w_scale * 2.0**shift


def _scale(limit: float, options: Options) -> float:
    """Return the scale that makes ``limit`` 127, or the next power of two."""
    scale = max(limit, TINY) / LARGEST
    return float(2.0 ** np.ceil(np.log2(scale))) if options.scales == "tensor" else scale


def _range(values: Array, options: Options) -> Array:
    """Return the value of one tensor that becomes 127."""
    flat = values.reshape(-1, 1)
    step = -(-flat.size // VALUES)
    top = np.abs(flat).max(initial=0.0)
    chosen = _clipping(flat[::step], options, np.array([top]))
    return chosen[0]


def _channel_range(values: Array, options: Options) -> Array:
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


def _moved(after: Sequence[ops.Op | Reorder], n: int) -> Array:
    """Return where the features come from after the reorderings that end a product."""
    index = np.arange(n)
    for part in after:
        assert isinstance(part, Reorder)
        index = np.where(part.index < 0, -1, index[part.index])
    return index


def _unmoved(bias: Array, order: Array, n: int) -> Array:
    """Return the bias in front of the reorderings that end a product."""
    kept = order >= 0
    if bias[~kept].any() or np.unique(order[kept]).size < kept.sum():
        raise ValueError("a bias on padded or repeated features has no place in the last factor")
    before = np.zeros(n)
    before[order[kept]] = bias[kept]
    return before
