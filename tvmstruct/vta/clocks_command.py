"""What ``tvmstruct vta clocks`` prints."""

from __future__ import annotations

import json

import typer

from tvmstruct.vta.tpu_clock import ROWS, Row

HEAD = f"{'table, task, model':<55}{'params':>9}{'paper':>9}{'clocks':>9}{'paper':>9}{'differ':>9}"


def plain(row: Row) -> dict[str, object]:
    """Return a row of the table: millions of weights and clocks, and the difference in percent."""
    return {
        "table": row.table,
        "task": row.task,
        "model": row.workload.name,
        "form": ("VVMA" if row.vvma else "original") + ("" if row.diagonals else ", M alone"),
        "k": row.k,
        "params": round(row.params, 2),
        "paper's params": row.printed_params,
        "clocks": round(row.clocks, 2),
        "paper's clocks": row.printed_clocks,
        "difference %": round(100 * row.difference, 2),
    }


def show(*, as_json: bool) -> None:
    """Print the rows of Tables 1 to 3 of VVMA as the clock model gives them."""
    rows = [plain(row) for row in ROWS]
    if as_json:
        typer.echo(json.dumps(rows, indent=2))
        return
    typer.echo(HEAD)
    for row in ROWS:
        numbers = row.params, row.printed_params, row.clocks, row.printed_clocks
        typer.echo(f"{row.label:<55}" + "".join(f"{n:9.2f}" for n in numbers) + _percent(row))


def _percent(row: Row) -> str:
    return f"{row.difference:+9.2%}"
