"""Run lines against all contenders, interleaved, beside the roofline, and say what became of them.

Each round times every contender of a line once; medians are over the calls of all rounds, and the
spread is the distance between the quartiles.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

import tables
from cases import Encoder, Stack, Weights, Work, encoder_work
from claims import Line, RateOf, Result, plain
from peers import Worker, environment
from rich.progress import track
from roofline import Roof

PAUSE = 0.3  # seconds: threads of the contender before may still spin for more work


def main(lines: Sequence[Line], title: str) -> None:
    """Run as a script: measure, print, write JSON with ``--json``; exit 1 if ours failed."""
    parser = make_parser(title)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=0.15, help="per contender and round")
    options = parser.parse_args()
    roof = Roof(threads(options))
    results = run(select(lines, options.only), roof, options.rounds, options.seconds)
    finish(title, results, roof, options.json)


def make_parser(title: str) -> argparse.ArgumentParser:
    """Return a parser with the options of every benchmark."""
    parser = argparse.ArgumentParser(description=title)
    parser.add_argument("--threads", type=int, default=0, help="0: all physical cores")
    parser.add_argument("--json", type=Path, help="file for the figures")
    parser.add_argument("--only", default="", help="lines whose name contains this")
    return parser


def threads(options: argparse.Namespace) -> int:
    """Return how many threads every contender gets."""
    from tvmstruct.threads import available_threads

    return options.threads or available_threads()


def select(lines: Sequence[Line], only: str) -> list[Line]:
    """Return the lines whose name contains ``only``, and those that they are compared with."""
    chosen = [line for line in lines if only in line.name]
    needed = {g.other for line in chosen for g in line.goals if isinstance(g, RateOf)}
    return [line for line in lines if line in chosen or line.name in needed]


def run(lines: Sequence[Line], roof: Roof, rounds: int, seconds: float) -> list[Result]:
    """Measure all lines."""
    names = dict.fromkeys(n for line in lines for n in line.runners)
    workers = {name: Worker(name, roof.threads) for name in names}
    try:
        with tempfile.TemporaryDirectory() as folder:
            weights = Weights(Path(folder))
            # Written to a terminal only: a progress bar is no part of a table in a file.
            todo = track(lines, "measuring", disable=not sys.stdout.isatty())
            return [_measure(line, weights, workers, roof, rounds, seconds) for line in todo]
    finally:
        for worker in workers.values():
            worker.close()


def _measure(
    line: Line,
    weights: Weights,
    workers: dict[str, Worker],
    roof: Roof,
    rounds: int,
    seconds: float,
) -> Result:
    work, files = _work(line, weights)
    result = Result(line, work)
    roof.measure(work, line.precision)
    for name in line.runners:
        try:
            if form := workers[name].prepare(line.case, files):
                result.forms[name] = form
        except RuntimeError as error:
            result.failures[name] = str(error)
    for name, found in _time_in_turns(result, workers, rounds, seconds).items():
        quarters = statistics.quantiles(found, n=4)
        result.seconds[name] = statistics.median(found) / line.layers
        result.spread[name] = (quarters[2] - quarters[0]) / line.layers
    roof.measure(work, line.precision)
    return result


def _time_in_turns(
    result: Result, workers: dict[str, Worker], rounds: int, seconds: float
) -> dict[str, list[float]]:
    """Return the seconds of all calls of every contender that has not failed."""
    line, times = result.line, defaultdict[str, list[float]](list)
    for _ in range(rounds):
        for name in line.runners:
            if name not in result.failures:
                try:
                    time.sleep(PAUSE)
                    times[name].extend(workers[name].time(seconds))
                except RuntimeError as error:
                    result.failures[name] = str(error)
    return {name: found for name, found in times.items() if name not in result.failures}


def _work(line: Line, weights: Weights) -> tuple[Work, list[str]]:
    match line.case:
        case Stack() as stack:
            return weights.of(stack)
        case Encoder() as encoder:
            return encoder_work(encoder), []
        case case:
            return case.work(), []


def finish(title: str, results: Sequence[Result], roof: Roof, file: Path | None) -> None:
    """Print what was found, write it to a file, and exit 1 where something of ours failed."""
    for r in results:
        r.roof_seconds = roof.seconds(r.work, r.line.precision)
        r.peak = roof.peak(r.line.precision)
    tables.show(title, results, roof)
    if file:
        others = tables.by_name(results)
        found = {
            "title": title,
            "machine": {"cpu": _cpu(), "threads": roof.threads, **environment()},
            "roofline": roof.plain(),
            "lines": [plain(r, others) for r in results],
        }
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(found, indent=2, default=dict))
    sys.exit(any(r.failed for r in results))


def _cpu() -> str:
    names = [x for x in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in x]
    return names[0].split(":")[1].strip() if names else platform.processor()
