"""``tvmstruct vta timeline``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

AsJson = Annotated[bool, typer.Option("--json", help="Print JSON on stdout.")]
Program = Annotated[
    Path,
    typer.Argument(
        exists=True, dir_okay=False, metavar="FILE", help="Instructions, 16 bytes each."
    ),
]
ConfigFile = Annotated[
    Path | None,
    typer.Option(
        "--config", exists=True, dir_okay=False, help="JSON of the design; default VTA's."
    ),
]
ROWS = 200


def register(app: typer.Typer) -> None:
    """Add the command to ``tvmstruct vta``."""
    app.command(epilog="Example: tvmstruct vta timeline program.insn --png program.png")(timeline)


def timeline(
    program: Program,
    png: Annotated[
        Path | None, typer.Option(dir_okay=False, help="Draw the units over time.")
    ] = None,
    config: ConfigFile = None,
    first: Annotated[int, typer.Option("--from", min=0, help="First instruction shown.")] = 0,
    count: Annotated[int, typer.Option(min=1, help="Instructions shown.")] = ROWS,
    as_json: AsJson = False,
) -> None:
    """Predict the cycles of a VTA program and say which instruction waited for what."""
    if png is not None and not png.parent.is_dir():
        raise typer.BadParameter(f"{png}: there is no folder {png.parent}")
    from tvmstruct.vta import timeline as pictures
    from tvmstruct.vta.config import DEFAULT, Config
    from tvmstruct.vta.cycles import predict
    from tvmstruct.vta.files import read_bytes
    from tvmstruct.vta.isa import decode_stream

    design = DEFAULT if config is None else Config.from_json(config)
    stream = decode_stream(read_bytes(program), design, ignore_unused=True)
    found = predict(stream, design)
    if png is not None:
        png.write_bytes(pictures.to_png(found, first, count))
    if as_json:
        typer.echo(json.dumps(_plain(found), indent=2))
    else:
        typer.echo(pictures.text(found, first, count))


def _plain(found: Any) -> dict[str, Any]:
    from tvmstruct.vta.timeline import describe

    keys = ("queued", "start", "end", "reason", "blocker", "memory")
    return {
        "cycles": found.cycles,
        "busy": found.busy,
        "utilisation": found.utilisation,
        "waits": found.waits,
        "instructions": [
            {"instruction": describe(i), **{key: getattr(span, key) for key in keys}}
            for i, span in zip(found.stream, found.spans, strict=False)
        ],
    }
