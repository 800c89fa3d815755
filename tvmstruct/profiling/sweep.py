"""A model and its variants with one size scaled: the bars of Fig. 4 of NLP-Fast."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

from tvmstruct.errors import InputError
from tvmstruct.frontends import as_source
from tvmstruct.frontends.source import Source, symbol_places
from tvmstruct.model import CompiledModel
from tvmstruct.models import Config
from tvmstruct.models.config import AXES
from tvmstruct.profiling.prepare import Shapes, default_shapes
from tvmstruct.profiling.result import Profile
from tvmstruct.profiling.run import profile

Watch = Callable[[str], AbstractContextManager[None]]


def sweep(
    model: CompiledModel | Source | Config,
    axes: Sequence[str],
    shapes: Shapes | None = None,
    *,
    factor: int = 4,
    watch: Watch = nullcontext,
    **options: Any,
) -> tuple[Profile, ...]:
    """Return the profile of ``model``, and of a variant for each of ``axes`` times ``factor``.

    Axes are "seq", "hidden" and "ffn"; a model that is no built-in configuration has trained
    weights of fixed sizes, so only its inputs can be made longer. ``watch(message)`` is entered
    around each profile; ``options`` are those of `profile`. Raises InputError for an axis that
    the model does not have.
    """
    if not isinstance(model, CompiledModel | Config):
        model = as_source(model)
    if factor < 2:
        raise InputError(f"factor={factor}; want 2 or more")
    check_axes(model, axes)
    shapes = default_shapes(model) if shapes is None else shapes
    variants = [("base", model, shapes)]
    for axis in dict.fromkeys(axes):
        variants.append((f"{axis[0].upper()}-{factor}x", *_scale(model, shapes, axis, factor)))
    found = []
    for number, (label, variant, sizes) in enumerate(variants, 1):
        with watch(f"profiling {label} ({number} of {len(variants)})"):
            found.append(profile(variant, sizes, label=label, **options))
    return tuple(found)


def check_axes(model: CompiledModel | Source | Config, axes: Sequence[str]) -> None:
    """Raise InputError for an axis that is unknown or that ``model`` cannot be scaled along."""
    for axis in axes:
        if axis not in AXES:
            raise InputError(f"sweep: unknown axis {axis!r}; known: {', '.join(AXES)}")
        if isinstance(model, Config):
            model.scaled(axis, 2)
        elif axis != "seq":
            raise InputError(
                f"sweep: the {AXES[axis]} is fixed by this model's weights; only seq can be swept, "
                "or take a built-in model such as random:bert?layers=2"
            )
        elif not _lengths(model):
            raise InputError("sweep: seq is fixed in this model, no length of an input varies")


def _scale(
    model: CompiledModel | Source | Config, shapes: Shapes, axis: str, factor: int
) -> tuple[CompiledModel | Source | Config, Shapes]:
    """Return the variant and its shapes."""
    if isinstance(model, Config):
        variant = model.scaled(axis, factor)
        base, wanted = model.shapes(), variant.shapes()
        ratios = {name: zip(wanted[name], base[name], strict=True) for name in base}
        return variant, {
            name: tuple(n * new // old for n, (new, old) in zip(shape, ratios[name], strict=True))
            for name, shape in shapes.items()
        }
    symbols = _lengths(model)
    dims = {spec.name: spec.shape for spec in model.inputs}
    return model, {
        name: tuple(
            n * factor if d in symbols else n for n, d in zip(shape, dims[name], strict=True)
        )
        for name, shape in shapes.items()
    }


def _lengths(model: CompiledModel | Source) -> set[str]:
    """Return the symbols of the inputs that are lengths: those that are not only batches."""
    places = symbol_places(model.inputs)
    return {symbol for symbol, at in places.items() if any(axis > 0 for _, axis in at)}
