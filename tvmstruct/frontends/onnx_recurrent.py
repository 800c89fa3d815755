"""ONNX LSTM, GRU and RNN nodes as recurrent layers: gates in our order, one array of each kind.

ONNX stacks the gates of an LSTM as i, o, f, c and those of a GRU as z, r, h, as rows of (out, in)
matrices; ours are i, f, g, o and r, z, n, as columns of (in, out). A weight of one direction keeps
its name, those of two directions are called ``<name>.forward`` and ``<name>.reverse``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
from onnx import AttributeProto, NodeProto, helper

from tvmstruct.errors import ModelError, UnsupportedOperatorError
from tvmstruct.frontends.nodes import describe, text_attribute
from tvmstruct.ops import Array, Dense
from tvmstruct.recurrent import DEFAULTS, GATES, PARAMETERS, Activation, Cell, Recurrent

KINDS = {"LSTM": "lstm", "GRU": "gru", "RNN": "rnn"}
ORDER = {"lstm": (0, 2, 3, 1), "gru": (1, 0, 2), "rnn": (0,)}  # ours, in places of ONNX's
PEEPHOLES = (0, 2, 1)  # i, f, o in places of ONNX's i, o, f
SIDES = {"forward": (False,), "reverse": (True,), "bidirectional": (False, True)}
UNDEFINED = ("affine", "scaledtanh", "thresholdedrelu")  # without parameters
INPUTS = ("X", "W", "R", "B", "sequence_lens", "initial_h", "initial_c", "P")
DYNAMIC = ("X", "sequence_lens", "initial_h", "initial_c")

Shape = tuple[int, ...]


@dataclass(frozen=True, eq=False)
class Layer:
    """What a node computes: its directions, and the tensor that each part of them came from.

    ``names`` maps "input.weight", "input.bias", "hidden.weight", "hidden.bias" and "peepholes" of
    each direction to a name; ``batch_first`` is ONNX's layout 1. ``rounded`` means that x and h
    are rounded to bytes before they meet the matrices.
    """

    directions: tuple[Recurrent, ...]
    names: tuple[Mapping[str, str], ...]
    batch_first: bool
    rounded: bool = False

    @property
    def lstm(self) -> bool:
        """Whether there is a cell state."""
        return self.directions[0].cell.kind == "lstm"


def read_layer(node: NodeProto, array: Callable[[str], Array | None]) -> Layer:
    """Return the layer of an LSTM, GRU or RNN node.

    ``array(name)`` is the value of a constant input, or None where it is computed at run time.
    Raises ModelError for shapes and attributes that do not go together, UnsupportedOperatorError
    for weights that are not constants and for activations that ONNX does not have.
    """
    inputs = dict(zip(INPUTS, [*node.input, *[""] * len(INPUTS)], strict=False))
    weights = {k: _weight(node, k, inputs[k], array) for k in ("W", "R", "B", "P") if inputs[k]}
    for part in ("W", "R"):
        if part not in weights:
            raise ModelError(f"{describe(node)}: its input {part} is missing")
    kind, sides = KINDS[node.op_type], _sides(node)
    _check_shapes(node, weights, len(sides), GATES[kind])
    activations = _activations(node, kind, len(sides))
    directions, names = [], []
    for side, reverse in enumerate(sides):
        cell = Cell(
            kind,
            activations[side],
            clip=_float(node, "clip"),
            reset_after=kind == "gru" and bool(_integer(node, "linear_before_reset", 0)),
            coupled=kind == "lstm" and bool(_integer(node, "input_forget", 0)),
            reverse=reverse,
        )
        directions.append(_direction(cell, {k: a[side] for k, a in weights.items()}))
        suffix = "" if len(sides) == 1 else (".forward", ".reverse")[side]
        names.append(_names(inputs, suffix))
    return Layer(tuple(directions), tuple(names), bool(_integer(node, "layout", 0)))


def _weight(node: NodeProto, part: str, name: str, array: Callable[[str], Array | None]) -> Array:
    value = array(name)
    if value is None:
        raise UnsupportedOperatorError(
            f"{describe(node)}: its {part} {name!r} is computed at run time; only constant weights "
            "can be compiled"
        )
    if value.dtype.name not in ("float32", "float16", "bfloat16"):
        raise UnsupportedOperatorError(
            f"{describe(node)}: {part} {name!r} is {value.dtype.name}; recurrent layers compute in "
            "float32, convert the model to that"
        )
    return value


def _sides(node: NodeProto) -> tuple[bool, ...]:
    """Return whether each direction runs backwards."""
    name = text_attribute(node, "direction", "forward")
    if name not in SIDES:
        raise ModelError(f"{describe(node)}: direction {name!r}; want one of {', '.join(SIDES)}")
    return SIDES[name]


def _check_shapes(node: NodeProto, weights: Mapping[str, Array], sides: int, gates: int) -> None:
    r = weights["R"]
    h = r.shape[2] if r.ndim == 3 else 0
    said = _integer(node, "hidden_size", h)
    n = weights["W"].shape[-1] if weights["W"].ndim else 0
    wanted = {
        "R": (sides, gates * said, said),
        "W": (sides, gates * said, n),
        "B": (sides, 2 * gates * said),
        "P": (sides, 3 * said),
    }
    for part, value in weights.items():
        if value.shape != wanted[part] or 0 in value.shape:
            raise ModelError(
                f"{describe(node)}: {part} has the shape {value.shape}, its attributes "
                f"(hidden_size {said}, {sides} directions) want {wanted[part]}"
            )
    if "P" in weights and node.op_type != "LSTM":
        raise ModelError(f"{describe(node)}: only an LSTM has peepholes")


def _activations(node: NodeProto, kind: str, sides: int) -> list[tuple[Activation, ...]]:
    """Return the activations of each direction; alphas and betas go in order to who takes any."""
    count = len(DEFAULTS[kind])
    names = [_decoded(n).lower() for n in _list(node, "activations")]
    if not names:
        return [()] * sides
    if len(names) != count * sides:
        raise ModelError(
            f"{describe(node)}: {len(names)} activations; want {count} for each of its "
            f"{sides} directions"
        )
    alphas, betas = (iter(_list(node, f"activation_{k}")) for k in ("alpha", "beta"))
    found = []
    for name in names:
        known = PARAMETERS.get(name)
        if known is None:
            raise UnsupportedOperatorError(
                f"{describe(node)}: activation {name!r} is not known; known are "
                f"{', '.join(PARAMETERS)}"
            )
        sources = (alphas, betas)[: len(known)]
        given = tuple(next(source, None) for source in sources)
        if name in UNDEFINED and None in given:
            raise ModelError(
                f"{describe(node)}: {name!r} needs {len(known)} parameters (activation_alpha, "
                "activation_beta); runtimes disagree on what it means without"
            )
        given = tuple(k if g is None else g for g, k in zip(given, known, strict=True))
        found.append(Activation(name, given))
    return [tuple(found[i * count : (i + 1) * count]) for i in range(sides)]


def _direction(cell: Cell, weights: Mapping[str, Array]) -> Recurrent:
    """Return one direction of W (gates h, n), R (gates h, h), B (2 gates h) and P (3 h)."""
    order, h = ORDER[cell.kind], weights["R"].shape[1]
    bias = hidden_bias = peepholes = None
    if "B" in weights:
        halves = weights["B"].reshape(2, cell.gates, h)[:, order].reshape(2, -1)
        own, other = (np.ascontiguousarray(b, np.float32) for b in halves)
        bias, hidden_bias = (own, other) if cell.kind == "gru" else (own + other, None)
        if cell.split_reset:  # Rb_h stands outside of what the reset gate scales
            bias, hidden_bias = own + other, None
    if "P" in weights:
        peepholes = np.ascontiguousarray(weights["P"].reshape(3, h)[PEEPHOLES, :], np.float32)
    w, r = (Dense(_columns(weights[k], order)) for k in ("W", "R"))
    return Recurrent(cell, w, r, bias, hidden_bias, peepholes)


def _columns(matrix: Array, order: tuple[int, ...]) -> Array:
    """Return rows (gates h, n) of ONNX's gates as columns (n, gates h) of ours."""
    gates = matrix.reshape(len(order), -1, matrix.shape[1])[list(order)]
    return np.ascontiguousarray(gates.reshape(-1, matrix.shape[1]).T, np.float32)


def column_scales(scale: Array, kind: str, h: int) -> Array:
    """Return the scale () or scales (gates h,) of ONNX's gates for each column of ours."""
    order = ORDER[kind]
    each = np.broadcast_to(scale.reshape(-1), (len(order) * h,)).reshape(len(order), h)
    return np.ascontiguousarray(each[list(order)].reshape(-1), np.float32)


def _names(inputs: Mapping[str, str], suffix: str) -> dict[str, str]:
    parts = {"input.weight": inputs["W"], "hidden.weight": inputs["R"]}
    if inputs["B"]:
        parts |= {"input.bias": inputs["B"], "hidden.bias": f"{inputs['B']}.hidden"}
    if inputs["P"]:
        parts["peepholes"] = inputs["P"]
    return {part: name + suffix for part, name in parts.items()}


def infer_layer(
    node: NodeProto, layer: Layer, shapes: Mapping[str, Shape], dtypes: Mapping[str, np.dtype]
) -> dict[str, tuple[Shape, np.dtype]]:
    """Return shape and dtype of each output that the node names.

    Raises ModelError where input, states or lengths do not fit the layer.
    """
    x, lengths, *states = [*node.input, "", "", ""][: 4 if layer.lstm else 3]
    first, d = layer.directions[0], len(layer.directions)
    if len(shapes[x]) != 3 or shapes[x][2] != first.n_in or 0 in shapes[x]:
        raise ModelError(
            f"{describe(node)}: input {x!r} has the shape {shapes[x]}; want three axes, none of "
            f"them empty, the last of {first.n_in} features"
        )
    steps, batch = shapes[x][:2][::-1] if layer.batch_first else shapes[x][:2]
    state = (batch, d, first.h) if layer.batch_first else (d, batch, first.h)
    for name, given in zip(states, ("initial_h", "initial_c"), strict=False):
        if name and shapes[name] != state:
            raise ModelError(
                f"{describe(node)}: {given} {name!r} has the shape {shapes[name]}; want {state}"
            )
    if lengths and shapes[lengths] != (batch,):
        raise ModelError(
            f"{describe(node)}: sequence_lens {lengths!r} has the shape {shapes[lengths]}; want "
            f"one length for each of {batch} rows"
        )
    for name in (x, *states):
        if name and dtypes[name].name not in ("float32", "float16", "bfloat16"):
            raise UnsupportedOperatorError(
                f"{describe(node)}: {name!r} is {dtypes[name].name}; recurrent layers compute in "
                "float32, convert the model to that"
            )
    y = (batch, steps, d, first.h) if layer.batch_first else (steps, d, batch, first.h)
    kinds = [y, state, state] if layer.lstm else [y, state]
    return {n: (s, dtypes[x]) for n, s in zip(node.output, kinds, strict=False) if n}


def check_lengths(node: NodeProto, layer: Layer, lengths: Array | None, x: Shape) -> None:
    """Raise ModelError where a constant length is negative or longer than the input."""
    steps = x[1] if layer.batch_first else x[0]
    if lengths is None:
        return
    if lengths.dtype.kind not in "iu" or (lengths < 0).any() or (lengths > steps).any():
        raise ModelError(
            f"{describe(node)}: sequence_lens are {lengths.tolist()}; want whole numbers from 0 "
            f"to the {steps} steps of its input"
        )


def _list(node: NodeProto, name: str) -> list[float] | list[bytes]:
    for item in node.attribute:
        if item.name == name:
            return list(item.strings or item.floats)
    return []


def _decoded(text: bytes | str | float) -> str:
    return text.decode("utf-8", "replace") if isinstance(text, bytes) else str(text)


def _attribute(node: NodeProto, name: str, kind: int) -> AttributeProto | None:
    for item in node.attribute:
        if item.name == name:
            if item.type != kind:
                raise ModelError(f"{describe(node)}: attribute {name!r} has a wrong type")
            return item
    return None


def _integer(node: NodeProto, name: str, default: int) -> int:
    item = _attribute(node, name, AttributeProto.INT)
    return default if item is None else item.i


def _float(node: NodeProto, name: str) -> float | None:
    item = _attribute(node, name, AttributeProto.FLOAT)
    return None if item is None else item.f


def own_node(node: NodeProto) -> NodeProto:
    """Return the node with only the inputs that are computed: X, lengths, states."""
    inputs = dict(zip(INPUTS, [*node.input, *[""] * len(INPUTS)], strict=False))
    kept = [inputs[k] for k in DYNAMIC[: 4 if node.op_type == "LSTM" else 3]]
    return helper.make_node(node.op_type, kept, list(node.output), name=node.name)
