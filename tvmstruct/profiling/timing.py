"""What each kernel call costs inside the running model: seconds, or hardware events.

The virtual machine calls an instrument before and after each call. A `Meter` is read last
before and first after, the medians over many runs count, and what an empty call costs (the
cheapest builtin of the virtual machine) is taken off. Everything runs on a thread of its own,
with as many workers as the model has: TVM keeps a pool for each Python thread, so events that
worker threads inherit can be opened before there are workers.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
import tvm
from tvm import relax

from tvmstruct.arrays import to_numpy
from tvmstruct.model import Bucket, Runner
from tvmstruct.profiling.steps import Step

Meter = Callable[[], Sequence[float]]
BUILTIN = "vm.builtin."
LEAST_RUNS, MOST_RUNS, SECONDS = 5, 100, 1.0
EXPONENT, MANTISSA = 0x7F800000, 0x007FFFFF  # of float32


@dataclass(frozen=True)
class Timing:
    """Medians over ``runs`` runs: of the whole call in seconds, and of every step, in order.

    A step that is no call, because the machine only renames a tensor, takes NaN seconds.
    """

    whole: float
    steps: tuple[float, ...]
    runs: int


class Recorder:
    """Runs a bucket with an instrument that reads a meter around every kernel call."""

    def __init__(self, bucket: Bucket, arrays: Sequence[np.ndarray], steps: Sequence[Step]) -> None:
        self.bucket, self.arrays, self.steps = bucket, arrays, steps
        self._machine = relax.VirtualMachine(bucket.executable, tvm.cpu())
        staging = Runner(bucket.executable, bucket.shapes, bucket.dtypes)
        self._tensors = [staging.tensor(i, a)[0] for i, a in enumerate(arrays)]
        self._staging = staging  # owns the memory of arrays that lie badly

    def time(self, runs: int | None = None) -> Timing:
        """Time whole calls and, in turns with them, single kernel calls."""
        self.bucket.run(self.arrays)
        wholes, parts = [], []
        stop = time.perf_counter() + SECONDS
        while len(parts) < (runs or LEAST_RUNS) or _continues(runs, len(parts), stop):
            self.bucket.run(self.arrays)  # both find the caches as their own kind left them
            started = time.perf_counter()
            self.bucket.run(self.arrays)
            wholes.append(time.perf_counter() - started)
            parts.append(self.read(lambda: (time.perf_counter(),)))
        seconds = np.median(np.stack(parts), axis=0)[:, 0]
        return Timing(float(np.median(wholes)), tuple(seconds.tolist()), len(parts))

    def count(self, meter: Meter, runs: int) -> np.ndarray:
        """Return the median counts of each step by event: (steps, events)."""
        self.read(meter)  # starts the workers
        return np.median(np.stack([self.read(meter) for _ in range(runs)]), axis=0)

    def read(self, meter: Meter) -> np.ndarray:
        """Run once and return what the meter rose by in each step: (steps, values), or NaN."""
        before: Sequence[float] = ()
        rises: list[tuple[str, Sequence[float], Sequence[float]]] = []

        def instrument(_func: Any, name: str, starts: bool, *_rest: Any) -> None:
            nonlocal before
            if starts:
                before = meter()
            else:
                after = meter()
                rises.append((name, before, after))

        self._run(instrument)
        values = np.array([np.subtract(after, before) for _, before, after in rises])
        builtin = np.array([name.startswith(BUILTIN) for name, *_ in rises])
        empty = values[builtin].min(axis=0) if builtin.any() else 0
        found = np.full((len(self.steps), values.shape[1]), np.nan)
        for i, at in self._places([name for name, *_ in rises]):
            found[i] = np.maximum(values[at] - empty, 0)
        return found

    def denormals(self) -> dict[str, int]:
        """Run once and count the denormal float32 values in what each step writes."""
        counts: list[tuple[str, list[int]]] = []
        outputs = max((step.outputs for step in self.steps), default=1)

        def instrument(_func: Any, name: str, starts: bool, _result: Any, *args: Any) -> None:
            if not starts and not name.startswith(BUILTIN):
                tail = [a for a in args[-outputs:] if isinstance(a, tvm.runtime.Tensor)]
                counts.append((name, list(map(_denormals, tail))))

        self._run(instrument)
        found: dict[str, int] = {}
        for i, at in self._places([name for name, _ in counts]):
            step = self.steps[i]
            if number := sum(counts[at][1][-step.outputs :]):
                found[step.label] = found.get(step.label, 0) + number
        return found

    def _run(self, instrument: Callable[..., None]) -> None:
        self._machine.set_instrument(instrument)
        self._machine["main"](*self._tensors, *self.bucket.weights)

    def _places(self, names: Sequence[str]) -> list[tuple[int, int]]:
        """Return (step, call) pairs: the calls of one symbol come in the order of its steps.

        A reshape is no call where the virtual machine only renames the tensor.
        """
        calls: dict[str, list[int]] = {}
        for at, name in enumerate(names):
            calls.setdefault(name, []).append(at)
        pairs = []
        for i, step in enumerate(self.steps):
            if places := calls.get(step.symbol):
                pairs.append((i, places.pop(0)))
        return pairs


def on_own_thread(threads: int | None, work: Callable[[], Any]) -> Any:
    """Run ``work`` on a new thread, whose TVM pool has ``threads`` threads or all."""

    def limited() -> Any:
        if threads is not None:
            tvm.get_global_func("runtime.config_threadpool")(1, threads)
        return work()

    with ThreadPoolExecutor(1, "tvmstruct-profile") as pool:
        return pool.submit(limited).result()


def _continues(runs: int | None, done: int, stop: float) -> bool:
    return runs is None and done < MOST_RUNS and time.perf_counter() < stop


def _denormals(tensor: tvm.runtime.Tensor) -> int:
    if str(tensor.dtype) != "float32":
        return 0
    bits = np.ascontiguousarray(to_numpy(tensor)).view(np.uint32)
    return int(np.count_nonzero(((bits & EXPONENT) == 0) & ((bits & MANTISSA) != 0)))
