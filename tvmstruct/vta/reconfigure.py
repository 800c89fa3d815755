"""Adaptive hardware reconfiguration: Algorithm 1 of NLP-Fast over the parallelism of operations.

Every operation class has lanes of its own; the classes run one after the other while the weights
of the next step are fetched.  Lanes are shared out by sequential least squares (line 2 of the
algorithm), rounded, and taken back from classes that wait for memory anyway (lines 6 to 14).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from tvmstruct.errors import VtaConfigError
from tvmstruct.vta.operations import Workload, lane
from tvmstruct.vta.resources import CONTROL, LIMITS, SHELL, Resources

MHZ = 100  # programmable logic of the paper, assumed for every board
BUS_BYTES: Mapping[str, int] = {"pynq": 8, "ultra96": 16, "zcu104": 16}  # a cycle, as VTA's

Lanes = dict[str, int]


@dataclass(frozen=True)
class Problem:
    """A model on a part of a board."""

    workload: Workload
    board: str
    limits: Resources

    @property
    def classes(self) -> tuple[str, ...]:
        """Return the operation classes."""
        return self.workload.classes

    def resources(self, lanes: Mapping[str, float]) -> Resources:
        """Return what a design takes: shell, control of each class, lanes."""
        taken = SHELL + CONTROL * len(lanes)
        for name, count in lanes.items():
            taken += lane(name) * count
        return taken

    def fits(self, lanes: Mapping[str, float]) -> bool:
        """Return whether a design stays within the limits."""
        return self.resources(lanes).fits(self.limits)

    def fetches(self) -> list[float]:
        """Return, for each step, the cycles in which the next step's weights are fetched."""
        steps, bus = self.workload.steps, BUS_BYTES[self.board]
        return [following.bytes / bus for following in steps[1:]] + [0.0]

    def cycles(self, lanes: Mapping[str, float]) -> float:
        """Return the latency: steps in order, each as long as its work or the fetch beside it."""
        steps = self.workload.steps
        first = steps[0].bytes / BUS_BYTES[self.board]
        pairs = zip(steps, self.fetches(), strict=True)
        return first + sum(max(step.work / lanes[step.name], fetch) for step, fetch in pairs)

    def waits(self, lanes: Mapping[str, float]) -> dict[str, float]:
        """Return the cycles that each class waits for the fetches beside it."""
        found = dict.fromkeys(self.classes, 0.0)
        for step, fetch in zip(self.workload.steps, self.fetches(), strict=True):
            found[step.name] += max(0.0, fetch - step.work / lanes[step.name])
        return found


@dataclass(frozen=True)
class Design:
    """Lanes of each class, and what they give."""

    lanes: Lanes
    cycles: float
    resources: Resources
    waits: Mapping[str, float]
    rounds: int = 0

    @property
    def milliseconds(self) -> float:
        """Return the latency at 100 MHz."""
        return self.cycles / MHZ / 1e3


def problem(workload: Workload, board: str, part: float = 1.0) -> Problem:
    """Return ``workload`` on ``part`` of a board; VtaConfigError where no design fits."""
    if board not in LIMITS:
        raise VtaConfigError(f"explore: unknown board {board!r}; known are {', '.join(LIMITS)}")
    if not 0 < part <= 1:
        raise VtaConfigError(f"explore: part of the board is {part}, want over 0 and up to 1")
    asked = Problem(workload, board, LIMITS[board] * part)
    least = asked.resources(dict.fromkeys(asked.classes, 1))
    if not least.fits(asked.limits):
        raise VtaConfigError(
            f"explore: one lane of each class of {workload.name} takes {least}; "
            f"{part:.0%} of {board} has {asked.limits}"
        )
    return asked


def _design(asked: Problem, lanes: Lanes, rounds: int = 0) -> Design:
    return Design(lanes, asked.cycles(lanes), asked.resources(lanes), asked.waits(lanes), rounds)


def equal(asked: Problem) -> Design:
    """Return the baseline: the most lanes that every class can have alike within the limits."""
    count = int(equal_bound(asked) + 1e-9)
    return _design(asked, dict.fromkeys(asked.classes, count))


def equal_bound(asked: Problem) -> float:
    """Return that number of lanes before it is rounded down."""
    least = asked.resources(dict.fromkeys(asked.classes, 0))
    step = asked.resources(dict.fromkeys(asked.classes, 1)) - least
    room = asked.limits - least
    amounts = ((getattr(room, n), getattr(step, n)) for n in ("lut", "ff", "dsp", "bram"))
    return min(have / take for have, take in amounts if take)


def adaptive(asked: Problem) -> Design:
    """Return the best design that Algorithm 1 meets on its way.

    It ends after one round for each class at most: a class whose lanes were taken stays so.
    """
    held: Lanes = {}
    lanes = _share_out(asked, held)
    best = _design(asked, lanes)
    for rounds in range(1, len(asked.classes) + 1):
        taken = _most_memory_bound(asked, lanes, held)
        if taken is None:
            break
        held |= taken
        lanes = _share_out(asked, held)
        found = _design(asked, lanes, rounds)
        if found.cycles < best.cycles:
            best = found
    return best


def _most_memory_bound(asked: Problem, lanes: Lanes, held: Lanes) -> Lanes | None:
    """Return the class that waits longest for memory with the fewest lanes that cost no time."""
    waits = asked.waits(lanes)
    for name in sorted(waits, key=waits.__getitem__, reverse=True):
        if waits[name] <= 0 or name in held:
            continue
        fewest = max(
            min(lanes[name], -(-step.work // fetch) if fetch else lanes[name])
            for step, fetch in zip(asked.workload.steps, asked.fetches(), strict=True)
            if step.name == name
        )
        if 1 <= fewest < lanes[name]:
            return {name: int(fewest)}
    return None


def _share_out(asked: Problem, held: Lanes) -> Lanes:
    """Return whole lanes for all classes, ``held`` ones as given."""
    free = [name for name in asked.classes if name not in held]
    if not free:
        return dict(held)
    shares = _least_squares(asked, free, held)
    lanes = dict(held)
    lanes |= {name: max(1, int(n)) for name, n in zip(free, shares, strict=True)}
    while not asked.fits(lanes):  # a class was raised to one lane
        largest = max(free, key=lanes.__getitem__)
        lanes[largest] -= 1
    _fill(asked, lanes, free)
    return {name: lanes[name] for name in asked.classes}


def _least_squares(asked: Problem, free: list[str], held: Lanes) -> np.ndarray:
    """Minimise ``sum work_i / n_i`` within the limits by SLSQP; returns n of ``free``.

    Work and limits are scaled to one, lanes to those of equal parallelism.
    """
    from scipy.optimize import Bounds, minimize

    work = np.array([asked.workload.work(name) for name in free], float)
    work /= work.sum()
    empty = asked.resources({**held, **dict.fromkeys(free, 0)})
    room, limits = _vector(asked.limits - empty), _vector(asked.limits)
    costs = np.array([_vector(lane(name)) for name in free]).T  # (kinds, classes)
    taking = costs.sum(1) > 0
    costs, room, limits = costs[taking], room[taking], limits[taking]
    scale = max(1.0, float(np.min(room / costs.sum(1))))
    constraint: Any = {
        "type": "ineq",
        "fun": lambda x: (room - costs @ x * scale) / limits,
        "jac": lambda _: -costs * scale / limits[:, None],
    }
    found = minimize(
        lambda x: float(work @ (1 / x)),
        np.ones(len(free)),
        jac=lambda x: -work / x**2,
        bounds=Bounds(np.full(len(free), 1 / scale)),
        constraints=[constraint],
        method="SLSQP",
        options={"maxiter": 500, "ftol": 1e-9},
    )
    return found.x * scale


def _vector(amounts: Resources) -> np.ndarray:
    return np.array([amounts.lut, amounts.ff, amounts.dsp, amounts.bram])


def _fill(asked: Problem, lanes: Lanes, free: list[str]) -> None:
    """Give what rounding left over, a lane at a time, to the class that it shortens most."""
    left = asked.limits - asked.resources(lanes)
    while True:
        now = asked.cycles(lanes)
        gains = {
            name: (now - asked.cycles({**lanes, name: lanes[name] + 1})) / lane(name).share(left)[1]
            for name in free
            if lane(name).fits(left)
        }
        best = max(gains, key=gains.__getitem__, default=None)
        if best is None or gains[best] <= 0:
            return
        lanes[best] += 1
        left = left - lane(best)
