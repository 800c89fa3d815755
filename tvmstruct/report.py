"""What became of every layer, and why: a table in the terminal, in a notebook, or as JSON."""

from __future__ import annotations

import html
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field

COLUMNS = ("layer", "shape", "form", "params", "macs", "bytes", "time", "error", "reason")

SHOWN = 60  # characters of a reason in the terminal; JSON, HTML and ``layers`` have all of it


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

    def show(self, console=None) -> None:
        """Print the table in the terminal."""
        from rich.console import Console

        (console or Console()).print(self._table())

    def __str__(self) -> str:
        from io import StringIO

        from rich.console import Console

        text = StringIO()
        Console(file=text, width=160).print(self._table())
        return text.getvalue()

    def _table(self):
        from rich.table import Table

        target = self.target.split(":+", maxsplit=1)[0]
        table = Table(title=f"{len(self.layers)} layers, {self.params:,} parameters, {target}")
        for column in COLUMNS:
            table.add_column(column, overflow="fold")
        for layer in self.layers:
            *cells, reason = _cells(layer)
            table.add_row(*cells, reason if len(reason) <= SHOWN else f"{reason[:SHOWN]}...")
        table.caption = "; ".join([f"buckets: {', '.join(self.buckets) or 'none'}", *self.notes])
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
