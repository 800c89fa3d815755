"""Tables and JSON on stdout."""

from __future__ import annotations

import json
from typing import Any

import typer


def print_table(rows: list[dict[str, Any]]) -> None:
    """Print rows with the same keys under one heading."""
    from rich.console import Console
    from rich.table import Table

    table = Table(*rows[0]) if rows else Table()
    for row in rows:
        cells = (f"{v:.6g}" if isinstance(v, float) else str(v) for v in row.values())
        table.add_row(*cells)
    Console().print(table)


def print_json(data: Any) -> None:
    """Print JSON, indented."""
    typer.echo(json.dumps(data, indent=2))
