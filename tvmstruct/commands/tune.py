"""``tvmstruct tune``: a search for the best schedules."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from tvmstruct.calibration_option import CalibrationOption, calibrated
from tvmstruct.commands.options import AsJson, Precision, ShapeOption, SourceModel, Target
from tvmstruct.commands.shapes import complete, own_buckets, parse_shapes

EXAMPLE = (
    "Example: tvmstruct tune model.onnx --shape input_ids=1x128 --trials 200 --database tuned/"
)


def tune(
    model: SourceModel,
    target: Target = "host",
    shape: ShapeOption = None,
    precision: Precision = "f32",
    trials: Annotated[
        int, typer.Option(help="Schedules to measure for each kernel and shape.")
    ] = 200,
    database: Annotated[
        Path, typer.Option(file_okay=False, help="Folder of the records; kept and added to.")
    ] = Path("tuned"),
    tracker: Annotated[
        str | None,
        typer.Option(
            "--rpc-tracker", metavar="HOST:PORT", help="Measure on the servers of a TVM tracker."
        ),
    ] = None,
    key: Annotated[
        str | None, typer.Option("--rpc-key", help="Which servers of the tracker.")
    ] = None,
    seed: Annotated[int, typer.Option(help="Of the search.")] = 0,
    calibration: CalibrationOption = None,
    as_json: AsJson = False,
) -> None:
    """Measure schedules of every kernel of MODEL, keep the best; an interrupted run goes on."""
    rpc = _tracker(tracker, key)
    options = calibrated(model, target, calibration)
    from tvmstruct.progress import working

    with working(f"reading {model}"):
        import tvmstruct

        source = model.source()
    wanted = parse_shapes(shape) or own_buckets(model, source.inputs)
    report = tvmstruct.tune(
        source,
        target,
        shapes=[complete(bucket, source.inputs) for bucket in wanted],
        precision=precision,
        trials=trials,
        database=database,
        rpc=rpc,
        seed=seed,
        **options,
    )
    if as_json:
        typer.echo(report.to_json())
    else:
        report.show()
        given = "" if precision == "f32" else f"precision={precision!r}, "
        how = f"compile(..., {given}database={str(database)!r})"
        typer.echo(f"records: {database}; use them with {how}")


def _tracker(address: str | None, key: str | None) -> tuple[str, int, str] | None:
    """Return (host, port, key) of --rpc-tracker and --rpc-key, which come together."""
    if address is None and key is None:
        return None
    host, _, port = (address or "").rpartition(":")
    if not (host and port.isdecimal() and key):
        raise typer.BadParameter("give both: --rpc-tracker HOST:PORT and --rpc-key KEY")
    return host, int(port), key
