"""``tvmstruct profile``: where the time of a model goes."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from tvmstruct.commands.opening import check_folder
from tvmstruct.commands.options import AsJson, Precision, ShapeOption, SourceModel, Target, Threads
from tvmstruct.commands.shapes import complete, parse_shapes
from tvmstruct.errors import InputError
from tvmstruct.skip_option import Memory

EXAMPLE = (
    "Example: tvmstruct profile 'random:bert?layers=2' --sweep seq,hidden,ffn "
    "--html bert.html --csv bert.csv"
)


def profile(
    model: SourceModel,
    sweep: Annotated[
        str | None,
        typer.Option(
            metavar="seq,hidden,ffn",
            help="Profile variants too, one size scaled in each; seq alone for a trained model.",
        ),
    ] = None,
    factor: Annotated[int, typer.Option(min=2, help="Of --sweep.")] = 4,
    mode: Annotated[
        str, typer.Option(help="Count too: cachestat (last-level misses) or custom (--events).")
    ] = "default",
    events: Annotated[
        str | None, typer.Option(metavar="cycles,dTLB-load-misses", help="With --mode custom.")
    ] = None,
    plot: Annotated[
        Path | None, typer.Option(dir_okay=False, help="Write shares and roofline as PNG.")
    ] = None,
    html: Annotated[
        Path | None, typer.Option(dir_okay=False, help="Write plots and tables as a web page.")
    ] = None,
    csv: Annotated[
        Path | None, typer.Option(dir_okay=False, help="Write a line for each class.")
    ] = None,
    cachegrind: Annotated[
        bool, typer.Option("--cachegrind", help="Simulate the caches with valgrind; minutes.")
    ] = False,
    cache: Annotated[
        str, typer.Option(metavar="SIZE", help="Last cache level that --cachegrind simulates.")
    ] = "2MB",
    target: Target = "host",
    shape: ShapeOption = None,
    precision: Precision = "f32",
    memory: Memory = "auto",
    runs: Annotated[int | None, typer.Option(min=1, help="Runs that medians are over.")] = None,
    threads: Threads = None,
    as_json: AsJson = False,
) -> None:
    """Say where the time of MODEL goes, by operation class, and how near the roofline it is."""
    if model.compiled:
        raise typer.BadParameter(f"{model} is compiled already; give its .onnx file or folder")
    if cachegrind and (sweep or plot or html or csv or runs or threads or mode != "default"):
        raise typer.BadParameter(
            "--cachegrind only counts, one call of one thread: leave --sweep, --mode, --runs, "
            "--threads and files out"
        )
    if cachegrind and target != "host":
        raise typer.BadParameter(f"--cachegrind compiles for AVX2: leave --target {target} out")
    for output in (plot, html, csv):
        check_folder(output)
    given = parse_shapes(shape)
    if len(given) > 1:
        raise typer.BadParameter("--shape: profile takes one shape of each input")
    from tvmstruct.profiling import command
    from tvmstruct.profiling.plots import check_matplotlib

    if plot or html:
        check_matplotlib()  # now, not after minutes
    asked = command.Command(model)
    try:
        asked.check(split_list(sweep), mode, split_list(events))
    except InputError as error:
        raise typer.BadParameter(str(error)) from error
    shapes = complete(given[0], asked.inputs) if given else None
    if cachegrind:
        found = asked.simulate(shapes, cache, {"precision": precision, "memory": memory})
        typer.echo(found.to_json() if as_json else str(found))
        return
    options = {"target": target, "precision": precision, "memory": memory, "threads": threads}
    profiles = asked.profile(shapes, factor, {**options, "runs": runs})
    command.write(profiles, plot, html, csv)
    command.show(profiles, as_json=as_json)


def split_list(text: str | None) -> list[str]:
    """Return the parts of a list with commas."""
    return [part.strip() for part in text.split(",")] if text else []
