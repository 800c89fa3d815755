"""``tune`` for VTA: schedule choices of every launch, searched with the cycle model as runner.

The cycle model is exact about what it models and the same everywhere, so nothing is measured
twice: a record's time is that of the cycles, its gain over the default the ratio of cycles.
"""

from __future__ import annotations

import hashlib
import time
import warnings
import zlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from tvmstruct import ops
from tvmstruct.database import MARGIN, Choices, Database, Record, TuningWarning, Workload, recorded
from tvmstruct.errors import TuningError, VtaError
from tvmstruct.progress import TuningProgress
from tvmstruct.schedules.registry import Pick, pick_default
from tvmstruct.schedules.vta import vta_chain
from tvmstruct.schedules.vta.requantise import Requantise
from tvmstruct.targets import TargetSpec
from tvmstruct.tuning import Shapes, TunedKernel, TuneReport
from tvmstruct.vta.config import BOARDS, Config
from tvmstruct.vta.integer import IntLinear, Reorder, Step
from tvmstruct.vta.offload import Make
from tvmstruct.vta.simulated_kernel import Kernel, make_kernels
from tvmstruct.vta.target import Accelerator

if TYPE_CHECKING:
    from tvmstruct.frontends import Source

MACHINE = "VTA cycle model"
PARENTS = 6  # fastest choices that new ones are made from
DRAWS = 30  # tries to find choices that are new


def workload(steps: Sequence[Step], rows: int, config: Config) -> Workload:
    """Return what a record of steps in one launch is about: all that its stream depends on."""
    linear = [step for step in steps if isinstance(step, IntLinear)]
    shapes = ((rows, linear[0].op.n_in), (rows, linear[-1].op.n_out))
    words = "; ".join(map(_words, steps))
    return Workload("vta_chain", words, shapes, "int8", config.name, 1)


def _words(step: Step) -> str:
    if isinstance(step, Reorder):
        return f"reorder {hashlib.sha256(step.index.tobytes()).hexdigest()[:8]}"
    e = Requantise(step.bias, step.shift, step.relu).epilogue
    words = [ops.describe(step.op), *["bias"] * e.bias, *["add"] * (e.add != 0)]
    return " ".join([*words, *["relu"] * e.relu, f"shifts {len(e.shifts)} {e.shift_tiles}"])


def tuned_make(accelerator: Accelerator, folder: str | Path | None) -> Make:
    """Return what makes launches as the records of a folder say, and as by default without.

    Raises TuningError where there is no such folder.
    """
    if folder is None:
        return accelerator.kernels
    if not Path(folder).is_dir():
        raise TuningError(f"database {folder}: there is no such folder; tvmstruct.tune writes one")
    database, config = Database(folder), accelerator.config

    def make(steps: Sequence[Step], rows: int) -> Sequence[Kernel | Reorder]:
        what = workload(steps, rows, config)
        record = database.best(what, MACHINE)
        if record is not None and record.choices is not None:
            try:
                return make_kernels(steps, rows, config, recorded(record.choices, what))
            except TuningError as error:
                warnings.warn(f"{error}; the default is used", TuningWarning, stacklevel=2)
        return accelerator.kernels(steps, rows)

    return make


def tune_launches(
    source: Source,
    spec: TargetSpec,
    *,
    shapes: Shapes | Sequence[Shapes] | None,
    trials: int,
    database: str | Path,
    calibration: Any,
    progress: bool,
    seed: int,
) -> TuneReport:
    """Search the choices of every launch of a model at ``shapes``; see ``tvmstruct.tune``."""
    assert spec.accelerator is not None
    records = Database(database).create()
    started = time.perf_counter()
    found = _steps(source, spec, shapes, calibration)
    rows: list[TunedKernel] = []
    with TuningProgress(len(found), trials, enabled=progress) as display:
        for what, (steps, calls) in found.items():
            search = Search(what, steps, spec.accelerator.config, records, seed)
            display.start(str(what), search.trials)
            rows.append(search.run(trials, calls, display))
    seconds = round(time.perf_counter() - started, 3)
    return TuneReport(tuple(rows), (), str(records.folder), seconds)


@dataclass(frozen=True)
class _Collecting(Accelerator):
    """Remembers the steps that it made kernels for."""

    made: dict[Workload, tuple[tuple[Step, ...], int]] = field(default_factory=dict, compare=False)

    def kernels(self, steps: Sequence[Step], rows: int) -> tuple[Kernel | Reorder, ...]:
        made = super().kernels(steps, rows)
        what = workload(steps, rows, self.config)
        calls = self.made[what][1] if what in self.made else 0
        self.made[what] = (tuple(steps), calls + 1)
        return made


def _steps(
    source: Source, spec: TargetSpec, shapes: Shapes | Sequence[Shapes] | None, calibration: Any
) -> dict[Workload, tuple[tuple[Step, ...], int]]:
    """Return each distinct workload of a model with its steps and how many layers are like it."""
    from tvmstruct.compiler import compile as compile_model

    assert spec.accelerator is not None
    collecting = _Collecting(spec.accelerator.config)
    buckets = "auto" if shapes is None else "exact"
    model = compile_model(
        source,
        replace(spec, accelerator=collecting),
        calibration=calibration,
        buckets=buckets,
    )
    if shapes is None:
        return collecting.made
    rows: set[int] = set()
    for wanted in _listed(shapes):
        model.compile_bucket(wanted)
        rows |= set(_rows(next(reversed(model.buckets.values()))))
    return {what: made for what, made in collecting.made.items() if what.rows in rows}


def _listed(shapes: Shapes | Sequence[Shapes]) -> Sequence[Shapes]:
    return [shapes] if not isinstance(shapes, list | tuple) else shapes  # pyright: ignore


def _rows(bucket: Any) -> Iterable[int]:
    """Yield the rows of every launch of a bucket."""
    for site in bucket.sites:
        for program in site.layers.programs:
            yield from (s.launch.x.rows for s in program.steps if isinstance(s, Kernel))


@dataclass
class Search:
    """The search of one workload: what is known, and what to try next."""

    workload: Workload
    steps: Sequence[Step]
    config: Config
    database: Database
    seed: int = 0
    seen: dict[Any, Record] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Take up what the database has."""
        for record in self.database.records(self.workload):
            if record.machine == MACHINE:
                self.seen[record.key] = record
        name = zlib.crc32(self.workload.file.encode())
        self.rng = np.random.default_rng([self.seed, name, self.trials])

    @property
    def trials(self) -> int:
        """How many different choices are known."""
        return sum(key is not None for key in self.seen)

    def run(self, trials: int, calls: int, display: TuningProgress) -> TunedKernel:
        """Predict until ``trials`` different choices are known or new ones are hard to find."""
        known, note = self.trials, ""
        default = self._seconds(pick_default)
        if None not in self.seen:
            self._keep(None, default)
        while self.trials < trials:
            drawn = self._draw()
            if drawn is None:
                note = "(new choices were not found)"
                break
            self._keep(*drawn)
            display.advance(self.trials, self._ranked()[0].seconds, default)
        display.finish()
        won = self.database.best(self.workload, MACHINE)
        best = self._ranked()[0].seconds or default
        return TunedKernel(
            self.workload, calls, self.trials, self.trials - known, default, min(best, default),
            won and won.choices, default / best if won else 1.0, note,
        )  # fmt: skip

    def _keep(self, choices: Choices | None, seconds: float | str) -> None:
        failed = isinstance(seconds, str)
        base = self.seen.get(None)
        gain = None
        if not failed and choices is not None and base is not None and base.seconds:
            gain = base.seconds / seconds
            gain = gain if gain >= MARGIN else None
        record = Record(
            self.workload,
            choices,
            None if failed else seconds,
            MACHINE,
            seconds if failed else None,
            gain,
        )
        self.database.append(record)
        self.seen[record.key] = record

    def _draw(self) -> tuple[Choices, float | str] | None:
        """Return new choices and their time, or why they have none."""
        for _ in range(DRAWS):
            choices: dict[str, int] = {}
            ranked = [r for r in self._ranked()[:PARENTS] if r.choices]
            parent: Choices = {}
            if ranked and self.rng.random() < 0.7:
                parent = ranked[self.rng.integers(len(ranked))].choices or {}

            def pick(
                name: str,
                options: Sequence[int],
                default: int,
                parent: Choices = parent,
                choices: dict[str, int] = choices,
            ) -> int:
                value = parent.get(name)
                if value not in options or self.rng.random() < 1.5 / max(1, len(parent)):
                    value = int(options[self.rng.integers(len(options))])
                choices[name] = int(value)
                return choices[name]

            try:
                seconds = self._seconds(pick)
            except VtaError as error:
                seconds = str(error)
            if tuple(sorted(choices.items())) not in self.seen:
                return choices, seconds
        return None

    def _seconds(self, pick: Pick) -> float:
        kernel = vta_chain(self.steps, self.workload.rows, self.config, pick)
        board = BOARDS.get(self.config.target, BOARDS["sim"])
        return kernel.predict().cycles / (board.mhz * 1e6)

    def _ranked(self) -> list[Record]:
        return sorted(
            (r for r in self.seen.values() if r.seconds is not None), key=lambda r: r.seconds or 0.0
        )
