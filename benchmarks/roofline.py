"""The machine's own limits, measured in the same run: FMA peak and read bandwidth."""

from __future__ import annotations

import numpy as np
import tvm
from tvm.script.ir_builder import tirx as T

from tvmstruct.schedules.builder import argument, i64, loops, prim_func
from tvmstruct.schedules.x86.register_tile import accumulate
from tvmstruct.targets import resolve

LEVELS = {"L1": 16 << 10, "L2": 512 << 10, "L3": 8 << 20, "memory": 256 << 20}  # bytes a thread


def measure(threads: int) -> dict[str, float]:
    """Return GFLOP/s of an FMA loop, and GB/s read from each level, on ``threads`` threads."""
    spec = resolve("host")
    found = {"fma_gflops": _fma_peak(spec, threads)}
    for level, size in LEVELS.items():
        found[f"{level}_gbps"] = _bandwidth(spec, threads, size)
    return found


def _run(spec, func, flops: float, *arrays) -> float:
    module = tvm.compile(tvm.IRModule({"main": func}), target=spec.target).mod
    tensors = [tvm.runtime.tensor(a) for a in arrays]
    evaluate = module.time_evaluator("main", tvm.cpu(), number=1, repeat=9, min_repeat_ms=20)
    return flops / float(np.min(evaluate(*tensors).results)) / 1e9


def _fma_peak(spec, threads: int) -> float:
    lanes, depth, lines, columns = spec.isa.lanes, 1 << 16, 6, 2

    def body() -> None:
        a = argument("a", (i64(threads), i64(lanes)))
        out = argument("out", (i64(threads), i64(lines * columns * lanes)))
        with loops(threads, kind=T.parallel) as (t,):
            value = a[t, T.ramp(i64(0), 1, lanes)]

            def step(p, add) -> None:
                for line in range(lines):
                    for column in range(columns):
                        add(line, column, value, value)

            sums = accumulate(spec.isa, lanes, (lines, columns), depth, step)
            for line in range(lines):
                for column in range(columns):
                    at = T.ramp(i64((line * columns + column) * lanes), 1, lanes)
                    T.buffer_store(out, sums[column][line], [t, at])

    a = np.full((threads, lanes), 1e-3, np.float32)
    out = np.zeros((threads, lines * columns * lanes), np.float32)
    return _run(spec, prim_func(body), 2.0 * threads * depth * lines * columns * lanes, a, out)


def _bandwidth(spec, threads: int, size: int) -> float:
    lanes, unroll = spec.isa.lanes, 8
    steps = size // 4 // lanes // unroll
    repeat = max(1, (8 << 20) // size)

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
    a = np.random.default_rng(0).random((threads, count), np.float32)
    out = np.zeros((threads, unroll * lanes), np.float32)
    return _run(spec, prim_func(body), 4.0 * threads * count * repeat, a, out)


if __name__ == "__main__":
    for name, value in measure(resolve("host").threads).items():
        print(f"{name:14} {value:8.1f}")
