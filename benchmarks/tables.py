"""What a benchmark prints: a table with one row for each goal, the roofline, and a summary."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence

from claims import Result, Verdict, judge
from peers import OURS, OURS_BF16, OURS_DENSE, OURS_INT8
from rich.console import Console
from rich.table import Table
from roofline import Roof

SHORT = {
    OURS: "ours",
    OURS_BF16: "ours bf16",
    OURS_INT8: "ours int8",
    OURS_DENSE: "own dense",
    "onnxruntime": "ORT",
    "openvino-f32": "OV f32",
    "openvino-default": "OV default",
}
COLOURS = {"met": "green", "other met": "green", "missed": "yellow", "FAILED": "bold red"}
WIDEST = 400


def show(title: str, results: Sequence[Result], roof: Roof) -> None:
    """Print everything that was found."""
    table = _table(title, results)
    console = Console(width=WIDEST, highlight=False)
    console.width = console.measure(table).maximum  # the shell may break lines, the table may not
    console.print(table)
    for text in (*describe(roof), *_remarks(results), *_summary(results)):
        console.print(text, markup=False, soft_wrap=True)


def _table(title: str, results: Sequence[Result]) -> Table:
    others = by_name(results)
    names = list(dict.fromkeys(n for r in results for n in r.line.runners))
    names.sort(key=lambda name: not name.startswith(OURS))
    table = Table(title=f"{title}: medians in us, spread between the quartiles")
    table.add_column("case", no_wrap=True)
    for name in names:
        table.add_column(SHORT.get(name, name), justify="right", no_wrap=True)
    table.add_column("roofline", justify="right")
    table.add_column("goal", no_wrap=True)
    for column in ("reached", "wanted", "bound"):
        table.add_column(column, justify="right", no_wrap=True)
    table.add_column("verdict", no_wrap=True)
    for result in results:
        for row in _rows(result, names, others):
            table.add_row(*row)
    return table


def _rows(result: Result, names: Sequence[str], others: Mapping[str, Result]) -> list[list[str]]:
    share = f"{result.share:.0%}" if result.share else "-"
    times = [result.line.name, *(_time(result, name) for name in names), share]
    blank = [""] * len(times)
    verdicts = judge(result, others)
    rows = [
        (times if i == 0 else blank) + _cells(verdict, result) for i, verdict in enumerate(verdicts)
    ]
    return rows or [[*times, "for comparison", "", "", "", ""]]


def _time(result: Result, name: str) -> str:
    if name not in result.seconds:
        return "failed" if name in result.failures else ""
    spread = result.spread.get(name)
    suffix = "" if spread is None else f" ±{spread / result.seconds[name] / 2:.0%}"
    return f"{result.seconds[name] * 1e6:.1f}{suffix}"


def _cells(verdict: Verdict, result: Result) -> list[str]:
    wanted = f"{verdict.least:.3g}"
    if verdict.least < verdict.stated:
        wanted += f" (stated {verdict.stated:g})"
    numbers = [f"{v:.3g}" if v is not None else "-" for v in (verdict.value, verdict.bound)]
    colour = COLOURS.get(verdict.word)
    word = f"[{colour}]{verdict.word}[/]" if colour else verdict.word
    return [verdict.label, numbers[0], wanted, numbers[1], word]


def describe(roof: Roof) -> list[str]:
    """Return the measured limits, and those that this CPU does not have."""
    peaks = [f"{name} {value:.0f} GFLOP/s" for name, value in roof.peaks.items()]
    reads = [f"{level} {value:.0f} GB/s" for level, value in roof.bandwidths.items()]
    text = f"roofline, {roof.threads} threads: {', '.join(peaks)}; reading {', '.join(reads)}"
    return [text, *(f"skipped: {why}" for why in roof.skipped)]


def _remarks(results: Sequence[Result]) -> list[str]:
    found: dict[str, list[str]] = {}
    for r in results:
        for name, why in r.failures.items():
            found.setdefault(f"{name} did not run: {why}", []).append(r.line.name)
        for name, form in r.forms.items():
            asked = {OURS_BF16: "bf16", OURS_INT8: "int8"}.get(name, "")
            if asked not in form:
                found.setdefault(f"{name} compiled as {form}, in f32", []).append(r.line.name)
    return [f"{text} ({', '.join(lines)})" for text, lines in found.items()]


def _summary(results: Sequence[Result]) -> list[str]:
    others = by_name(results)
    words = Counter(v.word for r in results for v in judge(r, others))
    low = [
        f"{r.line.name} {r.share:.0%}"
        for r in results
        if r.share is not None and r.share < r.line.least_share
    ]
    return [
        "goals: " + ", ".join(f"{count} {word}" for word, count in words.items()),
        "under 80% of the roofline (one row: 70%): " + ("; ".join(low) or "none"),
    ]


def by_name(results: Sequence[Result]) -> dict[str, Result]:
    """Return the results by the names of their lines."""
    return {r.line.name: r for r in results}
