"""See through layout operators: which tensor an expression shows, and in which order."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import prod

import numpy as np
from tvm import relax

from tvmstruct import compat
from tvmstruct.passes.factors import Axes, Axis, Factor, contiguous, regroup, shape_of
from tvmstruct.passes.slices import slice_of
from tvmstruct.rewrite import Graph

R = relax.op
RESHAPES = ("relax.reshape", "relax.expand_dims", "relax.squeeze", "relax.flatten")


@dataclass(frozen=True)
class View:
    """``scale`` times ``root``, indexed through ``axes`` from ``offset`` on.

    Only a view that is ``sliced`` leaves out some of its root.
    """

    root: relax.Expr
    axes: Axes
    scale: float = 1.0
    offset: int = 0
    sliced: bool = False


def view(
    graph: Graph, expr: relax.Expr, name: str, *, scales: bool = False, slices: bool = False
) -> View:
    """Follow layout operators down to where they begin; also constant factors, and slices."""
    value = graph.value(expr)
    source = value.args[0] if isinstance(value, relax.Call) and value.args else None
    if scales and (scaled := scaled_by(graph, value)) is not None:
        factor, source = scaled
        if compat.static_shape(source) == compat.static_shape(expr):
            inner = view(graph, source, name, scales=True, slices=slices)
            return replace(inner, scale=inner.scale * factor)
    elif slices and (part := slice_of(graph, expr)) is not None:
        inner = view(graph, part.source, name, scales=scales, slices=True)
        if (found := part.cut(inner.axes[part.axis], name)) is not None:
            middle = [] if part.drop else [found[0]]
            axes = [*inner.axes[: part.axis], *middle, *inner.axes[part.axis + 1 :]]
            return replace(inner, axes=axes, offset=inner.offset + found[1], sliced=True)
    elif source is not None and _is_layout(value):
        inner = view(graph, source, name, scales=scales, slices=slices)
        axes = rearrange(graph, value, inner.axes)
        if axes is not None:
            return replace(inner, axes=axes)
    return View(expr, contiguous(name, compat.static_shape(expr) or ()))


def _is_layout(call: relax.Call) -> bool:
    name = compat.op_name(call)
    if name == "relax.astype":
        return compat.dtype_of(call) == compat.dtype_of(call.args[0])
    shapes = (compat.static_shape(call), compat.static_shape(call.args[0]))
    known = (*RESHAPES, *_RULES)
    return name in known and all(s is not None and prod(s) for s in shapes)


def rearrange(graph: Graph, call: relax.Call, axes: Axes) -> Axes | None:
    """Return the axes after a layout operator, or None where it is none or does not fit."""
    name, shape = compat.op_name(call), compat.static_shape(call)
    if name == "relax.astype":
        return axes
    if shape is None:
        return None
    if name in RESHAPES:
        return regroup(axes, shape)
    rule = _RULES.get(name)
    out = rule(graph, call, axes) if rule else None
    return out if out is not None and shape_of(out) == shape else None


def _permute(graph: Graph, call: relax.Call, axes: Axes) -> Axes:
    order = call.attrs.axes
    return axes[::-1] if order is None else [axes[int(a)] for a in order]


def _broadcast(graph: Graph, call: relax.Call, axes: Axes) -> Axes:
    shape = compat.static_shape(call) or ()
    axes = [()] * (len(shape) - len(axes)) + axes
    return [axis or _still(n) for axis, n in zip(axes, shape, strict=True)]


def _repeat(graph: Graph, call: relax.Call, axes: Axes) -> Axes | None:
    if call.attrs.axis is None:
        return None
    at = int(call.attrs.axis) % len(axes)
    return [*axes[:at], axes[at] + _still(int(call.attrs.repeats)), *axes[at + 1 :]]


def _tile(graph: Graph, call: relax.Call, axes: Axes) -> Axes:
    counts = [int(n) for n in call.attrs.repeats]
    rank = max(len(counts), len(axes))
    counts = [1] * (rank - len(counts)) + counts
    axes = [()] * (rank - len(axes)) + axes
    return [_still(n) + axis for n, axis in zip(counts, axes, strict=True)]


def _take(graph: Graph, call: relax.Call, axes: Axes) -> Axes | None:
    """Picking every row r times, in a row or one round after the other, repeats the axis."""
    index, axis = graph.value(call.args[1]), call.attrs.axis
    if axis is None or not compat.is_constant(index):
        return None
    picks, at = compat.constant_array(index), int(axis) % len(axes)
    count = shape_of(axes)[at]
    if picks.ndim != 1 or picks.size % count:
        return None
    times, every = picks.size // count, np.arange(count)
    if np.array_equal(picks, np.repeat(every, times)):
        found = axes[at] + _still(times)
    elif np.array_equal(picks, np.tile(every, times)):
        found = _still(times) + axes[at]
    else:
        return None
    return [*axes[:at], found, *axes[at + 1 :]]


def _still(size: int) -> Axis:
    return (Factor(size),) if size > 1 else ()


_RULES = {
    "relax.permute_dims": _permute,
    "relax.broadcast_to": _broadcast,
    "relax.repeat": _repeat,
    "relax.tile": _tile,
    "relax.take": _take,
    "relax.astype": None,
}


def scaled_by(graph: Graph, value: relax.Expr) -> tuple[float, relax.Expr] | None:
    """Return factor and operand of a product with, or a quotient by, one constant number."""
    name = compat.op_name(value)
    if name == "relax.divide" and (divisor := graph.constant(value.args[1])):
        return 1.0 / divisor, value.args[0]
    if name == "relax.multiply":
        for a, b in (value.args, tuple(reversed(value.args))):
            if (factor := graph.constant(b)) is not None:
                return factor, a
    return None


def arrange(root: relax.Expr, name: str, dims: Sequence[Sequence[Factor]]) -> relax.Expr:
    """Return tensor ``name`` with one axis for each list of loops, repeated where it stands still.

    The loops of one tensor fill it: what `view` found is a rearrangement of all of its root.
    """
    loops = [f for dim in dims for f in dim]
    moving = [f for f in loops if f.stride(name)]
    assert prod(f.size for f in moving) == prod(compat.static_shape(root) or ()), (
        "loops are missing"
    )
    stored = sorted(moving, key=lambda f: -f.stride(name))
    full = tuple(f.size for f in loops)
    ones = tuple(f.size if f.stride(name) else 1 for f in loops)
    if compat.is_constant(root) and len(moving) == len(loops):
        return relax.const(arrange_array(compat.constant_array(root), name, dims))
    out = root
    if stored != moving:
        order = [next(i for i, f in enumerate(stored) if f is g) for g in moving]
        out = R.permute_dims(R.reshape(out, tuple(f.size for f in stored)), order)
    if ones != full:
        out = R.broadcast_to(R.reshape(out, ones), full)
    return R.reshape(out, tuple(prod(f.size for f in dim) for dim in dims))


def arrange_array(array: np.ndarray, name: str, dims: Sequence[Sequence[Factor]]) -> np.ndarray:
    """Do to an array what `arrange` does in the graph."""
    array = np.ascontiguousarray(array)
    loops = [f for dim in dims for f in dim]
    strides = [f.stride(name) * array.itemsize for f in loops]
    strided = np.lib.stride_tricks.as_strided(array, [f.size for f in loops], strides)
    return np.ascontiguousarray(strided.reshape([prod(f.size for f in dim) for dim in dims]))
