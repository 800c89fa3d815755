"""``tvmstruct vta explore``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from tvmstruct.model_argument import ModelArgument, parse_model

if TYPE_CHECKING:
    from tvmstruct.vta.operations import Workload

Model = Annotated[
    ModelArgument,
    typer.Argument(
        metavar="MODEL",
        parser=parse_model,
        help="An .onnx file, a Hugging Face folder, or a built-in model such as "
        "'random:bert?layers=2' (see tvmstruct models).",
    ),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON on stdout.")]


def register(app: typer.Typer) -> None:
    """Add the command to ``tvmstruct vta``."""
    example = "Example: tvmstruct vta explore 'random:bert?layers=2' --board ultra96 --plot f.png"
    app.command(epilog=example)(explore)


def explore(
    model: Model,
    board: Annotated[str, typer.Option(help="pynq, ultra96 or zcu104.")],
    output: Annotated[
        Path | None,
        typer.Option("-o", "--output", dir_okay=False, help="JSON of VTA; default vta_BOARD.json."),
    ] = None,
    plot: Annotated[
        Path | None, typer.Option(dir_okay=False, help="Draw the Pareto fronts as PNG.")
    ] = None,
    length: Annotated[
        int, typer.Option(min=1, help="Tokens of one row; a built-in model has its own.")
    ] = 128,
    as_json: AsJson = False,
) -> None:
    """Fit VTA and NLP-Fast's lanes to MODEL on a board: Pareto fronts, and VTA's JSON."""
    output = output or Path(f"vta_{board}.json")
    for path in (output, plot):
        if path is not None and not path.parent.is_dir():
            raise typer.BadParameter(f"{path}: there is no folder {path.parent}")
    if model.compiled:
        raise typer.BadParameter(f"{model} is compiled already; give its .onnx file or folder")
    from tvmstruct.progress import working
    from tvmstruct.vta import explore as exploring

    if plot is not None:
        from tvmstruct.profiling.plots import check_matplotlib

        check_matplotlib()  # now, not after the search
    with working(f"reading {model}"):
        asked = _workload(model, length)
    with working(f"exploring {board} for {model}"):
        found = exploring.explore(str(model), asked, board)
    output.write_text(found.best.config.to_json(), encoding="utf-8")
    if plot is not None:
        plot.write_bytes(exploring.to_png(found))
    if as_json:
        typer.echo(json.dumps(exploring.to_plain(found), indent=2))
    else:
        typer.echo(exploring.text(found))
        typer.echo(f"{output}: {found.best.config.name}, the fastest above")


def _workload(model: ModelArgument, length: int) -> Workload:
    if model.config is not None:
        from tvmstruct.vta.operations import workload

        return workload(model.config)
    from tvmstruct.vta.graph_workload import source_workload  # imports TVM

    return source_workload(str(model), model.source(), length)
