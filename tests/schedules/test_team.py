"""A team of threads: nobody passes a barrier before everybody is there."""

from __future__ import annotations

import subprocess
import sys

import pytest

# A child, because TVM reads the number of threads once. Each Python thread has workers of its own.
SCRIPT = """
import os, sys
os.environ["TVM_NUM_THREADS"], callers = sys.argv[1], int(sys.argv[2])

from concurrent.futures import ThreadPoolExecutor
import numpy as np
import tvm
from tvm.script.ir_builder import tirx as T
from tvmstruct.schedules.builder import argument, i64, loops, prim_func, symbol
from tvmstruct.schedules.compute.team import alone, barrier, team

N = 37

def body():
    m = symbol("m")
    x, y, total = (argument(name, shape) for name, shape in
                   (("x", (i64(N),)), ("y", (i64(N),)), ("total", (m,))))
    with team(), loops(m) as (t,):
        for a, b in ((x, y), (y, x)):
            with barrier(), T.parallel(T.int64(0), T.int64(N)) as i:
                T.buffer_store(b, a[N - 1 - i] + T.float32(1), [i])
        with alone():
            T.buffer_store(total, T.float32(0), [t])
            with loops(N) as (i,):
                T.buffer_store(total, total[t] + x[i], [t])

function = prim_func(body).with_attr("global_symbol", "f")
library = tvm.compile(tvm.IRModule({"f": function}), target="llvm").mod

def run(steps):
    x = np.arange(N, dtype=np.float32)
    given = [tvm.runtime.tensor(a) for a in (x, x, np.zeros(steps, np.float32))]
    library["f"](*given)
    np.testing.assert_array_equal(given[0].numpy(), x + 2 * steps)
    sums = x.sum() + N * 2 * np.arange(1, steps + 1)
    np.testing.assert_array_equal(given[2].numpy(), sums)

with ThreadPoolExecutor(callers) as pool:
    for steps in (1, 300):
        list(pool.map(run, [steps] * callers))
if callers > 1:
    run(1)  # makes the workers of this thread
    tvm.get_global_func("runtime.config_threadpool")(1, 3)  # fewer than at first
    run(300)
"""


@pytest.mark.parametrize(("workers", "callers"), [(1, 1), (7, 3)], ids=lambda value: f"{value}")
def test_nobody_passes_a_barrier_early(workers, callers, tmp_path) -> None:
    """Also with more threads than cores: then one waits for another that is not running."""
    path = tmp_path / "team.py"  # kernels are written from a file
    path.write_text(SCRIPT)
    command = [sys.executable, str(path), str(workers), str(callers)]
    done = subprocess.run(command, check=False, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
