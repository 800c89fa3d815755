"""Lines, their goals and what becomes of them: met, missed, failed or not applicable.

A line is one case with its goals; a result is what was measured. Every goal is a number that is
better when larger and that follows from the seconds of ours, so the number at the roofline's
seconds is its bound: a goal beyond 0.95 of that becomes 0.95 of it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

from cases import Encoder, Stack, Work
from embedding_cases import Lookup
from lookup_cases import LookupCase
from peers import BF16_PEERS, F32_PEERS, OURS, OURS_BASELINE, OURS_BF16, OURS_DENSE, OURS_INT8
from recurrent_cases import LstmCase, PackagedCase
from transformer_cases import TransformerCase

Case = Stack | Encoder | TransformerCase | Lookup | LookupCase | LstmCase | PackagedCase
NEAR_ROOF = 0.95  # of the bound is as much as a goal may ask
SHARE, SHARE_OF_ONE_ROW = 0.8, 0.7  # of the roofline; less is named


class Goal(Protocol):
    """What a line must reach."""

    least: float

    @property
    def label(self) -> str:
        """What is compared."""
        ...

    def value(self, seconds: float, result: Result, others: Mapping[str, Result]) -> float | None:
        """Return what is reached in so many seconds, None where nothing to compare with ran."""
        ...


@dataclass(frozen=True)
class Faster:
    """The best time of ``peers`` over ours, with ``per_saving`` over the saved multiply-adds."""

    least: float
    peers: tuple[str, ...] = F32_PEERS
    per_saving: bool = False

    @property
    def label(self) -> str:
        """What is compared."""
        known = {
            F32_PEERS: "f32 peers",
            BF16_PEERS: "bf16 peers",
            (OURS_DENSE,): "own dense",
            (OURS_BASELINE,): "own baseline",
            (OURS,): "own exact",
            (OURS_BF16,): "own bf16",
        }
        name = known.get(self.peers, ", ".join(self.peers))
        return f"over {name}" + (", / saving" if self.per_saving else "")

    def value(self, seconds: float, result: Result, others: Mapping[str, Result]) -> float | None:
        """Return the ratio."""
        times = [result.seconds[p] for p in self.peers if p in result.seconds]
        scale = result.work.saving if self.per_saving else 1.0
        return min(times) / seconds / scale if times else None


@dataclass(frozen=True)
class OfPeak:
    """Our share of the peak of multiply-adds, whatever the bandwidth."""

    least: float
    label: str = "of peak"

    def value(self, seconds: float, result: Result, others: Mapping[str, Result]) -> float | None:
        """Return the share."""
        return result.work.flops / seconds / (result.peak * 1e9) if result.peak else None


@dataclass(frozen=True)
class OfRoofline:
    """Our share of the roofline: of the bandwidth where that is what limits."""

    least: float
    label: str = "of the roofline"

    def value(self, seconds: float, result: Result, others: Mapping[str, Result]) -> float | None:
        """Return the share."""
        return result.roof_seconds / seconds if result.roof_seconds else None


@dataclass(frozen=True)
class RateOf:
    """Our GFLOP/s over those of ours in another line."""

    least: float
    other: str  # name of the line

    @property
    def label(self) -> str:
        """What is compared."""
        return f"rate of {self.other}"

    def value(self, seconds: float, result: Result, others: Mapping[str, Result]) -> float | None:
        """Return the ratio of the rates."""
        other = others.get(self.other)
        if other is None or other.ours is None:
            return None
        return (result.work.flops / seconds) / (other.work.flops / other.ours)


@dataclass(frozen=True)
class Line:
    """One case, who runs it, and the goals; with ``any_goal`` one of them is enough.

    Without ``bounded`` the roofline lowers no goal: what is compared with is our own code.
    """

    name: str
    case: Case
    goals: tuple[Goal, ...] = ()
    ours: str = OURS
    contenders: tuple[str, ...] = (*F32_PEERS, *BF16_PEERS)  # beside ours
    any_goal: bool = False
    bounded: bool = True

    @property
    def precision(self) -> str:
        """What products are computed in: the peak that bounds the line."""
        return {OURS_BF16: "bf16", OURS_INT8: "int8"}.get(self.ours, "f32")

    @property
    def runners(self) -> tuple[str, ...]:
        """Every contender, ours last."""
        return (*self.contenders, self.ours)

    @property
    def layers(self) -> int:
        """Layers that a call runs, over which its time is divided."""
        return self.case.layers if isinstance(self.case, Stack) else 1

    @property
    def least_share(self) -> float:
        """Share of the roofline under which the line is named."""
        return SHARE_OF_ONE_ROW if self.case.rows == 1 else SHARE


@dataclass
class Result:
    """Median seconds of a layer and spread (between the quartiles) of every contender."""

    line: Line
    work: Work
    roof_seconds: float | None = None
    peak: float | None = None  # GFLOP/s
    seconds: dict[str, float] = field(default_factory=dict)
    spread: dict[str, float] = field(default_factory=dict)
    failures: dict[str, str] = field(default_factory=dict)
    forms: dict[str, str] = field(default_factory=dict)  # as what ours compiled it

    @property
    def ours(self) -> float | None:
        """Our seconds."""
        return self.seconds.get(self.line.ours)

    @property
    def share(self) -> float | None:
        """Share of the roofline that we reach."""
        return self.roof_seconds / self.ours if self.roof_seconds and self.ours else None

    @property
    def failed(self) -> bool:
        """Whether something of ours did not run as it should on a CPU that can run it."""
        return self.peak is not None and any(name.startswith(OURS) for name in self.failures)


@dataclass(frozen=True)
class Verdict:
    """What became of a goal: ``least`` is what it asks after a look at the ``bound``."""

    label: str
    stated: float
    least: float
    value: float | None
    bound: float | None
    word: str


def judge(result: Result, others: Mapping[str, Result]) -> list[Verdict]:
    """Return the verdict on every goal of a line."""
    found = [_judge(goal, result, others) for goal in result.line.goals]
    if not result.line.any_goal or not any(v.word == "met" for v in found):
        return found
    return [
        Verdict(v.label, v.stated, v.least, v.value, v.bound, "other met")
        if v.word == "missed"
        else v
        for v in found
    ]


def _judge(goal: Goal, result: Result, others: Mapping[str, Result]) -> Verdict:
    roof, ours = result.roof_seconds, result.ours
    roof = min(roof, ours) if roof and ours else roof  # a time that was reached is possible
    bound = goal.value(roof, result, others) if roof and result.line.bounded else None
    least = goal.least if bound is None else min(goal.least, NEAR_ROOF * bound)
    value = goal.value(ours, result, others) if ours else None
    if result.failed:
        word = "FAILED"
    elif value is None or result.peak is None:
        word = "not applicable"
    else:
        word = "met" if value >= least else "missed"
    return Verdict(goal.label, goal.least, least, value, bound, word)


def plain(result: Result, others: Mapping[str, Result]) -> dict[str, Any]:
    """Return a line and its result as data for JSON."""
    line, case = result.line, result.line.case
    return {
        "name": line.name,
        "case": {"kind": type(case).__name__, **vars(case), **vars(result.work)},
        "ours": line.ours,
        "seconds": result.seconds,
        "spread": result.spread,
        "forms": result.forms,
        "failures": result.failures,
        "roofline_seconds": result.roof_seconds,
        "share_of_roofline": result.share,
        "any_goal": line.any_goal,
        "goals": [vars(v) for v in judge(result, others)],
    }
