"""The machine's own limits: the peak of float32 multiply-adds and the bandwidth of reading.

Bandwidth is that of reading as many bytes a thread as the work at hand has, over and over: no
level of the memory has to be guessed, and caches that threads share count as they are.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import product
from typing import Any

import numpy as np
import tvm
from tvm import tirx
from tvm.script.ir_builder import tirx as T

from tvmstruct.schedules.builder import argument, i64, loops, prim_func
from tvmstruct.schedules.x86.register_tile import accumulate
from tvmstruct.targets import TargetSpec

SUMS = (6, 2)  # lines and columns of independent sums in a loop of multiply-adds
DEPTH = 1 << 16
UNROLL = 8  # vectors read at a time
LEAST_READ = 4 << 20  # bytes that a thread reads in one timing
REPEATS, REPEAT_MS = 5, 10


@dataclass
class Limit:
    """One limit: what measures it, how much that does, and the best rate so far in billions."""

    evaluate: Callable[[], Any]
    amount: float
    best: float = 0.0

    def measure(self) -> None:
        """Measure once more."""
        self.best = max(self.best, self.amount / float(np.min(self.evaluate().results)) / 1e9)


def whole_turns(spec: TargetSpec, size: float) -> int:
    """Return ``size`` bytes rounded to whole turns of the loop that reads them."""
    turn = 4 * spec.isa.lanes * UNROLL
    return max(1, round(size / turn)) * turn


def make_limit(spec: TargetSpec, func: tirx.PrimFunc, amount: float, *arrays: np.ndarray) -> Limit:
    """Return the limit that ``func`` on ``arrays`` measures, by doing ``amount`` of its unit."""
    module = tvm.compile(tvm.IRModule({"main": func}), target=spec.target).mod
    tensors = [tvm.runtime.tensor(a) for a in arrays]
    evaluate = module.time_evaluator(
        "main", tvm.cpu(), number=1, repeat=REPEATS, min_repeat_ms=REPEAT_MS
    )
    return Limit(lambda: evaluate(*tensors), amount)


def fma_peak(spec: TargetSpec, threads: int) -> Limit:
    """Return the limit of float32 multiply-adds, in FLOP."""
    a = np.full((threads, spec.isa.lanes), 1e-3, np.float32)
    return register_peak(spec, a, 1, "")


def register_peak(
    spec: TargetSpec, a: np.ndarray, products: int, llvm: str, dot: Callable[..., Any] | None = None
) -> Limit:
    """Return the limit of multiply-adds between registers, ``products`` to a lane."""
    (threads, lanes), (lines, columns) = a.shape, SUMS
    count = lines * columns * lanes

    def body() -> None:
        operand = argument("a", (i64(threads), i64(lanes)), str(a.dtype))
        out = argument("out", (i64(threads), i64(count)))
        with T.attr(T.int64(0), "pragma_import_llvm", llvm):
            with loops(threads, kind=T.parallel) as (t,):
                value = operand[t, T.ramp(i64(0), 1, lanes)]

                def step(p: Any, add: Any) -> None:
                    for line, column in product(range(lines), range(columns)):
                        add(line, column, value, value)

                sums = accumulate(spec.isa, lanes, SUMS, DEPTH, step, dot=dot)
                for line, column in product(range(lines), range(columns)):
                    at = T.ramp(i64((line * columns + column) * lanes), 1, lanes)
                    T.buffer_store(out, sums[column][line], [t, at])

    out = np.zeros((threads, count), np.float32)
    return make_limit(spec, prim_func(body), 2.0 * products * threads * DEPTH * count, a, out)


def read_bandwidth(spec: TargetSpec, threads: int, size: int) -> Limit:
    """Return the limit of reading ``size`` bytes a thread, in bytes; see `whole_turns`."""
    lanes, unroll = spec.isa.lanes, UNROLL
    steps = size // 4 // lanes // unroll
    repeat = max(1, LEAST_READ // size)

    def body() -> None:
        a = argument("a", (i64(threads), i64(steps * unroll * lanes)))
        out = argument("out", (i64(threads), i64(unroll * lanes)))
        with loops(threads, kind=T.parallel) as (t,):
            totals = [T.alloc_buffer((lanes,), "float32", scope="global") for _ in range(unroll)]
            first = T.ramp(0, 1, lanes)
            for total in totals:
                T.buffer_store(total, T.broadcast(T.float32(0), lanes), [first])
            with loops(repeat, steps) as (_, p):
                for i, total in enumerate(totals):
                    at = T.ramp((p * unroll + i) * lanes, 1, lanes)
                    T.buffer_store(total, T.max(total[first], a[t, at]), [first])
            for i, total in enumerate(totals):
                T.buffer_store(out, total[first], [t, T.ramp(i64(i * lanes), 1, lanes)])

    count = steps * unroll * lanes
    a = np.ones((threads, count), np.float32)  # not zeros, whose pages would be one
    out = np.zeros((threads, unroll * lanes), np.float32)
    return make_limit(spec, prim_func(body), 4.0 * threads * count * repeat, a, out)
