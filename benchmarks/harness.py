"""Run lines of cases against all contenders, interleaved, and print ratios with the roofline.

A line is one claim: what we run, what the peers run, how much work it is, and the goal. Each
round times every contender once; medians are over all rounds, and the spread is the distance
between the quartiles. "bound" is the best ratio that the measured roofline allows.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

import roofline
from peers import F32_PEERS, PEERS, Case, Worker, environment
from rich.console import Console
from rich.progress import track
from rich.table import Table

OURS = "tvmstruct"


@dataclass(frozen=True)
class Line:
    """One claim. ``flops`` and ``bytes`` are those that ours needs for one call of one layer."""

    name: str
    case: Case
    goal: float | None = None
    flops: float = 0.0
    bytes: float = 0.0
    stack: int = 1
    peers: tuple[str, ...] = PEERS
    best_of: tuple[str, ...] = F32_PEERS
    ours: str = OURS


@dataclass
class Result:
    """Median seconds and spread of every contender, and what follows."""

    line: Line
    seconds: dict[str, float] = field(default_factory=dict)
    spread: dict[str, float] = field(default_factory=dict)
    failures: dict[str, str] = field(default_factory=dict)
    roof_seconds: float = 0.0

    @property
    def ratio(self) -> float | None:
        """Best peer's time over ours."""
        times = [self.seconds[p] for p in self.line.best_of if p in self.seconds]
        ours = self.seconds.get(self.line.ours)
        return min(times) / ours if times and ours else None

    @property
    def share(self) -> float | None:
        """Share of the roofline that we reach."""
        ours = self.seconds.get(self.line.ours)
        return self.roof_seconds / ours if self.roof_seconds and ours else None


def run(lines: Sequence[Line], *, title: str, threads: int, rounds: int, seconds: float) -> dict:
    """Measure all lines, print the table and return everything as plain data."""
    roof = roofline.measure(threads)
    results = [Result(line) for line in lines]
    names = dict.fromkeys(n for line in lines for n in (*line.peers, line.ours))
    workers = {name: Worker(name, threads) for name in names}
    try:
        for i, result in enumerate(track(results, title)):
            _measure(result, str(i), workers, rounds, seconds)
            result.roof_seconds = _roof(result.line, roof)
    finally:
        for worker in workers.values():
            worker.close()
    _show(results, roof, title, threads)
    return {
        "title": title,
        "machine": {"cpu": _cpu(), "threads": threads, **environment()},
        "roofline": roof,
        "lines": [{**asdict(r), "ratio": r.ratio, "share_of_roofline": r.share} for r in results],
    }


def _measure(
    result: Result, key: str, workers: dict[str, Worker], rounds: int, seconds: float
) -> None:
    line = result.line
    active: dict[str, list[float]] = {}
    for name in (*line.peers, line.ours):
        try:
            workers[name].ask("prepare", key, line.case)
            active[name] = []
        except RuntimeError as error:
            result.failures[name] = str(error)
    for _ in range(rounds):
        for name, times in active.items():
            times.extend(workers[name].ask("time", key, seconds))
    for name, times in active.items():
        quarters = statistics.quantiles(times, n=4)
        result.seconds[name] = statistics.median(times) / line.stack
        result.spread[name] = (quarters[2] - quarters[0]) / line.stack


def _roof(line: Line, roof: dict[str, float]) -> float:
    """Return the seconds that FMA peak and bandwidth of the fitting level allow at best."""
    level = next((n for n, size in roofline.LEVELS.items() if line.bytes <= size), "memory")
    bandwidth = line.bytes / (roof[f"{level}_gbps"] * 1e9)
    return max(line.flops / (roof["fma_gflops"] * 1e9), bandwidth)


def _show(results: list[Result], roof: dict[str, float], title: str, threads: int) -> None:
    table = Table(title=f"{title}, {threads} threads, medians")
    columns = ("case", "ours us", *PEERS, "ratio", "goal", "share of roofline", "bound")
    for i, column in enumerate(columns):
        table.add_column(column, justify="right" if i else "left")
    for r in results:
        ours = r.seconds.get(r.line.ours)
        cells = [r.line.name, f"{ours * 1e6:.1f}" if ours else "failed"]
        cells += [f"{r.seconds[p] * 1e6:.1f}" if p in r.seconds else "-" for p in PEERS]
        bound = r.ratio / r.share if r.ratio and r.share else None
        cells += [f"{r.ratio:.2f}" if r.ratio else "-", f"{r.line.goal}" if r.line.goal else ""]
        cells += [f"{r.share:.0%}" if r.share else "", f"{bound:.2f}" if bound else ""]
        table.add_row(*cells)
    console = Console(width=140)
    console.print(table)
    console.print(", ".join(f"{name} {value:.0f}" for name, value in roof.items()))
    for r in results:
        for name, why in r.failures.items():
            console.print(f"{r.line.name}: {name} did not run: {why}")


def _cpu() -> str:
    names = [x for x in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in x]
    return names[0].split(":")[1].strip() if names else platform.processor()


def main(lines: Sequence[Line], title: str) -> None:
    """Run as a script: print the table, and write JSON with ``--json``."""
    parser = argparse.ArgumentParser(description=title)
    parser.add_argument("--threads", type=int, default=0, help="0: all physical cores")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=0.15, help="per contender and round")
    parser.add_argument("--json", type=Path, help="file for the figures")
    parser.add_argument("--only", default="", help="lines whose name contains this")
    options = parser.parse_args()
    from tvmstruct.threads import available_threads

    found = run(
        [line for line in lines if options.only in line.name],
        title=title,
        threads=options.threads or available_threads(),
        rounds=options.rounds,
        seconds=options.seconds,
    )
    if options.json:
        options.json.write_text(json.dumps(found, indent=2))
