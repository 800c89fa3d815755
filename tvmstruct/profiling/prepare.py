"""What to run: a model compiled for one set of shapes, and random inputs of those shapes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from tvmstruct.arrays import aligned_empty
from tvmstruct.compiler import compile
from tvmstruct.errors import InputError
from tvmstruct.frontends import Source, TensorSpec, as_source
from tvmstruct.model import Bucket, CompiledModel
from tvmstruct.models import Config
from tvmstruct.models import source as source_of
from tvmstruct.targets import check_cpu, check_runs_here, resolve

Shapes = Mapping[str, Sequence[int]]
LENGTH = 128  # of the dimensions that vary, unless shapes say otherwise


@dataclass(frozen=True)
class Prepared:
    """One bucket of a compiled model and an array for each of its inputs."""

    name: str
    model: CompiledModel
    bucket: Bucket
    arrays: list[np.ndarray]

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Return the shape of every input."""
        return {s.name: a.shape for s, a in zip(self.model.inputs, self.arrays, strict=True)}


def prepare(model: Any, shapes: Shapes | None, options: Mapping[str, Any]) -> Prepared:
    """Compile ``model`` for ``shapes`` unless it is compiled, and make inputs."""
    compiled = isinstance(model, CompiledModel)
    spec = (
        model.spec if isinstance(model, CompiledModel) else resolve(options.get("target", "host"))
    )
    check_cpu(spec, "profile")
    source = _source_of(model, options)
    if shapes is None:
        shapes = default_shapes(model if compiled or isinstance(model, Config) else source)
    fixed = {name: tuple(shape) for name, shape in shapes.items()}
    if not compiled:
        options = {**options, "buckets": [source.bind(fixed)]} if source.dims else options
    ready = model if compiled else compile(source, **options)
    check_runs_here(ready.spec)
    ready.compile_bucket(fixed)
    bucket = ready.buckets[tuple(fixed[spec.name] for spec in ready.inputs)]
    own = isinstance(model, Config) and fixed == model.shapes()
    feeds = (
        model.inputs()
        if own
        else random_inputs(ready.inputs, fixed, ready.token_inputs, ready.longest(fixed))
    )
    name = model.name if isinstance(model, Config) else source.name
    return Prepared(name, ready, bucket, [feeds[spec.name] for spec in ready.inputs])


def random_inputs(
    specs: Sequence[TensorSpec],
    shapes: Mapping[str, tuple[int, ...]],
    rows: Mapping[str, int],
    steps: Mapping[str, int],
    seed: int = 0,
) -> dict[str, np.ndarray]:
    """Return normal floats, ids below the ``rows`` of their tables, ones for masks, else zeros.

    Lengths are all ``steps``.
    """
    rng, arrays = np.random.default_rng(seed), {}
    for spec in specs:
        array = arrays[spec.name] = aligned_empty(shapes[spec.name], spec.dtype)
        if array.dtype.kind == "f":
            array[...] = rng.standard_normal(array.shape)
        elif spec.name in rows:
            array[...] = rng.integers(0, rows[spec.name], array.shape)
        elif spec.name in steps:
            array[...] = steps[spec.name]
        else:
            array[...] = "mask" in spec.name or array.dtype.kind == "b"
    return arrays


DEFAULTS = {"target": "host", "precision": "f32", "memory": "auto", "threads": None}


def _source_of(model: Any, options: Mapping[str, Any]) -> Source:
    if isinstance(model, Config):
        return source_of(model)
    if not isinstance(model, CompiledModel):
        return as_source(model)
    for name, default in DEFAULTS.items():
        if options[name] != default:
            raise InputError(
                f"{name}={options[name]!r} cannot change a compiled model; give it to compile()"
            )
    if model.compiler is None:
        raise InputError(
            "a model loaded from a file has no graph that tells what its kernels are for; "
            "profile the source that it was compiled from"
        )
    return model.compiler.source


def default_shapes(model: CompiledModel | Source | Config) -> Shapes:
    """Return the shapes that a model is profiled at unless the user says others."""
    if isinstance(model, Config):
        return model.shapes()
    if isinstance(model, CompiledModel):
        names = [spec.name for spec in model.inputs]
        return dict(zip(names, next(reversed(model.buckets)), strict=True))
    return {spec.name: _default_shape(spec, model.limits) for spec in model.inputs}


def _default_shape(spec: TensorSpec, limits: Mapping[str, int]) -> tuple[int, ...]:
    """Return one row of `LENGTH`, or of as much as the model takes."""
    return tuple(
        dim if isinstance(dim, int) else min(LENGTH, limits.get(str(dim), LENGTH)) if axis else 1
        for axis, dim in enumerate(spec.shape)
    )
