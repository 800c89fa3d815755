"""Recurrent layers in Relax: products with the input as plain operators, one call for the rest.

``z = x @ input + bias`` of all time steps is one dense or structured layer like any other. What
depends on the step before is a call of the external symbol ``tvmstruct.recurrence <json>``, whose
text says what the cells do and how their hidden operators are made of the arrays that follow; the
pass `recognize_recurrence` reads it. The function of that symbol is ours alone: TVM by itself
cannot run it.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
from tvm import relax

from tvmstruct import compat, ops
from tvmstruct.errors import ModelError
from tvmstruct.frontends.lookup import emit_operator
from tvmstruct.op_text import from_json, to_json
from tvmstruct.ops import Array, Op
from tvmstruct.recurrent import Activation, Cell, Recurrent

R = relax.op
SYMBOL = "tvmstruct.recurrence "
PROJECTED = "projection.weight"
Constant = Callable[[np.ndarray, str, int], relax.Expr]  # array, which part, direction


def plain_constant(array: np.ndarray, part: str, direction: int) -> relax.Expr:
    """Return an array as a constant without a name."""
    del part, direction
    return relax.const(np.ascontiguousarray(array))


@dataclass(frozen=True)
class Recurrence:
    """What a call computes: cells side by side, one for each direction.

    Arguments are lengths (b,) int32 where there are any, h (d * b, h), c (d * b, h) for ``lstm``,
    then of each cell z (s * b, gates * h), the arrays of its hidden operator, hidden bias and
    peepholes as far as it has them. Results are y (s * b, d * h), h and, for ``lstm``, c. Hidden
    operators that are ``projected`` are products of two weights and bear the names of both.
    """

    cells: tuple[Cell, ...]
    hidden: tuple[object, ...]  # JSON of the hidden operators
    arrays: tuple[int, ...]  # of each of them
    biases: tuple[bool, ...]
    peepholes: tuple[bool, ...]
    steps: int
    batch: int
    h: int
    lengths: bool
    projected: bool = False

    @property
    def lstm(self) -> bool:
        """Whether there is a cell state."""
        return self.cells[0].kind == "lstm"

    @property
    def symbol(self) -> str:
        """The name of the function that is called."""
        return SYMBOL + json.dumps(asdict(self), separators=(",", ":"))

    @classmethod
    def read(cls, symbol: str) -> Recurrence:
        """Return what a symbol says; ModelError where it is damaged."""
        try:
            text = json.loads(symbol[len(SYMBOL) :])
            cells = tuple(
                Cell(**(c | {"activations": tuple(_activation(a) for a in c["activations"])}))
                for c in text["cells"]
            )
            lists = {k: tuple(text[k]) for k in ("hidden", "arrays", "biases", "peepholes")}
            numbers = {k: int(text[k]) for k in ("steps", "batch", "h")}
            flags = {k: bool(text[k]) for k in ("lengths", "projected")}
            return cls(cells, **lists, **numbers, **flags)
        except (ValueError, TypeError, KeyError) as error:
            raise ModelError(f"recurrent layer {symbol[:200]!r} cannot be read: {error}") from error


def _activation(text: dict[str, Any]) -> Activation:
    return Activation(text["name"], tuple(text["parameters"]))


def emit_recurrent(
    bb: relax.BlockBuilder,
    x: relax.Expr,
    layers: Sequence[Recurrent],
    h: relax.Expr | None = None,
    c: relax.Expr | None = None,
    lengths: relax.Expr | None = None,
    constant: Constant = plain_constant,
) -> tuple[relax.Expr, relax.Expr, relax.Expr | None]:
    """Return y (s, b, d * h), the last h (d, b, h) and c (d, b, h) of x (s, b, n_in).

    ``layers`` are one or two directions d of one size and kind; h and c (d, b, h) are zeros where
    they are not given, ``lengths`` (b,) int32 must lie between 0 and s (the caller sees to it).
    ``constant(array, part, direction)`` makes the weights; parts are "input.weight",
    "input.bias", "hidden.weight", "hidden.bias", "peepholes" and "projection.weight". Layers with
    projections yield and take h of their ``n_out``, all steps taken.
    """
    if layers[0].projection is not None:
        assert lengths is None
        return _emit_projected(bb, x, layers, h, c, constant)
    return _emit_cells(bb, x, layers, h, c, lengths, constant)


def _emit_projected(
    bb: relax.BlockBuilder,
    x: relax.Expr,
    layers: Sequence[Recurrent],
    h: relax.Expr | None,
    c: relax.Expr | None,
    constant: Constant,
) -> tuple[relax.Expr, relax.Expr, relax.Expr | None]:
    """Return what layers with projections yield.

    The cells keep what is not projected yet, r: the hidden matrix is the product of projection
    and ``hidden``, and all r of a sequence are projected together. The first h was projected
    before, so its share of the gates is added to those of the input.
    """
    projections = [layer.projection for layer in layers if layer.projection is not None]
    assert len(projections) == len(layers)
    cells = [
        replace(layer, hidden=ops.product(p, layer.hidden), projection=None)
        for layer, p in zip(layers, projections, strict=True)
    ]
    counts = [len(list(p.arrays())) for p in projections]

    def named(array: np.ndarray, part: str, direction: int) -> relax.Expr:
        """Tell the arrays of the two factors apart."""
        if part.startswith("hidden.weight"):
            number = int(part.removeprefix("hidden.weight").lstrip(".") or 0)
            rest = number - counts[direction]
            part = _numbered("hidden.weight", rest) if rest >= 0 else _numbered(PROJECTED, number)
        return constant(array, part, direction)

    def apply(op: Op, value: relax.Expr, name: str, k: int) -> relax.Expr:
        return emit_operator(bb, value, op, lambda array, part: constant(array, part, k), name)

    def piece(value: relax.Expr, axis: int, first: int, count: int) -> relax.Expr:
        return bb.emit(R.strided_slice(value, [axis], [first], [first + count]))

    shares = []
    if h is not None:
        shape = compat.static_shape(h)
        assert shape is not None
        for k, layer in enumerate(layers):
            own = bb.emit(R.reshape(piece(h, 0, k, 1), shape[1:]))
            shares.append(apply(layer.hidden, own, "hidden.weight", k))
    y, last, memory = _emit_cells(bb, x, cells, None, c, None, named, projected=True, shares=shares)
    size, parts, ends = cells[0].h, [], []
    for k, op in enumerate(projections):
        parts.append(apply(op, piece(y, 2, k * size, size), PROJECTED, k))
        ends.append(apply(op, piece(last, 0, k, 1), PROJECTED, k))
    if len(layers) == 1:
        return parts[0], ends[0], memory
    return bb.emit(R.concat(parts, 2)), bb.emit(R.concat(ends, 0)), memory


def _numbered(name: str, number: int) -> str:
    return f"{name}.{number}" if number else name


def _with_share(
    bb: relax.BlockBuilder, z: relax.Expr, share: relax.Expr, *, reverse: bool
) -> relax.Expr:
    """Return z (s b, gates h) with (b, gates h) added in the step that is taken first."""
    shape, own = compat.static_shape(z), compat.static_shape(share)
    assert shape is not None
    assert own is not None
    rest = relax.const(np.zeros((shape[0] - own[0], own[1]), np.float32))
    whole = [rest, share] if reverse else [share, rest]
    return bb.emit(R.add(z, bb.emit(R.concat(whole, 0)) if shape[0] > own[0] else share))


def _emit_cells(
    bb: relax.BlockBuilder,
    x: relax.Expr,
    layers: Sequence[Recurrent],
    h: relax.Expr | None,
    c: relax.Expr | None,
    lengths: relax.Expr | None,
    constant: Constant,
    *,
    projected: bool = False,
    shares: Sequence[relax.Expr] = (),
) -> tuple[relax.Expr, relax.Expr, relax.Expr | None]:
    """Return what layers without projections yield; ``shares`` (b, gates h) meet the first z."""
    shape = compat.static_shape(x)
    assert shape is not None
    assert len(shape) == 3
    steps, batch, features = shape
    first = layers[0]
    same = all(layer.h == first.h and layer.cell.kind == first.cell.kind for layer in layers)
    if not 1 <= len(layers) <= 2 or not same:
        raise ModelError("recurrent layer: want one or two directions of one kind and hidden size")
    d, size, emit = len(layers), first.h, bb.emit
    rows = emit(R.reshape(x, (steps * batch, features)))
    texts, counts, own = [], [], list[relax.Expr]()
    for k, layer in enumerate(layers):

        def weight(array: np.ndarray, name: str, k: int = k) -> relax.Expr:
            return constant(array, name, k)

        z = emit_operator(bb, rows, layer.input, weight, "input.weight")
        if layer.bias is not None:
            z = emit(R.add(z, constant(_f32(layer.bias), "input.bias", k)))
        if shares:
            z = _with_share(bb, z, shares[k], reverse=layer.cell.reverse)
        own.append(z)
        text, arrays = to_json(layer.hidden)
        texts.append(text)
        counts.append(len(arrays))
        for i, array in enumerate(arrays):
            own.append(constant(_f32(array), _numbered("hidden.weight", i), k))
        if layer.hidden_bias is not None:
            own.append(constant(_f32(layer.hidden_bias), "hidden.bias", k))
        if layer.peepholes is not None:
            own.append(constant(_f32(layer.peepholes), "peepholes", k))
    call = Recurrence(
        tuple(layer.cell for layer in layers), tuple(texts), tuple(counts),
        tuple(layer.hidden_bias is not None for layer in layers),
        tuple(layer.peepholes is not None for layer in layers),
        steps, batch, size, lengths is not None, projected,
    )  # fmt: skip
    states = [h, c] if call.lstm else [h]
    args = ([] if lengths is None else [lengths]) + [
        relax.const(np.zeros((d * batch, size), np.float32))
        if state is None
        else emit(R.reshape(state, (d * batch, size)))
        for state in states
    ]
    state = compat.tensor_type((d * batch, size), "float32")
    y = compat.tensor_type((steps * batch, d * size), "float32")
    result = emit(relax.call_dps_packed(call.symbol, [*args, *own], [y, *[state] * len(states)]))
    out = [emit(relax.TupleGetItem(result, i)) for i in range(1 + len(states))]
    last = [emit(R.reshape(s, (d, batch, size))) for s in out[1:]]
    y = emit(R.reshape(out[0], (steps, batch, d * size)))
    return y, last[0], last[1] if call.lstm else None


def read_hidden(call: Recurrence, direction: int, arrays: Sequence[Array]) -> Op:
    """Return the hidden operator of a direction from its arrays."""
    op = from_json(call.hidden[direction], arrays)
    want = (call.h, call.cells[direction].gates * call.h)
    if (op.n_in, op.n_out) != want:
        raise ModelError(f"recurrent layer: hidden operator {op.n_in}x{op.n_out}; want {want}")
    return op


def _f32(array: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(array, np.float32)
