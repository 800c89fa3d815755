"""Input arrays from files or made up, and what the command line says of outputs."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tvmstruct.commands.shapes import Shapes
from tvmstruct.errors import InputError

if TYPE_CHECKING:
    from tvmstruct.model_argument import ModelArgument
    from tvmstruct.sentence import Spec


def read_array(name: str, path: Path) -> Any:
    """Return the array of an .npy file, which is input ``name``."""
    import numpy as np

    try:
        return np.load(path, allow_pickle=False)
    except (ValueError, EOFError) as error:
        raise InputError(f"{name}: {path} is not an .npy file ({error})") from error


def random_arrays(inputs: Sequence[Spec], shapes: Shapes) -> dict[str, Any]:
    """Return made-up inputs: masks are ones, integers 0 to 99, floats normal."""
    import numpy as np

    rng, known = np.random.default_rng(0), {spec.name: spec for spec in inputs}
    arrays: dict[str, Any] = {}
    for name, shape in shapes.items():
        if name not in known:
            raise InputError(f"--random: no input {name!r}; the inputs are {', '.join(known)}")
        dtype = np.dtype(known[name].dtype)
        if dtype.kind == "b" or "mask" in name:
            arrays[name] = np.ones(shape, dtype)
        elif dtype.kind in "iu":
            arrays[name] = rng.integers(0, 100, shape).astype(dtype)
        else:
            arrays[name] = rng.standard_normal(shape).astype(dtype)
    return arrays


def typical_inputs(model: ModelArgument, compiled: Any, shapes: Shapes) -> dict[str, Any]:
    """Return inputs of ``shapes``: a built-in model's own, or random ones without what may miss."""
    if model.config is not None and shapes == model.config.shapes():
        return model.config.inputs()
    optional = {*compiled.default_ones, *compiled.default_zeros}
    wanted = {name: shape for name, shape in shapes.items() if name not in optional}
    arrays = random_arrays(compiled.inputs, wanted)
    for name, array in arrays.items():
        if array.dtype.kind in "iu":
            array %= compiled.token_inputs.get(name, 100)
    for name, steps in compiled.longest(shapes).items():
        arrays[name][...] = steps
    return arrays


def summarise(name: str, array: Any) -> dict[str, Any]:
    """Return name, dtype, shape and range of an output; null where the range is not finite."""
    import numpy as np

    values: dict[str, float | None] = dict.fromkeys(("min", "mean", "max"))
    if array.size and np.isfinite(array.astype("float64")).all():
        wide = array.astype("float64")
        values = {"min": float(wide.min()), "mean": float(wide.mean()), "max": float(wide.max())}
    return {"name": name, "dtype": str(array.dtype), "shape": list(array.shape), **values}
