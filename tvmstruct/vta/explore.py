"""The exploration of a board for a model: Pareto fronts, tables and a picture."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from io import BytesIO
from typing import Any

from tvmstruct.errors import VtaConfigError
from tvmstruct.vta.config import BOARDS
from tvmstruct.vta.operations import Workload
from tvmstruct.vta.reconfigure import Design, adaptive, equal, equal_bound, problem
from tvmstruct.vta.resources import LIMITS
from tvmstruct.vta.search import Point, Search, front

PARTS = (0.25, 0.5, 0.75, 1.0)
LANE_PARTS = (0.35, 0.5, 0.65, 0.8, 1.0)
BAR = 24  # characters
WIDTH, HEIGHT, DPI = 11.5, 4.2, 130  # inches
UNITS = "lut", "ff", "dsp", "bram"


@dataclass(frozen=True)
class Lanes:
    """Adaptive and equal lanes within ``part`` of the board.

    ``fractional`` are the cycles that equal lanes would take if they need not be whole.
    """

    part: float
    adaptive: Design
    equal: Design
    fractional: float

    @property
    def speedup(self) -> float:
        """Return how many times as fast the adaptive design is."""
        return self.equal.cycles / self.adaptive.cycles


@dataclass(frozen=True)
class Exploration:
    """What was found for a model on a board; ``best`` is the fastest configuration."""

    model: str
    board: str
    workload: Workload
    points: Sequence[Point]
    lanes: Sequence[Lanes]

    @property
    def best(self) -> Point:
        """Return the fastest configuration."""
        return min(self.points, key=lambda point: point.cycles)


def explore(model: str, workload: Workload, board: str) -> Exploration:
    """Return the fronts of VTA configurations and of lanes for a model on a board."""
    lanes = tuple(_lanes(workload, board))
    search = Search(workload, board)
    for part in PARTS:
        search.reconfigure(part)
    if not search.points:
        raise VtaConfigError(f"explore: no VTA fits {board}, which has {LIMITS[board]}")
    return Exploration(model, board, workload, front(search.points.values()), lanes)


def _lanes(workload: Workload, board: str) -> Iterator[Lanes]:
    for part in LANE_PARTS:
        try:
            asked = problem(workload, board, part)
        except VtaConfigError:
            if part == LANE_PARTS[-1]:
                raise
            continue  # not even a lane of each class: the board has larger parts
        alike = dict.fromkeys(asked.classes, equal_bound(asked))
        yield Lanes(part, adaptive(asked), equal(asked), asked.cycles(alike))


def text(found: Exploration) -> str:
    """Return both fronts as tables with bars, and the lanes of the largest design."""
    return "\n".join([*_configurations(found), "", *_designs(found), "", *_whole_board(found)])


def _bar(value: float, most: float) -> str:
    return "#" * max(1, round(BAR * value / most))


def _configurations(found: Exploration) -> Iterator[str]:
    board = BOARDS[found.board]
    yield (
        f"VTA for {found.model} on {found.board} ({board.part}, {board.mhz} MHz, int8), "
        "matrices only: Pareto front"
    )
    yield f"{'configuration':<32}{'ms':>10}{'of board':>9}{'lut':>9}{'dsp':>6}{'bram':>6}"
    most = max(point.milliseconds for point in found.points)
    for point in found.points:
        r = point.resources
        yield (
            f"{point.config.name:<32}{point.milliseconds:>10.2f}{point.share:>9.0%}"
            f"{r.lut:>9.0f}{r.dsp:>6.0f}{r.bram:>6.0f}  {_bar(point.milliseconds, most)}"
        )


def _designs(found: Exploration) -> Iterator[str]:
    yield "lanes for each operation (float32, 100 MHz), by Algorithm 1 of NLP-Fast: Pareto front"
    yield f"{'of board':>9}{'adaptive ms':>13}{'equal ms':>10}{'speedup':>9}{'lut':>9}{'dsp':>6}"
    most = max(row.adaptive.milliseconds for row in found.lanes)
    for row in found.lanes:
        own = row.adaptive
        yield (
            f"{row.part:>9.0%}{own.milliseconds:>13.1f}{row.equal.milliseconds:>10.1f}"
            f"{row.speedup:>9.2f}{own.resources.lut:>9.0f}{own.resources.dsp:>6.0f}"
            f"  {_bar(own.milliseconds, most)}"
        )


def _whole_board(found: Exploration) -> Iterator[str]:
    whole = found.lanes[-1]
    alike = next(iter(whole.equal.lanes.values()))
    yield f"lanes on the whole board (equal parallelism: {alike} each, {whole.speedup:.2f}x slower)"
    work = found.workload.work
    for name, count in whole.adaptive.lanes.items():
        waits = whole.adaptive.waits[name]
        note = f"  waits {waits / whole.adaptive.cycles:.1%} for memory" if waits else ""
        yield f"  {name:<16}{count:>5}  {work(name):.3g} lane-cycles{note}"
    unequal = whole.fractional / whole.adaptive.cycles
    yield f"  against equal lanes that need not be whole: {unequal:.2f}x"


def to_plain(found: Exploration) -> dict[str, Any]:
    """Return everything for JSON."""
    return {
        "model": found.model,
        "board": found.board,
        "vta": [
            {
                "name": point.config.name,
                "milliseconds": point.milliseconds,
                "cycles": point.cycles,
                "share": point.share,
                **{unit: getattr(point.resources, unit) for unit in UNITS},
            }
            for point in found.points
        ],
        "lanes": [
            {
                "part": row.part,
                "adaptive": _plain(row.adaptive),
                "equal": _plain(row.equal),
                "speedup": row.speedup,
                "speedup_over_fractional": row.fractional / row.adaptive.cycles,
            }
            for row in found.lanes
        ],
    }


def _plain(design: Design) -> dict[str, Any]:
    amounts = {unit: getattr(design.resources, unit) for unit in UNITS}
    return {"milliseconds": design.milliseconds, "lanes": design.lanes, **amounts}


def to_png(found: Exploration) -> bytes:
    """Return both fronts as a PNG file; needs the extra ``plot``."""
    from tvmstruct.profiling.plots import check_matplotlib  # imports TVM

    check_matplotlib()
    from matplotlib.figure import Figure  # not pyplot, which keeps every figure

    figure = Figure(figsize=(WIDTH, HEIGHT), layout="constrained")
    left, right = figure.subplots(1, 2)
    shares = [100 * point.share for point in found.points]
    left.plot(shares, [p.milliseconds for p in found.points], "o-", drawstyle="steps-post")
    units = [f"{p.config.batch}x{p.config.block_in}" for p in found.points]
    for i, unit in enumerate(units):
        if unit not in units[:i]:
            left.annotate(unit, (shares[i], found.points[i].milliseconds), fontsize=8)
    left.set_title(f"VTA on {found.board}: batch x block of the matrix unit", fontsize=10)
    parts = [100 * row.part for row in found.lanes]
    right.plot(parts, [row.adaptive.milliseconds for row in found.lanes], "o-", label="adaptive")
    right.plot(parts, [row.equal.milliseconds for row in found.lanes], "s--", label="equal")
    right.set_title("lanes for each operation, NLP-Fast", fontsize=10)
    right.legend()
    for axes in (left, right):
        axes.set_yscale("log")
        axes.set_xlabel("% of the scarcest resource")
        axes.set_ylabel("ms")
        axes.grid(visible=True, alpha=0.3)
    figure.suptitle(found.model, fontsize=10)
    file = BytesIO()
    figure.savefig(file, format="png", dpi=DPI)
    return file.getvalue()
