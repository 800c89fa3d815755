"""How near the default schedules come to what ``tune`` finds, for dense and structured layers.

The time of tuned code over that of the default, both from ``TuneReport``: 1 where the search found
nothing better. Kernels without choices cannot be tuned, and are named.
"""

from __future__ import annotations

import tempfile
from dataclasses import replace
from pathlib import Path

from bench_dense import MANY, SHAPES
from cases import Stack, Weights, load
from claims import Faster, Line, Result
from contenders import stack_model
from harness import finish, make_parser, select, threads
from peers import OURS
from roofline import Roof

import tvmstruct
from tvmstruct.targets import TargetSpec

TITLE = "Default schedules beside tuned ones, f32"
TUNED, NEAR = "tuned", 0.9
VVMA_ROWS, LOW_RANK_ROWS = (1, 8, 128), (1, 128)


def lines() -> list[Line]:
    """Return the dense shapes, VVMA and low rank, one layer each."""
    cases = {f"dense {r}x{k}x{n}": Stack(r, k, n, 1) for r in (MANY, 1) for k, n in SHAPES}
    for rows in VVMA_ROWS:
        name = f"VVMA 1024x1024 k=32 batch {rows}"
        cases[name] = Stack(rows, 1024, 1024, 1, "vvma", {"k": 32})
    for rows in LOW_RANK_ROWS:
        name = f"low rank 1024x1024 r=128 batch {rows}"
        cases[name] = Stack(rows, 1024, 1024, 1, "low_rank", {"r": 128})
    goals = (Faster(NEAR, (TUNED,)),)
    return [
        Line(name, case, goals, contenders=(TUNED,), bounded=False) for name, case in cases.items()
    ]


def tune_line(
    line: Line,
    weights: Weights,
    roof: Roof,
    spec: TargetSpec,
    trials: int,
    database: Path,
) -> Result:
    """Tune the kernels of a line and add up what the report says."""
    assert isinstance(line.case, Stack)
    work, files = weights.of(line.case)
    roof.measure(work, line.precision)
    layers, x = load(files, line.case)
    source = tvmstruct.from_onnx(stack_model(layers, x))
    report = tvmstruct.tune(
        source, spec, shapes={"x": x.shape}, trials=trials, database=database, progress=False
    )
    result = Result(line, work)
    roof.measure(work, line.precision)
    rows = [
        (row.calls * row.default_seconds, row.gain) for row in report.rows if row.default_seconds
    ]
    if rows:
        result.seconds[OURS] = sum(seconds for seconds, _ in rows)
        result.seconds[TUNED] = sum(seconds / gain for seconds, gain in rows)
    if report.untuned:
        result.failures[TUNED] = f"no choices: {', '.join(report.untuned)}"
    return result


def run() -> None:
    """Tune everything, print, and write JSON with ``--json``."""
    parser = make_parser(TITLE)
    parser.add_argument("--trials", type=int, default=200, help="for each kernel and shape")
    parser.add_argument("--database", type=Path, help="folder to keep records in; default: none")
    options = parser.parse_args()
    roof = Roof(threads(options))
    spec = replace(tvmstruct.resolve_target("host"), threads=roof.threads)
    with tempfile.TemporaryDirectory() as folder:
        weights, database = Weights(Path(folder)), options.database or Path(folder, "tuned")
        results = [
            tune_line(line, weights, roof, spec, options.trials, database)
            for line in select(lines(), options.only)
        ]
    finish(TITLE, results, roof, options.json)


if __name__ == "__main__":
    run()
