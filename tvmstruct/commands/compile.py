"""``tvmstruct compile``: for some shapes, to one file."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Annotated

import typer

from tvmstruct.calibration_option import CalibrationOption, calibrated
from tvmstruct.commands.opening import check_folder, compile_buckets, open_model
from tvmstruct.commands.options import (
    AsJson,
    Plan,
    Precision,
    ShapeOption,
    SourceModel,
    Target,
    Threads,
)
from tvmstruct.commands.output import print_json
from tvmstruct.commands.shapes import describe, own_buckets, parse_shapes
from tvmstruct.skip_option import Memory, SkipOption, chosen

EXAMPLE = (
    "Example: tvmstruct compile model.onnx -o model.tvms "
    "--shape input_ids=1x16 --shape input_ids=8x128 --skip 8"
)


def compile_model(
    model: SourceModel,
    output: Annotated[
        Path,
        typer.Option(
            "-o", "--output", help="What to write: a .tvms file, or for VTA a folder or a .zip."
        ),
    ],
    target: Target = "host",
    plan: Plan = None,
    shape: ShapeOption = None,
    precision: Precision = "f32",
    memory: Memory = "auto",
    skip: SkipOption = None,
    calibration: CalibrationOption = None,
    threads: Threads = None,
    as_json: AsJson = False,
) -> None:
    """Compile MODEL for some shapes and save it as one file, for VTA as a folder or a zip."""
    if model.compiled:
        raise typer.BadParameter(f"{model} is compiled already; give its .onnx file or folder")
    check_folder(output)
    from tvmstruct.progress import working

    started = time.perf_counter()
    options = chosen(model, skip, memory) | calibrated(model, target, calibration)
    compiled = open_model(model, target, plan, threads, precision, **options)
    wanted = parse_shapes(shape) or own_buckets(model, compiled.inputs)
    buckets = compile_buckets(compiled, wanted)
    with working(f"writing {output}"):
        compiled.save(output)
    size, seconds = size_of(output), round(time.perf_counter() - started, 3)
    summary = {
        "output": str(output),
        "bytes": size,
        "seconds": seconds,
        "target": target,
        "buckets": [{name: list(dims) for name, dims in bucket.items()} for bucket in buckets],
    }
    if as_json:
        print_json(summary | {"report": json.loads(compiled.report().to_json())})
    else:
        shapes = "; ".join(map(describe, buckets))
        typer.echo(f"{output}: {size / 1e6:.1f} MB in {seconds:.1f} s, for {shapes}")
        typer.echo(f"what became of each layer: tvmstruct report {output}")


def size_of(path: Path) -> int:
    """Return the bytes of a file, or of all files in a folder."""
    files = path.rglob("*") if path.is_dir() else [path]
    return sum(file.stat().st_size for file in files if file.is_file())
