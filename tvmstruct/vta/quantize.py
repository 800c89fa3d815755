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
from tvmstruct.vta.scales import TINY, Options, channel_range_of, choose_input, range_of, scale_of

LARGEST_BIAS = 1 << 30


class NoIntegerForm(ValueError):
    """Layer ``index`` of a chain has no int8 form."""

    def __init__(self, why: str, index: int) -> None:
        super().__init__(why)
        self.index = index


@dataclass(frozen=True, eq=False)
class FloatLayer:
    """``y = relu(x @ op + bias)``, what is to be quantised."""

    op: ops.Op
    bias: Array | None = None
    relu: bool = False

    def __call__(self, x: Array) -> Array:
        """Return rows for rows, in the precision of ``x`` or better."""
        y = self.op.apply(x)
        y = y if self.bias is None else y + self.bias
        return np.maximum(y, 0) if self.relu else y


@dataclass(frozen=True, eq=False)
class Quantised:
    """Layers as integer programs whose results are added, and what that loses on the samples.

    A sum of operators is several programs, added in float on the CPU, which then also adds
    ``bias`` and applies ``relu``; anything else is one program with both inside.
    """

    programs: tuple[Program, ...]
    bias: Array | None  # (n_out,) float32, and
    relu: bool  # still to do after the sum
    errors: tuple[float, ...]  # relative (Frobenius), of the samples' results after each layer
    ends: tuple[int, ...]  # where each layer's steps end, in the one program of a chain

    def __call__(self, x: Array) -> Array:
        """Return float32 rows for float32 rows."""
        total = sum((program(x) for program in self.programs[1:]), self.programs[0](x))
        if self.bias is not None:
            total = total + self.bias
        return np.maximum(total, 0) if self.relu else total

    @property
    def error(self) -> float:
        """The error after the last layer."""
        return self.errors[-1]


def quantise(layers: Sequence[FloatLayer], x: Array, options: Options | None = None) -> Quantised:
    """Return layers in int8, one reading the other's, with scales for inputs like ``x``.

    ``x`` is (rows, n_in) of the first.

    Raises NoIntegerForm where a layer has none, or is a sum, which the CPU adds, in a chain.
    """
    options = options or Options()
    h = x.astype(np.float64)
    if len(layers) == 1 and len(terms(layers[0].op)) > 1:
        return _sum(layers[0], h, options)
    for i, layer in enumerate(layers):
        if len(terms(layer.op)) > 1:
            raise NoIntegerForm("a sum of operators is added on the CPU", i)
    steps: list[Step] = []
    errors: list[float] = []
    ends: list[int] = []
    given = choose_input(ops.cast(layers[0].op, np.float64), h, options)
    x_scale = given.scale * given.channels
    q = Program(x_scale, (), np.ones(0)).quantise(x)
    y_scale, scale = np.ones(0), given.scale
    for layer in layers:
        b = np.zeros(layer.op.n_out) if layer.bias is None else layer.bias
        first, last = layer is layers[0], layer is layers[-1]
        op, read = (given.op, h / given.channels) if first else (layer.op, h)
        try:
            made = _program(op, b, read, scale, options, layer.relu, not last)
        except ValueError as error:
            raise NoIntegerForm(str(error), layers.index(layer)) from error
        h, q = layer(h), made.run(q)
        errors.append(_distance(made.dequantise(q), h))
        steps += made.steps
        ends.append(len(steps))
        y_scale, scale = made.y_scale, float(made.y_scale.max())
    program = Program(x_scale, tuple(steps), y_scale)
    return Quantised((program,), None, False, tuple(errors), tuple(ends))


def _sum(layer: FloatLayer, x: Array, options: Options) -> Quantised:
    """Return a sum of operators as programs; bias and ReLU follow in float."""
    x_scale = scale_of(float(range_of(x, options)), options)
    none = np.zeros(layer.op.n_out)
    try:
        programs = tuple(
            _program(term, none, x, x_scale, options, False, False) for term in terms(layer.op)
        )
    except ValueError as error:
        raise NoIntegerForm(str(error), 0) from error
    bias = None if layer.bias is None else layer.bias.astype(np.float32)
    made = Quantised(programs, bias, layer.relu, (), (max(len(p.steps) for p in programs),))
    return replace(made, errors=(_distance(made(x.astype(np.float32)), layer(x)),))


def _distance(found: Array, want: Array) -> float:
    norm = float(np.linalg.norm(want))
    return float(np.linalg.norm(found - want)) / norm if norm else 0.0


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
    parts = factors(ops.cast(op, np.float64))
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
    return Program(np.full(1, x_scale), tuple(steps), Reorder(order).run(y_scale[None])[0])


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
        spread = channel_range_of(y, options)
        y_scale = np.maximum(spread, 1e-3 * spread.max(initial=TINY)) / LARGEST
    else:
        y_scale = np.full(least.shape, max(float(range_of(y, options)), TINY) / LARGEST)
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
    y_scale = scale_of(float(range_of(y, options)), options)
    shift = np.clip(np.round(np.log2(y_scale / (x_scale * w_scale))), 0, MOST_SHIFT)
    full = np.full(least.shape, 1.0)
    return full * w_scale, np.full(least.shape, int(shift)), full * x_scale * w_scale * 2.0**shift


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
