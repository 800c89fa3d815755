"""What became of every layer, and why: a table in the terminal, in a notebook, or as JSON."""

from __future__ import annotations

import html
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console

COLUMNS = ("layer", "shape", "form", "params", "macs", "bytes", "time", "error", "reason")

REASON = len(COLUMNS) - 1
NUMERIC = {"params", "macs", "bytes", "time", "error"}
SHOWN = 24  # last characters of a name in the terminal; JSON, HTML and ``layers`` have all of it


@dataclass(frozen=True)
class LayerRecord:
    """One layer; ``macs`` are multiply-adds per row, ``seconds`` is None until measured."""

    name: str
    shape: tuple[int, ...]
    form: str
    parameters: Mapping[str, object] = field(default_factory=dict)
    params: int = 0
    macs: int = 0
    bytes: int = 0
    seconds: float | None = None
    error: float = 0.0
    reason: str = ""


@dataclass(frozen=True)
class Report:
    """All layers of a model and what they add up to."""

    layers: tuple[LayerRecord, ...]
    target: str = ""
    buckets: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()

    @property
    def params(self) -> int:
        """Stored parameters of all layers."""
        return sum(layer.params for layer in self.layers)

    def to_json(self) -> str:
        """Return the report as JSON text."""
        return json.dumps(asdict(self), indent=2, default=str)

    def show(self, console: Console | None = None) -> None:
        """Print the table in the terminal."""
        from rich.console import Console

        console = console or Console()
        console.print(self._table(console.width))

    def __str__(self) -> str:
        from io import StringIO

        from rich.console import Console

        text = StringIO()
        Console(file=text, width=160).print(self._table(160))
        return text.getvalue()

    def _table(self, width: int):
        from rich import box
        from rich.table import Table

        target = self.target.split(":+", maxsplit=1)[0]
        title = f"{len(self.layers)} layers, {self.params:,} parameters, {target}"
        table = Table(title=title, box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
        rows = [_cells(layer) for layer in self.layers]
        for row in rows:
            row[0] = row[0] if len(row[0]) <= SHOWN else f"...{row[0][3 - SHOWN :]}"
        shown = [i for i, c in enumerate(COLUMNS) if c != "bytes" and any(row[i] for row in rows)]
        taken = sum(max(len(row[i]) for row in rows) + 2 for i in shown if i != REASON)
        room = max(12, width - taken)
        for i in shown:
            numeric = COLUMNS[i] in NUMERIC
            table.add_column(COLUMNS[i], justify="right" if numeric else "left", no_wrap=True)
        for row in rows:
            row[REASON] = row[REASON] if len(row[REASON]) <= room else f"{row[REASON][: room - 1]}…"
            table.add_row(*(row[i] for i in shown))
        notes = [f"compiled: {', '.join(self.buckets) or 'nothing'}", *self.notes]
        table.caption = "; ".join(notes)
        return table

    def _repr_html_(self) -> str:
        head = "".join(f"<th>{column}</th>" for column in COLUMNS)
        rows = "".join(
            "<tr>" + "".join(f"<td>{html.escape(c)}</td>" for c in _cells(layer)) + "</tr>"
            for layer in self.layers
        )
        caption = html.escape(f"{self.params:,} parameters, {self.target}")
        return f"<table><caption>{caption}</caption><tr>{head}</tr>{rows}</table>"


def _cells(layer: LayerRecord) -> list[str]:
    values = ", ".join(f"{k}={v}" for k, v in layer.parameters.items())
    return [
        layer.name,
        "x".join(map(str, layer.shape)),
        f"{layer.form} ({values})" if values else layer.form,
        f"{layer.params:,}",
        f"{layer.macs:,}",
        f"{layer.bytes:,}",
        "" if layer.seconds is None else f"{layer.seconds * 1e6:.1f} us",
        f"{layer.error:.1e}" if layer.error else "",
        layer.reason,
    ]
