"""``tune``: search the choices of every kernel that a model uses, and keep what was measured.

A kernel's schedule function asks for its choices by name (`registry.Pick`). Here a search
answers: it draws choices, MetaSchedule's XGBoost model ranks what they would build to, and
MetaSchedule's builder and runner measure the most promising. Every measurement is on disk
before the next one starts, so a run that was killed goes on where it stopped.
"""

from __future__ import annotations

import json
import math
import shutil
import socket
import struct
import time
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import tvm
from tvm.rpc.base import RPC_TRACKER_MAGIC
from tvm.s_tir import Schedule
from tvm.s_tir import meta_schedule as ms
from tvm.s_tir.meta_schedule.arg_info import TensorInfo

from tvmstruct import compat, pipeline
from tvmstruct.buckets import Policy
from tvmstruct.compiler import check_precision, new_session
from tvmstruct.database import Choices, Database, Record, Workload, machine, recorded
from tvmstruct.errors import InputError, MissingDependencyError, TargetError, TuningError
from tvmstruct.frontends import Source, as_source
from tvmstruct.progress import TuningProgress
from tvmstruct.schedules.registry import Kernel
from tvmstruct.targets import TargetSpec, host_features, resolve
from tvmstruct.threads import available_threads
from tvmstruct.tuning_worker import Builder

BATCH = 16  # candidates built at once
POOL = 3  # candidates ranked for each one measured
GREED = 0.8  # share of a batch that the cost model chooses; the rest is drawn at random
WARMUP = 24  # measurements before the cost model is asked
PARENTS = 8  # fastest choices that new ones are made from
FINALISTS = 3  # measured again at the end, in turns with the default
ROUNDS = 9
TIMEOUT = 60.0  # seconds to run one candidate
MAX_BUILDERS = 8  # processes that build at the same time
PATIENCE = 5.0  # seconds for a tracker to answer
WINDOWS, WINDOW_MS = 40, 2  # the best of many short timings: other processes only add time
FAILED = 1e10  # the cost of a candidate that does not run, for the cost model

Shapes = Mapping[str, Sequence[int]]
Tracker = tuple[str, int, str]


@dataclass(frozen=True)
class TunedKernel:
    """What tuning one workload came to.

    Seconds are the best of many repeats. ``gain``, how many times faster than the default, comes
    from measuring both in turns; where it is not worth having, ``choices`` is None.
    """

    workload: Workload
    calls: int
    trials: int
    new_trials: int
    default_seconds: float | None
    best_seconds: float | None
    choices: Choices | None
    gain: float
    note: str = ""


@dataclass(frozen=True)
class TuneReport:
    """What ``tune`` did: one row for each workload, and the kernels without choices."""

    rows: tuple[TunedKernel, ...]
    untuned: tuple[str, ...]
    database: str
    seconds: float

    def to_json(self) -> str:
        """Return the report as JSON."""
        return json.dumps(asdict(self), indent=2)

    def show(self) -> None:
        """Print the report as a table."""
        from rich.console import Console
        from rich.table import Table

        table = Table("kernel", "calls", "trials", "default", "best", "gain", "choices")
        for row in self.rows:
            choices = " ".join(f"{k}={v}" for k, v in (row.choices or {}).items())
            table.add_row(
                str(row.workload),
                str(row.calls),
                f"{row.trials} ({row.new_trials} new)",
                _microseconds(row.default_seconds),
                _microseconds(row.best_seconds),
                f"{row.gain:.2f}",
                choices or f"default {row.note}".strip(),
            )
        console = Console()
        console.print(table)
        if self.untuned:
            console.print(f"no choices to tune: {', '.join(self.untuned)}", highlight=False)


def tune(
    source: Source | tvm.IRModule,
    target: str | Mapping[str, Any] | tvm.target.Target | TargetSpec = "host",
    *,
    shapes: Shapes | Sequence[Shapes] | None = None,
    precision: str = "f32",
    trials: int = 200,
    database: str | Path = "tuned/",
    runner: Any = None,
    rpc: Tracker | None = None,
    progress: bool = True,
    seed: int = 0,
    calibration: Any = None,
) -> TuneReport:
    """Measure schedules of every kernel that a model uses at ``shapes`` and record them.

    ``precision`` is that of ``compile``, whose kernels are other ones for each precision.
    ``trials`` is for each distinct kernel and shape; those that ``database`` already holds from
    this machine count. ``rpc`` is (host, port, key) of a TVM tracker whose servers measure
    instead of this machine. Pass the same ``database`` to ``compile`` to use what was found.

    With ``target="vta"`` the launches are what is searched, and the cycle model measures them;
    ``calibration`` is that of ``compile``.

    Raises TuningError, InputError, TargetError, MissingDependencyError, or what ``compile`` raises.
    """
    if not isinstance(trials, int) or isinstance(trials, bool) or trials < 1:
        raise TuningError(f"trials={trials!r}; want a whole number of at least 1")
    check_precision(precision)
    spec = resolve(target)
    if spec.accelerator is not None:
        from tvmstruct.vta.tuning import tune_launches

        _check_runner(runner, rpc)
        return tune_launches(
            as_source(source), spec, shapes=shapes, trials=trials, database=database,
            calibration=calibration, progress=progress, seed=seed,
        )  # fmt: skip
    if calibration is not None:
        raise InputError('calibration is for target="vta", which quantises; leave it out here')
    session = new_session(spec, precision=precision)
    bench = _Bench(spec, runner, rpc)
    records = Database(database).create()
    started = time.perf_counter()
    work, untuned = _workloads(as_source(source), session, shapes)
    rows: list[TunedKernel] = []
    with TuningProgress(len(work), trials, enabled=progress) as display:
        for workload, (kernel, calls) in work.items():
            search = _Search(workload, kernel, bench, records, seed)
            display.start(str(workload), search.trials)
            rows.append(search.run(trials, calls, display))
    seconds = round(time.perf_counter() - started, 3)
    return TuneReport(tuple(rows), tuple(untuned), str(records.folder), seconds)


def _check_runner(runner: Any, rpc: Tracker | None) -> None:
    if runner is not None or rpc is not None:
        raise TuningError('target="vta" is measured by its cycle model; leave runner and rpc out')


def _workloads(
    source: Source, session: pipeline.Session, shapes: Shapes | Sequence[Shapes] | None
) -> tuple[dict[Workload, tuple[Kernel, int]], list[str]]:
    """Return each distinct workload with its kernel and number of calls, and other kernels."""
    if shapes is None:
        wanted = list(Policy.of("auto", source).first(source))
    else:
        wanted = [shapes] if isinstance(shapes, Mapping) else list(shapes)
    found: dict[Workload, tuple[Kernel, int]] = {}
    untuned: dict[str, None] = {}
    for shape in wanted:
        lowered = pipeline.lower(source.at(shape), session)
        for call in lowered.calls:
            kernel = lowered.kernels[call.symbol]
            if kernel.space is None:
                untuned[kernel.name] = None
                continue
            workload = Workload.of(kernel, call.shapes, call.dtypes, session.spec)
            found[workload] = (kernel, found.get(workload, (kernel, 0))[1] + 1)
    return found, list(untuned)


@dataclass
class _Candidate:
    """One way to run a workload, ready to be measured."""

    choices: Choices | None
    mod: tvm.IRModule

    def measure_candidate(self, args: list[TensorInfo]) -> ms.MeasureCandidate:
        return ms.MeasureCandidate(Schedule(self.mod), args)


class _Bench:
    """Builds candidates here and measures them here or on the servers of a tracker."""

    def __init__(self, spec: TargetSpec, runner: Any, rpc: Tracker | None) -> None:
        self.spec, self.local = spec, runner is None and rpc is None
        self.machine = machine() if rpc is None else f"rpc {rpc[2]}"
        if self.local:
            _check_host(spec)
        _check_packages(rpc)
        self._config = ms.runner.EvaluatorConfig(1, WINDOWS, WINDOW_MS)
        self._runner = runner if rpc is None else _rpc_runner(rpc, self._config)

    @cached_property
    def runner(self) -> Any:
        """What measures; started when there is something to measure."""
        return self._runner or ms.runner.LocalRunner(TIMEOUT, self._config)

    @cached_property
    def builder(self) -> Builder:
        """What builds."""
        return Builder(min(MAX_BUILDERS, available_threads()))

    def measure(
        self, workload: Workload, candidates: Sequence[_Candidate], rounds: int = 1
    ) -> Iterator[tuple[_Candidate, float | None, str | None]]:
        """Yield (candidate, best seconds, error) as soon as each has run, in turns."""
        built = self.builder.build([(c.mod, self.spec.target) for c in candidates])
        pairs = list(zip(candidates, built, strict=True))
        step = 1 if self.local else len(pairs)
        try:
            for _, first in product(range(rounds), range(0, len(pairs), step)):
                yield from self._run(workload, pairs[first : first + step])
        finally:
            for path, _ in built:
                if path is not None:
                    shutil.rmtree(Path(path).parent, ignore_errors=True)

    def _run(self, workload: Workload, pairs: Sequence[tuple[_Candidate, tuple[str | None, str]]]):
        args = arguments(workload)
        inputs = [ms.runner.RunnerInput(path, "cpu", args) for _, (path, _) in pairs if path]
        futures = iter(self.runner.run(inputs) if inputs else [])
        for candidate, (path, error) in pairs:
            if path is None:
                yield candidate, None, _last_line(error)
                continue
            found = next(futures).result()
            if found.run_secs:
                yield candidate, min(float(seconds) for seconds in found.run_secs), None
            else:
                yield candidate, None, _last_line(found.error_msg)


@dataclass
class _Search:
    """The search of one workload: what was measured, and what to measure next."""

    workload: Workload
    kernel: Kernel
    bench: _Bench
    database: Database
    seed: int
    seen: dict[Any, Record] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Take up what the database has from this machine."""
        for record in self.database.records(self.workload):
            if record.machine == self.bench.machine:
                self._keep(record)
        name = zlib.crc32(self.workload.file.encode())
        self.rng = np.random.default_rng([self.seed, name, self.trials])
        self.args = arguments(self.workload)
        self.model = ms.cost_model.XGBModel(
            num_warmup_samples=WARMUP, num_tuning_cores=self.workload.threads
        )
        self.context = compat.tune_context(self._module(self.kernel.func), self.bench.spec.target)

    @property
    def trials(self) -> int:
        """How many different choices were measured."""
        return sum(key is not None for key in self.seen)

    def run(self, trials: int, calls: int, display: TuningProgress) -> TunedKernel:
        """Measure until ``trials`` different choices are known or there are no more."""
        known, note = self.trials, ""
        if known < trials:
            self._remember()
            while self.trials < trials:
                candidates = self._propose(min(BATCH, trials - self.trials))
                if not candidates:
                    note = "(all choices were measured)"
                    break
                if None not in self.seen:
                    candidates.insert(0, self._default())
                self._measure(candidates, display)
        if known < trials or not any(r.gain is not None for r in self.seen.values()):
            self._compare()
        display.finish()
        won = self.database.best(self.workload, self.bench.machine)
        default, ranked = self.seen.get(None), self._ranked()
        return TunedKernel(
            self.workload,
            calls,
            self.trials,
            self.trials - known,
            default and default.seconds,
            (won or ranked[0]).seconds if ranked else None,
            won and won.choices,
            (won and won.gain) or 1.0,
            note,
        )

    def _measure(self, candidates: Sequence[_Candidate], display: TuningProgress) -> None:
        done: list[_Candidate] = []
        seconds: list[float] = []
        for candidate, found, error in self.bench.measure(self.workload, candidates):
            if candidate.choices is None and error is not None:
                raise TuningError(f"{self.workload}: even the default kernel does not run: {error}")
            record = Record(self.workload, candidate.choices, found, self.bench.machine, error)
            self.database.append(record)
            self._keep(record)
            if candidate.choices is not None:
                done.append(candidate)
                seconds.append(FAILED if found is None else found)
            best = self._ranked()[:1]
            default = self.seen.get(None)
            display.advance(
                self.trials, best[0].seconds if best else None, default and default.seconds
            )
        self._learn(done, seconds)

    def _compare(self) -> None:
        """Measure the fastest in turns with the default: one lucky moment proves nothing."""
        fastest = [r for r in self._ranked() if r.choices is not None][:FINALISTS]
        finalists = [c for r in fastest if (c := self._recorded(r)) is not None]
        times: dict[Any, list[float]] = {}
        for candidate, seconds, _ in self.bench.measure(
            self.workload, [self._default(), *finalists], ROUNDS
        ):
            times.setdefault(_key(candidate), []).append(seconds or math.nan)
        default = np.array(times[None])
        for candidate in (self._default(), *finalists):
            found = np.array(times[_key(candidate)])
            ran = np.isfinite(default / found)
            if ran.any():
                # Beside other work the median flatters code on one thread, the minimum whoever
                # met a quiet moment: a gain must show in both.
                best = float(found[ran].min())
                gain = min(np.median(default[ran] / found[ran]), default[ran].min() / best)
                self._append(candidate.choices, best, float(gain))

    def _append(self, choices: Choices | None, seconds: float, gain: float) -> None:
        record = Record(self.workload, choices, seconds, self.bench.machine, gain=gain)
        self.database.append(record)
        self._keep(record)

    def _keep(self, record: Record) -> None:
        """Remember the fastest measurement of each choice, and its last gain."""
        old = self.seen.get(record.key)
        if old is not None and (old.seconds or FAILED) < (record.seconds or FAILED):
            record = replace(old, gain=record.gain or old.gain)
        self.seen[record.key] = record

    def _ranked(self) -> list[Record]:
        return sorted(
            (r for r in self.seen.values() if r.seconds is not None), key=lambda r: r.seconds or 0.0
        )

    def _learn(self, candidates: Sequence[_Candidate], seconds: Sequence[float]) -> None:
        results = [ms.runner.RunnerResult([s], None) for s in seconds]
        wrapped = [c.measure_candidate(self.args) for c in candidates]
        self.model.update(self.context, wrapped, results)

    def _remember(self) -> None:
        """Teach the cost model what earlier runs measured."""
        pairs = [
            (candidate, record.seconds or FAILED)
            for record in self._ranked()[: 4 * WARMUP]
            if record.choices is not None and (candidate := self._recorded(record)) is not None
        ]
        if pairs:
            candidates, seconds = zip(*pairs, strict=True)
            self._learn(candidates, seconds)

    def _propose(self, count: int) -> list[_Candidate]:
        """Return new candidates: most of them the cost model's favourites."""
        pool: list[_Candidate] = []
        keys = set(self.seen)
        want = count * (POOL if self.trials >= WARMUP else 1)
        if self.trials == 0:
            pool.append(self._draw(first=True))
            keys.add(_key(pool[0]))
        for _ in range(20 * want):
            if len(pool) == want:
                break
            candidate = self._draw()
            if _key(candidate) not in keys:
                keys.add(_key(candidate))
                pool.append(candidate)
        if len(pool) <= count:
            return pool
        wrapped = [c.measure_candidate(self.args) for c in pool]
        order = np.argsort(-self.model.predict(self.context, wrapped))
        greedy = round(GREED * count)
        rest = self.rng.permutation(order[greedy:])[: count - greedy]
        return [pool[i] for i in (*order[:greedy], *rest)]

    def _draw(self, first: bool = False) -> _Candidate:
        """Return a candidate: the schedule's own choices, a changed fast one, or a random one."""
        choices: dict[str, int] = {}
        parents = [r for r in self._ranked()[:PARENTS] if r.choices is not None]
        parent: Choices = {}
        if parents and self.rng.random() < 0.5:
            parent = parents[self.rng.integers(len(parents))].choices or {}
        change = 1.0 / max(1, len(parent))

        def pick(name: str, options: Sequence[int], default: int) -> int:
            value = parent.get(name)
            if first:
                value = default
            elif value not in options or self.rng.random() < change:
                value = int(options[self.rng.integers(len(options))])
            choices[name] = int(value)
            return choices[name]

        func = self.kernel.space.build(self.workload.rows, pick)
        return _Candidate(choices, self._module(func))

    def _recorded(self, record: Record) -> _Candidate | None:
        """Return the candidate of a record, None where this version has no such option."""
        try:
            pick = recorded(record.choices or {}, self.workload)
            func = self.kernel.space.build(self.workload.rows, pick)
        except TuningError:
            return None
        return _Candidate(record.choices, self._module(func))

    def _default(self) -> _Candidate:
        return _Candidate(None, self._module(self.kernel.func))

    def _module(self, func: tvm.tirx.PrimFunc) -> tvm.IRModule:
        return tvm.IRModule({"main": func.with_attr("global_symbol", "main")})


def arguments(workload: Workload) -> list[TensorInfo]:
    """Return what MetaSchedule wants to know about the arguments of a workload."""
    pairs = zip(workload.dtypes, workload.shapes, strict=True)
    return [TensorInfo(dtype, list(shape)) for dtype, shape in pairs]


def _check_host(spec: TargetSpec) -> None:
    if missing := spec.features - host_features():
        raise TargetError(
            f"tuning for {spec.key} would run code with {', '.join(sorted(missing))} here, which "
            "this CPU does not have; measure on a machine that has it with "
            'rpc=(host, port, key), or tune for target="host"'
        )


def _check_packages(rpc: Tracker | None) -> None:
    needed = ["cloudpickle", "psutil", "xgboost", *(["tornado"] if rpc is not None else [])]
    for name in needed:
        try:
            __import__(name)
        except ImportError as error:
            raise MissingDependencyError(
                f'tuning needs {name}; install it with: pip install "tvmstruct[tune]"'
            ) from error
    from tvm.support import cc

    if cc.get_cc() is None:
        raise MissingDependencyError(
            "tuning links each candidate with a C compiler, and there is none here; install gcc "
            "or clang (Debian: apt-get install gcc) or name one in the variable CXX"
        )


def _rpc_runner(rpc: Tracker, config: Any) -> Any:
    """Return a runner on a tracker that answers and has a server of that key."""
    host, port, key = rpc
    where = f"tracker {host}:{port}"
    greeting = struct.pack("<i", RPC_TRACKER_MAGIC)
    try:
        with socket.create_connection((host, port), timeout=PATIENCE) as connection:
            connection.sendall(greeting)
            answer = connection.recv(len(greeting))
    except (OSError, OverflowError) as error:
        raise TuningError(
            f"{where} cannot be reached ({error}); is it running, and is that its port?"
        ) from error
    if answer != greeting:
        raise TuningError(f"{where} does not answer as a TVM tracker; is that its port?")
    options = ms.runner.RPCConfig(host, port, key, session_timeout_sec=int(TIMEOUT))
    deadline = time.monotonic() + PATIENCE
    try:
        while (servers := options.count_num_servers()) == 0 and time.monotonic() < deadline:
            time.sleep(0.2)  # one that was just started needs a moment to register
    except Exception as error:
        raise TuningError(f"{where} does not answer as a TVM tracker ({error})") from error
    if servers == 0:
        raise TuningError(f"{where} has no server with the key {key!r}; start one with that key")
    return ms.runner.RPCRunner(options, config, max_workers=servers)


def _key(candidate: _Candidate) -> tuple[tuple[str, int], ...] | None:
    return None if candidate.choices is None else tuple(sorted(candidate.choices.items()))


def _last_line(message: Any) -> str:
    """Return the last line of an error that says something."""
    lines = [line.strip() for line in str(message).splitlines() if line.strip()]
    return lines[-1][:300] if lines else "unknown error"


def _microseconds(seconds: float | None) -> str:
    return "-" if seconds is None else f"{seconds * 1e6:.1f} us"
