"""Cache misses without hardware counters: a saved model in the caches that cachegrind simulates.

Valgrind knows no AVX-512, so the model is compiled for AVX2, and it runs threads one at a time,
so for one thread. Python's own start is far longer than a call of the model: callgrind, which has
cachegrind's caches, can be told when to simulate, and does so for two calls, the first of which
only warms the caches.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from tvmstruct.errors import InputError, ProfilingError
from tvmstruct.profiling.prepare import Shapes, prepare

TARGET = "llvm -mcpu=znver2 -num-cores=1"
LINE, WAYS = 64, 16  # bytes of a cache line, lines of a set
CACHE = "2MB"
FIRST = (32 << 10, 8, LINE)  # of both first levels: bytes, lines of a set, bytes of a line
UNITS = {"KB": 1 << 10, "MB": 1 << 20}
ENVIRONMENT = {"TVM_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "PYTHONHASHSEED": "0"}
TAIL = 400  # last characters of what a failed run wrote


@dataclass(frozen=True)
class Simulation:
    """Data references and misses of one call: of the first level, and of the last (``LL``).

    ``cache`` is the size of the last level in bytes.
    """

    model: str
    shapes: Mapping[str, tuple[int, ...]]
    cache: int
    instructions: int
    references: int
    d1_misses: int
    lld_misses: int

    def to_json(self) -> str:
        """Return everything as JSON text."""
        return json.dumps(asdict(self), indent=2)

    def __str__(self) -> str:
        shapes = ", ".join(f"{n} {'x'.join(map(str, s))}" for n, s in self.shapes.items())
        lines = [f"{self.model}: {shapes}; AVX2, 1 thread, simulated, one call with warm caches"]
        for name, count in (
            ("instructions", self.instructions),
            ("data references", self.references),
            ("D1 misses", self.d1_misses),
            (f"LL data misses ({self.cache / (1 << 20):g} MB)", self.lld_misses),
        ):
            share = f" {count / self.references:8.2%}" if self.references else ""
            lines.append(f"{name:26}{count:16,}{share if 'misses' in name else ''}")
        return "\n".join(lines)


def simulate(
    model: Any,
    shapes: Shapes | None = None,
    *,
    cache: str = CACHE,
    precision: str = "f32",
    memory: str = "auto",
) -> Simulation:
    """Return what one call of a source or a built-in configuration does to simulated caches.

    ``cache`` is the size of the last level, such as "2MB". Takes minutes: a call runs some
    hundred times slower. Raises ProfilingError
    where valgrind is missing or fails, InputError for a size that cannot be simulated.
    """
    size = cache_bytes(cache)
    check_valgrind()
    options = {"target": TARGET, "precision": precision, "memory": memory, "threads": None}
    prepared = prepare(model, shapes, options)
    with TemporaryDirectory() as folder:
        file = Path(folder) / "model.tvms"
        prepared.model.save(file)
        events = _run(file, size)
    return Simulation(
        prepared.name,
        prepared.shapes,
        size,
        instructions=events["Ir"],
        references=events["Dr"] + events["Dw"],
        d1_misses=events["D1mr"] + events["D1mw"],
        lld_misses=events["DLmr"] + events["DLmw"],
    )


def check_valgrind() -> None:
    """Raise ProfilingError where there is no valgrind."""
    if shutil.which("valgrind") is None:
        raise ProfilingError("--cachegrind needs valgrind: apt-get install valgrind")


def cache_bytes(text: str) -> int:
    """Return the bytes of "2MB" or "512KB"; InputError where it is no such size."""
    found = re.fullmatch(r"(\d+)\s*(KB|MB)", text.strip().upper())
    size = int(found[1]) * UNITS[found[2]] if found else 0
    sets = size // (LINE * WAYS)
    if not sets or sets & (sets - 1):
        raise InputError(
            f"--cache {text}: want a power of two in KB or MB from {LINE * WAYS // UNITS['KB']}KB, "
            f"such as {CACHE}"
        )
    return size


def parse(text: str) -> dict[str, int]:
    """Return the totals in callgrind's output file by event: Ir, Dr, D1mr, DLmr, Dw, ..."""
    # Its "summary" also takes off what calls under way had counted before the counts went to zero.
    lines = dict(
        line.split(":", 1) for line in text.splitlines() if line.startswith(("events:", "totals:"))
    )
    names, counts = lines.get("events", "").split(), lines.get("totals", "").split()
    if not names or len(names) != len(counts) or not {"Ir", "Dr", "DLmr", "DLmw"} <= set(names):
        raise ProfilingError(
            f"callgrind's output has events {names} and totals {counts}; want one count for "
            "each event, with those of the caches"
        )
    return dict(zip(names, map(int, counts), strict=True))


def _run(file: Path, size: int) -> dict[str, int]:
    out = file.with_name("callgrind.out")
    caches = {"I1": FIRST, "D1": FIRST, "LL": (size, WAYS, LINE)}
    command = [
        *("valgrind", "--tool=callgrind", "--instr-atstart=no", "--cache-sim=yes"),
        *(f"--{level}={','.join(map(str, numbers))}" for level, numbers in caches.items()),
        *(f"--callgrind-out-file={out}", sys.executable),
        *("-m", "tvmstruct.profiling.run_saved", str(file)),
    ]
    environment = os.environ | ENVIRONMENT
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    if done.returncode or not out.exists():
        raise ProfilingError(
            f"valgrind ended with code {done.returncode}: {done.stderr.strip()[-TAIL:]}"
        )
    return parse(out.read_text(errors="replace"))
