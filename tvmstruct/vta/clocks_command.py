"""``tvmstruct vta clocks``."""

from __future__ import annotations

import json
from typing import Annotated

import typer

AsJson = Annotated[bool, typer.Option("--json", help="Print JSON on stdout.")]


def register(app: typer.Typer) -> None:
    """Add the command to ``tvmstruct vta``."""
    app.command(epilog="Example: tvmstruct vta clocks --json")(clocks)


def clocks(as_json: AsJson = False) -> None:
    """Show the clock model of the VVMA paper beside its Tables 1 to 3 (in millions)."""
    from tvmstruct.vta.tpu_clock import ROWS, table, to_plain

    if as_json:
        typer.echo(json.dumps([to_plain(row) for row in ROWS], indent=2))
    else:
        typer.echo(table())
