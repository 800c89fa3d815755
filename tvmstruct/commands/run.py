"""``tvmstruct run``: once, on files or made-up inputs."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from tvmstruct.calibration_option import CalibrationOption, calibrated
from tvmstruct.commands.arrays import random_arrays, read_array, summarise
from tvmstruct.commands.opening import check_folder, open_model
from tvmstruct.commands.options import AsJson, Model, Target, Threads
from tvmstruct.commands.output import print_json, print_table
from tvmstruct.commands.shapes import merge, named, parse_shapes
from tvmstruct.skip_option import Memory, SkipOption, chosen

EXAMPLE = (
    "Example: tvmstruct run model.tvms --input input_ids=ids.npy --output out.npz; or "
    "tvmstruct run model.onnx --random input_ids=1x128 --memory minimal"
)


def run(
    model: Model,
    inputs: Annotated[
        list[str] | None,
        typer.Option("--input", metavar="NAME=FILE.npy", help="An input array; repeatable."),
    ] = None,
    random: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME=AxB",
            help="A made-up input: masks are ones, integers 0 to 99, floats normal; repeatable.",
        ),
    ] = None,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Write the outputs to an .npz file.")
    ] = None,
    target: Target = "host",
    memory: Memory = "auto",
    skip: SkipOption = None,
    calibration: CalibrationOption = None,
    threads: Threads = None,
    as_json: AsJson = False,
) -> None:
    """Run MODEL once and describe or save what comes out."""
    from tvmstruct.progress import working

    files, shapes = named(inputs, "--input"), merge(parse_shapes(random, "--random"))
    made_up = model.config is not None and not files and not shapes
    if not files and not shapes and not made_up:
        raise typer.BadParameter("give the inputs: --input NAME=FILE.npy or --random NAME=AxB")
    check_folder(output)
    options = chosen(model, skip, memory) | calibrated(model, target, calibration)
    compiled = open_model(model, target, None, threads, **options)
    feeds = {name: read_array(name, Path(file)) for name, file in files}
    feeds |= random_arrays(compiled.inputs, shapes)
    if made_up:
        feeds = model.config.inputs()
    with working(f"running {model}"):
        results = compiled.run(feeds)
    if output is not None:
        import numpy as np

        np.savez(output, **results)
    described = [summarise(name, array) for name, array in results.items()]
    if as_json:
        print_json({"outputs": described})
    else:
        print_table(described)
