"""MODEL on the command line to a CompiledModel, and the buckets asked for compiled."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import typer

from tvmstruct.commands.shapes import Shapes, complete, describe
from tvmstruct.errors import PlanError
from tvmstruct.model_argument import ModelArgument


def open_model(
    model: ModelArgument,
    target: str,
    plan: Path | None,
    threads: int | None,
    precision: str = "f32",
    **options: Any,
) -> Any:
    """Return the CompiledModel of MODEL, whatever it names."""
    from tvmstruct.progress import working

    with working(f"reading {model}"):
        import tvmstruct

        if model.compiled:
            return tvmstruct.load(model.path)
        options |= {} if precision == "f32" else {"precision": precision}
        return tvmstruct.compile(
            model.source(), target, plan=plan and _read_plan(plan), threads=threads, **options
        )


def _read_plan(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise PlanError(f"--plan: {path} is not JSON ({error})") from error


def compile_buckets(compiled: Any, wanted: list[Shapes]) -> list[Shapes]:
    """Compile ``compiled`` for every bucket and return them in full."""
    from tvmstruct.progress import working

    buckets = [complete(bucket, compiled.inputs) for bucket in wanted]
    for number, bucket in enumerate(buckets, 1):
        with working(f"compiling {describe(bucket)} ({number} of {len(buckets)})"):
            compiled.compile_bucket(bucket)
    return buckets


def check_folder(output: Path | None) -> None:
    """Say at once, not after a minute of compiling, that the folder to write to is missing."""
    if output is not None and not output.parent.is_dir():
        raise typer.BadParameter(f"{output}: there is no folder {output.parent}")
