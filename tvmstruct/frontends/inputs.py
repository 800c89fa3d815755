"""Inputs of a graph that the caller fixes: to a value, or their open dimensions to sizes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from tvmstruct.errors import InputError
from tvmstruct.frontends.source import Dim, TensorSpec
from tvmstruct.frontends.validate import Graph


def with_constants(graph: Graph, values: Mapping[str, Any]) -> Graph:
    """Return the graph with inputs replaced by constants.

    Raises InputError for a name that is no input, or a value of another dtype or shape.
    """
    specs = _specs(graph, values, "constants")
    constants = {name: _value(specs[name], value) for name, value in values.items()}
    inputs = tuple(s for s in graph.inputs if s.name not in values)
    return replace(graph, inputs=inputs, constants={**graph.constants, **constants})


def _value(spec: TensorSpec, value: Any) -> np.ndarray:
    array, want = np.asarray(value), np.dtype(spec.dtype)
    with np.errstate(all="ignore"):
        cast = array.astype(want) if array.dtype.kind in "iufb" else array
    if array.dtype.kind not in "iufb" or not np.array_equal(
        cast.astype(array.dtype), array, equal_nan=True
    ):
        raise InputError(
            f"constants: {spec.name!r} is {want}, which {array.dtype} {str(value)[:60]} is not"
        )
    fits = len(spec.shape) == array.ndim and all(
        not isinstance(d, int) or d == n for d, n in zip(spec.shape, array.shape, strict=True)
    )
    if not fits:
        raise InputError(
            f"constants: {spec.name!r} has the shape {list(spec.shape)}, not {list(array.shape)}"
        )
    return cast


def with_shapes(graph: Graph, shapes: Mapping[str, Sequence[int | str]]) -> Graph:
    """Return the graph with the dimensions of inputs fixed, or named anew.

    Raises InputError for a name that is no input, or a shape that the model does not allow.
    """
    specs = _specs(graph, shapes, "shapes")
    changed = {n: replace(specs[n], shape=_shape(specs[n], s)) for n, s in shapes.items()}
    return replace(graph, inputs=tuple(changed.get(s.name, s) for s in graph.inputs))


def _shape(spec: TensorSpec, shape: Sequence[int | str]) -> tuple[Dim, ...]:
    wanted = tuple(shape)
    fits = len(wanted) == len(spec.shape) and all(
        new == old if isinstance(old, int) else isinstance(new, str) or new > 0
        for new, old in zip(wanted, spec.shape, strict=True)
    )
    if not fits:
        raise InputError(
            f"shapes: {spec.name!r} has the shape {list(spec.shape)}; {list(wanted)} is none that "
            "it can have: give a size above 0 or a name for each dimension"
        )
    return wanted


def _specs(graph: Graph, given: Mapping[str, Any], what: str) -> dict[str, TensorSpec]:
    specs = {s.name: s for s in graph.inputs}
    if unknown := [name for name in given if name not in specs]:
        raise InputError(f"{what}: no input is called {unknown}; the inputs are {list(specs)}")
    return specs
