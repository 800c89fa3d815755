"""Compute the small constant parts of a graph, such as causal masks, with numpy."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from math import prod

import numpy as np
from tvm import relax

from tvmstruct import compat
from tvmstruct.passes.slices import Slice, slice_of
from tvmstruct.rewrite import Graph

LIMIT = 1 << 24  # elements: the mask of 4096 by 4096 positions

ELEMENTWISE: dict[str, Callable] = {
    "relax.add": np.add,
    "relax.subtract": np.subtract,
    "relax.multiply": np.multiply,
    "relax.divide": np.divide,
    "relax.negative": np.negative,
    "relax.minimum": np.minimum,
    "relax.maximum": np.maximum,
    "relax.less": np.less,
    "relax.less_equal": np.less_equal,
    "relax.greater": np.greater,
    "relax.greater_equal": np.greater_equal,
    "relax.equal": np.equal,
    "relax.not_equal": np.not_equal,
    "relax.logical_and": np.logical_and,
    "relax.logical_or": np.logical_or,
    "relax.logical_not": np.logical_not,
    "relax.where": np.where,
    "relax.power": np.power,
    "relax.left_shift": np.left_shift,
    "relax.exp": np.exp,
    "relax.log": np.log,
    "relax.sqrt": np.sqrt,
    "relax.floor_divide": np.floor_divide,
}
_SHAPED: dict[str, Callable] = {
    "relax.reshape": np.reshape,
    "relax.expand_dims": np.reshape,
    "relax.squeeze": np.reshape,
    "relax.broadcast_to": np.broadcast_to,
    "relax.full": np.broadcast_to,
}
_FILLED: dict[str, float | None] = {
    "relax.full_like": None,
    "relax.ones_like": 1,
    "relax.zeros_like": 0,
    "relax.zeros": 0,
    "relax.ones": 1,
}
_JOINED: dict[str, Callable] = {"relax.concat": np.concatenate, "relax.stack": np.stack}


def evaluate(graph: Graph, expr: relax.Expr) -> np.ndarray | None:
    """Return the value of an expression that reads no input, or None."""
    if isinstance(expr, relax.Var) and expr not in graph.closed:
        return None
    value = graph.value(expr)
    if compat.is_constant(value):
        return compat.constant_array(value)
    if (part := slice_of(graph, expr)) is not None:
        return _part(evaluate(graph, part.source), part)
    if not isinstance(value, relax.Call) or not _known(value):
        return None
    with np.errstate(all="ignore"):
        return _call(graph, value)


def _part(array: np.ndarray | None, part: Slice) -> np.ndarray | None:
    """Return a slice of a value."""
    if array is None:
        return None
    if part.drop:
        return array.take(part.begin, part.axis)
    index = [slice(None)] * array.ndim
    index[part.axis] = slice(part.begin, part.begin + part.size)
    return array[tuple(index)]


def names_of(graph: Graph, expr: relax.Expr, names: Mapping[int, str]) -> list[str]:
    """Return the names (by address) of the weights that a constant expression reads."""
    value = graph.value(expr)
    if compat.is_constant(value):
        name = names.get(compat.address(compat.constant_tensor(value)))
        return [] if name is None else [name]
    if isinstance(value, relax.TupleGetItem):
        return names_of(graph, value.tuple_value, names)
    fields = value.args if isinstance(value, relax.Call) else getattr(value, "fields", ())
    return [n for f in fields for n in names_of(graph, f, names)]


def number(graph: Graph, expr: relax.Expr) -> float | None:
    """Return the one number that a constant holds everywhere, or None."""
    value = graph.value(expr)
    if compat.op_name(value) == "relax.full_like":
        expr = value.args[1]
    elif compat.op_name(value) == "relax.zeros_like":
        return 0.0
    array = evaluate(graph, expr)
    if array is None or not array.size or (array != array.flat[0]).any():
        return None
    return float(array.flat[0])


def _known(call: relax.Call) -> bool:
    shape = compat.static_shape(call)
    named = ("bool", "int", "uint", "float")
    return shape is not None and prod(shape) <= LIMIT and compat.dtype_of(call).startswith(named)


def _call(graph: Graph, call: relax.Call) -> np.ndarray | None:
    name, shape, dtype = compat.op_name(call), compat.static_shape(call), compat.dtype_of(call)
    assert shape is not None
    if name == "relax.arange":
        return _range(call, shape[0])
    if name in _JOINED:
        return _joined(graph, call, _JOINED[name])
    operands = _operands(graph, call, name)
    if operands is None:
        return None
    if name in ELEMENTWISE:
        return np.asarray(ELEMENTWISE[name](*operands), dtype)
    if name in _SHAPED:
        return np.asarray(_SHAPED[name](operands[0], shape), dtype)
    if name == "relax.astype":
        return operands[0].astype(dtype)
    if name in _FILLED:
        return np.full(shape, _FILLED[name] if _FILLED[name] is not None else operands[0], dtype)
    return _moved(call, name, operands[0])


def _range(call: relax.Call, count: int) -> np.ndarray | None:
    first, _, step = (getattr(a, "value", None) for a in call.args)
    if first is None or step is None:
        return None
    return (int(first) + int(step) * np.arange(count)).astype(compat.dtype_of(call))


def _moved(call: relax.Call, name: str, array: np.ndarray) -> np.ndarray | None:
    """Return a transpose or a triangle of an array."""
    if name == "relax.permute_dims":
        axes = call.attrs.axes
        return array.transpose(None if axes is None else [int(a) for a in axes])
    if (
        name in ("relax.triu", "relax.tril")
        and (k := getattr(call.args[1], "value", None)) is not None
    ):
        return getattr(np, name[-4:])(array, int(k))
    return None


def _joined(graph: Graph, call: relax.Call, join: Callable) -> np.ndarray | None:
    parts = [evaluate(graph, a) for a in graph.value(call.args[0]).fields]
    whole = [p for p in parts if p is not None]
    return join(whole, int(call.attrs.axis)) if len(whole) == len(parts) else None


def _operands(graph: Graph, call: relax.Call, name: str) -> list[np.ndarray] | None:
    if name in ("relax.zeros", "relax.ones", "relax.zeros_like", "relax.ones_like"):
        return [np.zeros(())]  # whatever they are like
    places = {"relax.full": [1], "relax.full_like": [1], "relax.triu": [0], "relax.tril": [0]}
    args = [call.args[i] for i in places.get(name, range(len(call.args)))]
    tensors = args if name in ELEMENTWISE else args[:1]
    found = []
    for arg in tensors:
        array = evaluate(graph, arg)
        if array is None:
            return None
        found.append(array)
    return found
