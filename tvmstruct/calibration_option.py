"""``--calibration`` of the command line: typical inputs for targets that quantise."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any
from zipfile import BadZipFile

import typer

from tvmstruct.errors import InputError

if TYPE_CHECKING:
    from tvmstruct.model_argument import ModelArgument

CalibrationOption = Annotated[
    list[Path] | None,
    typer.Option(
        metavar="FILE.npz",
        exists=True,
        dir_okay=False,
        help="With --target vta: a batch of typical inputs by name; repeatable.",
    ),
]


def calibrated(model: ModelArgument, target: str, files: list[Path] | None) -> dict[str, Any]:
    """Return the argument ``calibration`` of ``compile``; a built-in model has inputs of its own.

    Misuse, as typer says it, without a target that quantises, or for a compiled model.
    """
    quantises = target.split()[:1] == ["vta"]
    if not files and quantises and model.config is not None:
        return {"calibration": [model.config.inputs()]}
    if not files:
        return {}
    if model.compiled or not quantises:
        why = f"{model} is compiled already" if model.compiled else f"not with --target {target}"
        raise typer.BadParameter(f"--calibration is for --target vta: {why}")
    return {"calibration": [_batch(file) for file in files]}


def _batch(file: Path) -> dict[str, Any]:
    import numpy as np

    try:
        arrays = np.load(file, allow_pickle=False)
        if not isinstance(arrays, np.lib.npyio.NpzFile):
            raise ValueError("it holds one array without a name; use numpy.savez")
        with arrays:
            return {name: arrays[name] for name in arrays.files}
    except (ValueError, EOFError, OSError, BadZipFile) as error:
        raise InputError(f"--calibration: {file} is no .npz file of arrays ({error})") from error
