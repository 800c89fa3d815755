"""``profile``: run a model and add up what each operation class cost."""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import cache
from typing import Any

import numpy as np
import tvm

from tvmstruct.errors import InputError
from tvmstruct.frontends import Source
from tvmstruct.model import CompiledModel
from tvmstruct.models import Config
from tvmstruct.profiling.classes import classify, rank
from tvmstruct.profiling.difference import epilogue_shares
from tvmstruct.profiling.events import Counters, events_of
from tvmstruct.profiling.prepare import Prepared, Shapes, prepare
from tvmstruct.profiling.result import DenormalWarning, Profile, Row, denormal_text
from tvmstruct.profiling.steps import Step, read_steps, working_set
from tvmstruct.profiling.timing import Recorder, on_own_thread
from tvmstruct.roofline import fma_peak, read_bandwidth, whole_turns
from tvmstruct.targets import TargetSpec

MOST_READ = 64 << 20  # bytes a thread for the bandwidth of memory: more than its share of a cache
COUNTED_RUNS = 11
TRIES = 3  # of measuring a limit; the best counts


def profile(
    model: CompiledModel | Source | Config | tvm.IRModule,
    shapes: Shapes | None = None,
    *,
    target: Any = "host",
    precision: str = "f32",
    memory: str = "auto",
    threads: int | None = None,
    mode: str = "default",
    events: Sequence[str] = (),
    runs: int | None = None,
    label: str = "base",
) -> Profile:
    """Return where the time of a model goes, by operation class.

    It runs on random inputs of ``shapes``; without them a built-in configuration has its own
    shapes, a compiled model those used last, and another source one row of 128. ``target``,
    ``precision``, ``memory`` and ``threads`` are as for ``compile``, for a model that is not
    compiled yet; "baseline" has a kernel for each class.
    Times are medians over ``runs`` runs, or as many as fit into a second or so. ``mode``
    "cachestat" counts misses of the last cache level, "custom" the ``events`` named, both by
    class and over all threads of the model. ``label`` names the profile in plots.

    Warns (DenormalWarning) about kernels that write denormal numbers. Raises InputError for
    options that do not fit and ProfilingError where the kernel does not let us count, besides
    what ``compile`` raises.
    """
    wanted = events_of(mode, events)
    if runs is not None and runs < 1:
        raise InputError(f"runs={runs}; want 1 or more")
    _check_counts(wanted)
    options = {"target": target, "precision": precision, "memory": memory, "threads": threads}
    prepared = prepare(model, shapes, options)
    compiled = prepared.model
    found = on_own_thread(compiled.threads, lambda: _measure(prepared, wanted, runs))
    if found.denormals:
        warnings.warn(denormal_text(found.denormals), DenormalWarning, stacklevel=2)
    return replace(found, label=label)


def _check_counts(events: Sequence[str]) -> None:
    """Say before a minute of compiling that the kernel will not count."""
    if events:
        Counters(events).close()


def _measure(prepared: Prepared, events: Sequence[str], runs: int | None) -> Profile:
    """Measure on this thread, whose workers have not started yet."""
    model, bucket = prepared.model, prepared.bucket
    assert bucket.lowered is not None
    assert model.compiler is not None
    steps = read_steps(bucket.lowered)
    counts, shared = np.zeros((len(steps), 0)), False
    with Counters(events) as counters:
        recorder = Recorder(bucket, prepared.arrays, steps)
        denormals = recorder.denormals()
        timing = recorder.time(runs)
        if events:
            counts = recorder.count(counters, COUNTED_RUNS)
            shared = counters.shared
    threads = model.threads or model.spec.threads
    size = min(MOST_READ, working_set(bucket.lowered) / threads)
    size = whole_turns(model.spec, size)
    peak, bandwidth = machine_limits(model.spec, threads, size)
    return Profile(
        model=prepared.name,
        label="",
        shapes=prepared.shapes,
        threads=threads,
        precision=model.compiler.session.precision,
        target=model.spec.key,
        runs=timing.runs,
        seconds=timing.whole,
        peak=peak,
        bandwidth=bandwidth,
        working_set=size,
        rows=make_rows(
            steps,
            timing.steps,
            (peak, bandwidth),
            dict(zip(events, counts.T, strict=True)),
            epilogue_shares(model.compiler.session, bucket.lowered),
        ),
        denormals=denormals,
        notes=_notes(events, shared),
    )


def make_rows(
    steps: Sequence[Step],
    seconds: Sequence[float],
    limits: tuple[float, float],
    counts: Mapping[str, np.ndarray],
    shares: Mapping[str, Mapping[str, float]] | None = None,
) -> tuple[Row, ...]:
    """Return a row for each class: steps with their seconds and counts, added up.

    A step that took NaN seconds is no call and left out. ``limits`` are the peak in GFLOP/s and
    the bandwidth in GB/s; a step's least time is the longer of what its FLOPs and what its bytes
    take at these. ``shares`` of a kernel's time, by its symbol, go to the class that they name:
    parts of the kernel, which bring no FLOPs and no bytes of their own.
    """
    steps, seconds, names = _take_parts(steps, seconds, classify(steps), shares or {})
    ran = [i for i, took in enumerate(seconds) if not math.isnan(took)]
    total = sum(seconds[i] for i in ran)
    peak, bandwidth = limits
    rows = []
    for name in sorted({names[i] for i in ran}, key=rank):
        at = [i for i in ran if names[i] == name]
        took = sum(seconds[i] for i in at)
        flops, moved = sum(steps[i].flops for i in at), sum(steps[i].bytes for i in at)
        least = sum(
            max(steps[i].flops / peak, steps[i].bytes / bandwidth) for i in at if seconds[i]
        )
        rows.append(
            Row(
                name,
                calls=len(at),
                seconds=took,
                share=took / total if total else 0.0,
                gflops=flops / took / 1e9 if took else 0.0,
                bytes=moved,
                intensity=flops / moved if moved else 0.0,
                percent_of_roofline=100 * least / took / 1e9 if took else 0.0,
                events={
                    event: float(sum(values[i] for i in at if i < len(values)))
                    for event, values in counts.items()
                },
            )
        )
    return tuple(rows)


def _take_parts(
    steps: Sequence[Step],
    seconds: Sequence[float],
    names: Sequence[str],
    shares: Mapping[str, Mapping[str, float]],
) -> tuple[list[Step], list[float], list[str]]:
    """Return the steps with a further one for each part of a kernel that has a class of its own."""
    all_steps, times, all_names = list(steps), list(seconds), list(names)
    for i, step in enumerate(steps):
        for name, share in shares.get(step.symbol, {}).items():
            part = min(share, 1.0) * seconds[i]
            if name != names[i] and not math.isnan(part):
                times[i] -= part
                all_steps.append(replace(step, flops=0.0, bytes=0))
                times.append(part)
                all_names.append(name)
    return all_steps, times, all_names


@cache
def machine_limits(spec: TargetSpec, threads: int, size: int) -> tuple[float, float]:
    """Return the peak in GFLOP/s and the bandwidth in GB/s at ``size`` bytes a thread."""
    found = fma_peak(spec, threads), read_bandwidth(spec, threads, size)
    for limit in found * TRIES:
        limit.measure()
    return found[0].best, found[1].best


def _notes(events: Sequence[str], shared: bool) -> tuple[str, ...]:
    notes = []
    if events:
        notes.append(
            "events: of all threads, in user mode, with what workers do while they wait for work"
        )
    if shared:
        notes.append("events took turns on the counters and are scaled up: ask for fewer at a time")
    return tuple(notes)
