"""``--shape``: text to shape buckets, completed by the symbols that inputs share."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING

import typer

from tvmstruct.errors import InputError

if TYPE_CHECKING:
    from tvmstruct.model_argument import ModelArgument
    from tvmstruct.sentence import Spec

Shape = tuple[int, ...]
Shapes = dict[str, Shape]

DEFAULT_LENGTHS = (16, 128)


def parse_shapes(texts: Iterable[str] | None, option: str = "--shape") -> list[Shapes]:
    """Return shape buckets: ``NAME=AxB`` in order, a name that comes again opens the next one."""
    buckets: list[Shapes] = []
    for name, text in named(texts, option):
        try:
            shape = tuple(int(size) for size in text.split("x"))
        except ValueError:
            shape = ()
        if not shape or min(shape) < 1:
            raise typer.BadParameter(f"{option} {name}={text}: want sizes like 1x128")
        if not buckets or name in buckets[-1]:
            buckets.append({})
        buckets[-1][name] = shape
    return buckets


def named(texts: Iterable[str] | None, option: str) -> list[tuple[str, str]]:
    """Split every ``NAME=VALUE``; names may hold ``=``, values may not."""
    pairs: list[tuple[str, str]] = []
    for text in texts or ():
        name, equals, value = text.rpartition("=")
        if not (name and equals and value):
            raise typer.BadParameter(f"{option} {text}: want NAME=VALUE")
        pairs.append((name, value))
    return pairs


def merge(buckets: list[Shapes]) -> Shapes:
    """Return the only bucket of ``--random``; misuse where an input is named twice."""
    if len(buckets) > 1:
        raise typer.BadParameter(f"--random names {next(iter(buckets[1]))} twice")
    return buckets[0] if buckets else {}


def own_buckets(model: ModelArgument, inputs: Sequence[Spec]) -> list[Shapes]:
    """Return the shape that a built-in model is configured for, or the default buckets."""
    return default_buckets(inputs) if model.config is None else [model.config.shapes()]


def default_buckets(inputs: Sequence[Spec]) -> list[Shapes]:
    """Return one row of 16 and of 128 tokens; the one bucket there is where nothing varies."""
    varies = any(isinstance(dim, str) for spec in inputs for dim in spec.shape)
    buckets: list[Shapes] = []
    for length in DEFAULT_LENGTHS if varies else DEFAULT_LENGTHS[:1]:
        sizes: dict[str, int] = {}
        for spec in inputs:
            for axis, dim in enumerate(spec.shape):
                if isinstance(dim, str):
                    sizes.setdefault(dim, 1 if axis == 0 else length)
        buckets.append({spec.name: _sized(spec, sizes) for spec in inputs})
    return buckets


def complete(bucket: Mapping[str, Shape], inputs: Sequence[Spec]) -> Shapes:
    """Return ``bucket`` with the inputs it leaves out, whose symbols the given ones fix."""
    known = {spec.name: spec for spec in inputs}
    sizes: dict[str, int] = {}
    for name, shape in bucket.items():
        if name not in known:
            raise InputError(f"--shape: no input {name!r}; the inputs are {', '.join(known)}")
        dims = known[name].shape
        if len(shape) != len(dims):
            raise InputError(
                f"--shape: {name} has rank {len(dims)}, {'x'.join(map(str, shape))} {len(shape)}"
            )
        sizes |= {dim: size for dim, size in zip(dims, shape, strict=True) if isinstance(dim, str)}
    return {spec.name: bucket.get(spec.name) or _sized(spec, sizes) for spec in inputs}


def _sized(spec: Spec, sizes: Mapping[str, int]) -> Shape:
    for dim in spec.shape:
        if not isinstance(dim, int) and dim not in sizes:
            raise InputError(
                f"--shape: dimension {dim} of {spec.name} is open; add --shape {spec.name}=..."
            )
    return tuple(dim if isinstance(dim, int) else sizes[str(dim)] for dim in spec.shape)


def describe(bucket: Shapes) -> str:
    """Return ``input_ids 1x128`` for a bucket: the first input stands for all."""
    name, shape = next(iter(bucket.items()))
    return f"{name} {'x'.join(map(str, shape))}"
