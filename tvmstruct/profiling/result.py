"""A `Profile`: one row for each operation class, as a table, JSON, CSV or a web page."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from io import StringIO
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.console import Console

OVERHEAD = "VM, Python and instrumentation"
COLUMNS = (
    *("profile", "class", "calls", "seconds", "share", "gflops", "bytes", "intensity"),
    "percent_of_roofline",
)

HEADS = ("class", "calls", "us", "share", "GFLOP/s", "MB", "FLOP/B", "% roof")


class DenormalWarning(RuntimeWarning):
    """Kernels wrote denormal numbers, so times may not be those of real inputs."""


@dataclass(frozen=True)
class Row:
    """One operation class.

    ``seconds`` of all its calls in one run of the model, ``share`` of the time of all kernels,
    ``gflops`` in GFLOP/s, ``bytes`` that its calls read and write, ``intensity`` in FLOP/byte,
    ``percent_of_roofline`` the least time that the machine's limits allow over the measured
    time, at float32 (so above 100 where a kernel multiplies in bfloat16 or int8, or reads what a
    nearer cache still holds), ``events`` what was counted.
    """

    name: str
    calls: int
    seconds: float
    share: float
    gflops: float
    bytes: int
    intensity: float
    percent_of_roofline: float
    events: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Profile:
    """Where the time of one model at one set of shapes goes.

    ``seconds`` is the median of whole calls without instrumentation, ``peak`` the float32
    multiply-add limit in GFLOP/s, ``bandwidth`` in GB/s at ``working_set`` bytes a thread,
    ``denormals`` the number of denormal values that each kernel wrote.
    """

    model: str
    label: str
    shapes: Mapping[str, tuple[int, ...]]
    threads: int
    precision: str
    target: str
    runs: int
    seconds: float
    peak: float
    bandwidth: float
    working_set: int
    rows: tuple[Row, ...]
    denormals: Mapping[str, int] = field(default_factory=dict)
    notes: tuple[str, ...] = ()

    @property
    def kernel_seconds(self) -> float:
        """Sum over all classes."""
        return sum(row.seconds for row in self.rows)

    @property
    def overhead(self) -> float:
        """Seconds of a whole call that no kernel accounts for; below 0, instrumentation cost it.

        On a busy machine a whole call is delayed more often than any one kernel, and the medians
        differ by that too.
        """
        return self.seconds - self.kernel_seconds

    @property
    def events(self) -> tuple[str, ...]:
        """Names of the events that were counted."""
        return tuple(self.rows[0].events) if self.rows else ()

    def row(self, name: str) -> Row:
        """Return the row of a class; ``KeyError`` where the model has no call of it."""
        for row in self.rows:
            if row.name == name:
                return row
        raise KeyError(f"{name!r}; the classes are {', '.join(row.name for row in self.rows)}")

    def to_json(self) -> str:
        """Return everything as JSON text."""
        return json.dumps(plain(self), indent=2)

    @classmethod
    def from_json(cls, text: str) -> Profile:
        """Return the profile that ``to_json`` wrote."""
        data = json.loads(text)
        for derived in ("overhead", "kernel_seconds"):
            data.pop(derived)
        data["rows"] = tuple(Row(**row) for row in data["rows"])
        data["shapes"] = {name: tuple(shape) for name, shape in data["shapes"].items()}
        return cls(**data | {"notes": tuple(data["notes"])})

    def to_csv(self) -> str:
        """Return a line for each class, with a header."""
        return to_csv([self])

    def to_html(self) -> str:
        """Return a web page that needs no other file; with matplotlib it has the plots too."""
        from tvmstruct.profiling.page import to_html

        return to_html([self])

    def show(self, console: Console | None = None) -> None:
        """Print the table, and one of the events if any were counted, in the terminal."""
        from rich.console import Console

        console = console or Console()
        for table in self._tables():
            console.print(table)
        for line in self.remarks():
            console.print(line, markup=False, highlight=False)

    def __str__(self) -> str:
        from rich.console import Console

        text = StringIO()
        self.show(Console(file=text, width=120))
        return text.getvalue()

    def _tables(self) -> list[Any]:
        tables = [make_table(self.title, HEADS, [cells(row) for row in self.rows])]
        if self.events:
            counts = [[r.name, *(f"{n:,.0f}" for n in r.events.values())] for r in self.rows]
            tables.append(make_table("", ["class", *self.events], counts))
        return tables

    @property
    def title(self) -> str:
        """What was profiled, in one line."""
        shapes = ", ".join(f"{n} {'x'.join(map(str, s))}" for n, s in self.shapes.items())
        return f"{self.model} {self.label}: {shapes}; {self.threads} threads, {self.precision}"

    def remarks(self) -> list[str]:
        """Return the lines under the table: what no kernel took, the machine's limits, warnings."""
        whole = (
            f"whole call {self.seconds * 1e6:.1f} us, kernels {self.kernel_seconds * 1e6:.1f} us"
        )
        limits = f"{self.peak:.0f} GFLOP/s (f32 FMA), {self.bandwidth:.0f} GB/s"
        size = f"{self.working_set / 1e6:.1f} MB a thread"
        lines = [
            f"{whole}; {OVERHEAD} {self.overhead * 1e6:.1f} us (medians of {self.runs} runs)",
            f"roofline: {limits} at {size}",
        ]
        if self.denormals:
            lines.append(denormal_text(self.denormals))
        return [*lines, *self.notes]


def denormal_text(denormals: Mapping[str, int]) -> str:
    """Return the warning that names the kernels that write denormal numbers."""
    named = ", ".join(f"{name} ({count})" for name, count in denormals.items())
    return (
        f"denormal numbers in the results of {named}: CPUs compute with them many times slower, "
        "so these times may not be those of real inputs; scale the weights or the inputs"
    )


def make_table(title: str, columns: Sequence[str], rows: Iterable[Sequence[str]]) -> Any:
    """Return a table for the terminal, the first column to the left."""
    from rich import box
    from rich.table import Table

    table = Table(title=title, box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), title_justify="left")
    for i, name in enumerate(columns):
        table.add_column(name, justify="right" if i else "left", no_wrap=True)
    for row in rows:
        table.add_row(*row)
    return table


def cells(row: Row) -> list[str]:
    """Return a row of the table as texts."""
    return [
        row.name,
        str(row.calls),
        f"{row.seconds * 1e6:.1f}",
        f"{row.share:.1%}",
        f"{row.gflops:.1f}",
        f"{row.bytes / 1e6:.2f}",
        f"{row.intensity:.1f}",
        f"{row.percent_of_roofline:.0f}",
    ]


def plain(profile: Profile) -> dict[str, Any]:
    """Return a profile as data for JSON, with what is derived from it."""
    derived = {"kernel_seconds": profile.kernel_seconds, "overhead": profile.overhead}
    return asdict(profile) | derived


def to_csv(profiles: Sequence[Profile]) -> str:
    """Return a line for each class of each profile, with one header."""
    text = StringIO()
    events = profiles[0].events if profiles else ()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow([*COLUMNS, *events])
    for profile in profiles:
        writer.writerows(_line(profile, row, events) for row in profile.rows)
    return text.getvalue()


def _line(profile: Profile, row: Row, events: Iterable[str]) -> list[object]:
    values = asdict(row)
    rest = [values[name] for name in COLUMNS[2:]]
    return [profile.label, row.name, *rest, *(row.events.get(event, 0.0) for event in events)]
