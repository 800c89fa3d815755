"""What one call of a compiled model moves, by kernel and level of the memory, and its energy."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from tvmstruct.caches import LEVELS, MEMORY, Caches
from tvmstruct.energy import ASSUMPTIONS, Energy, Traffic, add_up, at, operands

if TYPE_CHECKING:
    from rich.console import Console

    from tvmstruct.pipeline import Lowered
    from tvmstruct.profiling.steps import Moved, Step

SHOWN = 40  # last characters of a label in the terminal


@dataclass(frozen=True)
class EnergyRow:
    """One kernel of the model, all of whose calls are added up."""

    name: str
    calls: int
    traffic: Traffic

    @property
    def energy(self) -> Energy:
        """Energy of all calls."""
        return self.traffic.energy


@dataclass(frozen=True)
class EnergyReport:
    """Bytes by level and energy of one call of a model, in steady state.

    ``weights`` are the bytes of them that a call reads, ``home`` the level they are read from.
    """

    rows: tuple[EnergyRow, ...]
    caches: Caches
    weights: int
    home: str
    shapes: str = ""
    notes: tuple[str, ...] = ()

    @property
    def traffic(self) -> Traffic:
        """Bytes of all kernels."""
        return add_up(row.traffic for row in self.rows)

    @property
    def energy(self) -> Energy:
        """Energy of one call."""
        return self.traffic.energy

    @property
    def assumptions(self) -> tuple[str, ...]:
        """What the estimate takes for granted."""
        held = f"a call reads {self.weights / 1e6:.1f} MB of weights from {self.home}"
        return (*ASSUMPTIONS, f"caches: {self.caches}; {held}")

    def to_json(self) -> str:
        """Return the report as JSON text: bytes and joules."""
        rows = [
            {"name": r.name, "calls": r.calls, "bytes": dict(r.traffic.bytes), **_joules(r.energy)}
            for r in self.rows
        ]
        whole = {"bytes": dict(self.traffic.bytes), **_joules(self.energy)}
        found = {"shapes": self.shapes, "weights": self.weights, "home": self.home}
        said = {"notes": self.notes, "assumptions": self.assumptions}
        return json.dumps({**found, **whole, "rows": rows, **said}, indent=2)

    def show(self, console: Console | None = None) -> None:
        """Print the table and the assumptions in the terminal."""
        from rich import box
        from rich.console import Console
        from rich.table import Table

        console = console or Console()
        title = f"one call {self.shapes}: {self.energy}"
        table = Table(title=title, box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
        table.add_column("kernel")
        for name in ("calls", *(f"{level} MB" for level in LEVELS), "energy"):
            table.add_column(name, justify="right", no_wrap=True)
        for row in (*self.rows, EnergyRow("all", sum(r.calls for r in self.rows), self.traffic)):
            table.add_row(*_cells(row))
        console.print(table)
        for line in (*self.notes, *self.assumptions):
            console.print(line, markup=False, highlight=False)

    def __str__(self) -> str:
        from io import StringIO

        from rich.console import Console

        text = StringIO()
        self.show(Console(file=text, width=120))
        return text.getvalue()


def energy_report(lowered: Lowered, caches: Caches, shapes: str = "") -> EnergyReport:
    """Return what one call of a lowered module moves, and from where."""
    from tvmstruct.profiling.steps import read_steps

    steps = read_steps(lowered)
    weights = round(sum(map(_weights, steps)))
    home = caches.holding(weights, split=True)
    found: dict[str, EnergyRow] = {}
    for step in steps:
        row = found.get(step.label, EnergyRow(step.label, 0, Traffic()))
        traffic = row.traffic + step_traffic(step, caches, home)
        found[step.label] = EnergyRow(step.label, row.calls + 1, traffic)
    said = tuple(dict.fromkeys(note for step in steps for note in _notes(step, caches)))
    return EnergyReport(tuple(found.values()), caches, weights, home, shapes, said)


def step_traffic(step: Step, caches: Caches, home: str) -> Traffic:
    """Return the bytes of one kernel call.

    Weights come from ``home``, where the model's are; rows of a table from where the table is.
    Kernels of ours also load the operands of their products.
    """
    from tvmstruct.table_traffic import LOOKUPS, lookup_traffic

    if isinstance(step.node, LOOKUPS):
        return lookup_traffic(step.node, step.rows, caches, home)
    parts = [at(_level(m, caches, home), m.bytes) for m in step.moved if m.bytes]
    if step.node is not None:
        parts.append(operands(step.flops / 2))
    return add_up(parts)


def _notes(step: Step, caches: Caches) -> Iterator[str]:
    """Yield what there is to say of a call's tables."""
    from tvmstruct.table_traffic import notes

    if step.node is not None:
        yield from notes(step.node, caches)


def _weights(step: Step) -> float:
    """Return the bytes of weights that a call reads."""
    from tvmstruct.table_traffic import LOOKUPS, touched_bytes

    if isinstance(step.node, LOOKUPS):
        return touched_bytes(step.node, step.rows)
    return sum(m.bytes for m in step.moved if m.weight)


def _level(moved: Moved, caches: Caches, home: str) -> str:
    if not moved.weight:
        return caches.holding(moved.size, split=True)
    return max(home, caches.holding(moved.size), key=LEVELS.index) if _part(moved) else home


def _part(moved: Moved) -> bool:
    return moved.bytes < moved.size


def _joules(energy: Energy) -> dict[str, float]:
    return {"joules_low": energy.low, "joules_high": energy.high}


def _cells(row: EnergyRow) -> Iterable[Any]:
    name = row.name if len(row.name) <= SHOWN else f"...{row.name[3 - SHOWN :]}"
    return [name, str(row.calls), *_megabytes(row.traffic), str(row.energy)]


def _megabytes(traffic: Traffic) -> Iterator[str]:
    for level in LEVELS:
        size = traffic[level]
        yield f"{size / 1e6:.3f}" if size or level == MEMORY else ""
