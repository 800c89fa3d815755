"""``tvmstruct report``: what became of every layer."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from tvmstruct.calibration_option import CalibrationOption, calibrated
from tvmstruct.commands.arrays import typical_inputs
from tvmstruct.commands.opening import check_folder, compile_buckets, open_model
from tvmstruct.commands.options import (
    AsJson,
    CachesOption,
    EnergyOption,
    Measure,
    Model,
    Plan,
    Precision,
    ShapeOption,
    Target,
    Threads,
)
from tvmstruct.commands.output import print_json, print_table
from tvmstruct.commands.shapes import own_buckets, parse_shapes
from tvmstruct.skip_option import LEGEND, Memory, SkipOption, chosen, skip_rows

if TYPE_CHECKING:
    from tvmstruct.energy_report import EnergyReport
    from tvmstruct.model_argument import ModelArgument
    from tvmstruct.models import Counts
    from tvmstruct.report import Report
    from tvmstruct.skip_analysis import SkipStatistics

EXAMPLE = (
    "Example: tvmstruct report model.tvms --html report.html; or, what skipping saves and "
    "loses, tvmstruct report 'random:bert?layers=1' --skip 8 --measure"
)


def report(
    model: Model,
    html: Annotated[
        Path | None, typer.Option(dir_okay=False, help="Write the table as a web page too.")
    ] = None,
    target: Target = "host",
    plan: Plan = None,
    shape: ShapeOption = None,
    precision: Precision = "f32",
    memory: Memory = "auto",
    skip: SkipOption = None,
    calibration: CalibrationOption = None,
    measure: Measure = False,
    energy: EnergyOption = False,
    caches: CachesOption = None,
    threads: Threads = None,
    as_json: AsJson = False,
) -> None:
    """Say for every layer of MODEL what it became, what it costs, and why."""
    check_folder(html)
    if energy and model.compiled:
        raise typer.BadParameter(f"{model} does not know what it moves; give its .onnx file")
    options = chosen(model, skip, memory) | calibrated(model, target, calibration)
    compiled = open_model(model, target, plan, threads, precision, **options)
    skipped: dict[str, SkipStatistics] = {}
    if not model.compiled:
        wanted = parse_shapes(shape) or own_buckets(model, compiled.inputs)[-1:]
        buckets = compile_buckets(compiled, wanted)
        if measure and skip is not None:
            skipped = compiled.measure_skip(typical_inputs(model, compiled, buckets[-1]))
    found = compiled.report(measure=True) if measure else compiled.report()
    if html is not None:
        title = f"<!doctype html><meta charset=utf-8><title>{Path(model.text).name}</title>"
        html.write_text(title + found._repr_html_(), encoding="utf-8")
    moved = _energy(compiled, caches, threads) if energy else None
    _show_report(found, _counts(model), moved, skipped, as_json=as_json)


def _show_report(
    found: Report,
    counts: Counts | None,
    moved: EnergyReport | None,
    skipped: Mapping[str, SkipStatistics],
    *,
    as_json: bool,
) -> None:
    """Print the table of layers and what else was asked for."""
    if as_json:
        more: dict[str, Any] = {} if counts is None else {"counts": counts.rows()}
        if moved is not None:
            more["energy"] = json.loads(moved.to_json())
        if skipped:
            more["skip"] = {name: asdict(statistics) for name, statistics in skipped.items()}
        print_json(json.loads(found.to_json()) | more)
        return
    found.show()
    if counts is not None:
        typer.echo(f"parameters, norms and biases included: {counts}")
    if moved is not None:
        moved.show()
    if skipped:
        print_table(skip_rows(skipped))
        typer.echo(LEGEND)


def _energy(compiled: Any, caches: str | None, threads: int | None) -> EnergyReport:
    """Return the energy report of the shapes that were compiled last."""
    from tvmstruct.caches import parse_caches

    known = None if caches is None else parse_caches(caches, threads or compiled.spec.threads)
    return compiled.energy(caches=known)


def _counts(model: ModelArgument) -> Counts | None:
    """Return the parameters of a built-in model by part."""
    if model.config is None:
        return None
    from tvmstruct import models

    return models.count(model.config)
