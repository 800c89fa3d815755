"""``tvmstruct models``: the built-in models."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from tvmstruct.commands.opening import check_folder
from tvmstruct.commands.options import AsJson
from tvmstruct.commands.output import print_json, print_table
from tvmstruct.errors import InputError
from tvmstruct.model_argument import PREFIX

if TYPE_CHECKING:
    from tvmstruct.models import Config

EXAMPLE = (
    "Example: tvmstruct models 'bert-s4x?layers=1&seq=64' -o bert.onnx; or, without a file, "
    "tvmstruct report 'random:bert-s4x?layers=1&seq=64'"
)


def list_models(
    name: Annotated[
        str | None,
        typer.Argument(metavar="NAME", help="One model, with options after ? as key=value&...."),
    ] = None,
    output: Annotated[
        Path | None, typer.Option("-o", "--output", help="The .onnx file to write NAME to.")
    ] = None,
    seed: Annotated[int, typer.Option(min=0, help="Of the random weights.")] = 0,
    as_json: AsJson = False,
) -> None:
    """Show the built-in models, which have random weights, or write one as ONNX."""
    if output is not None and name is None:
        raise typer.BadParameter("-o writes one model: say which, as in tvmstruct models bert -o")
    check_folder(output)
    from tvmstruct import models

    try:
        wanted = list(models.names()) if name is None else [name.removeprefix(PREFIX)]
        configs = {text: models.parse(text) for text in wanted}
    except InputError as error:
        raise typer.BadParameter(str(error)) from error
    if output is not None:
        _write_random(configs[wanted[0]], seed, output)
    rows = [_model_row(text, config) for text, config in configs.items()]
    if as_json:
        print_json({"models": rows})
    else:
        print_table([row | {"inputs": _described(row["inputs"])} for row in rows])


def _write_random(config: Config, seed: int, output: Path) -> None:
    from tvmstruct import models
    from tvmstruct.progress import working

    with working(f"writing {output}"):
        output.write_bytes(models.build(config, seed).SerializeToString())


def _model_row(text: str, config: Config) -> dict[str, Any]:
    """Return a row of the table of built-in models."""
    inputs = {name: list(shape) for name, shape in config.shapes().items()}
    return {"name": text, "what": config.title, "parameters": config.params, "inputs": inputs}


def _described(shapes: Mapping[str, Sequence[int]]) -> str:
    return ", ".join(f"{name} {'x'.join(map(str, shape))}" for name, shape in shapes.items())
