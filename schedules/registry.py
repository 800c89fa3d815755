"""Kernels by name: what a compiled kernel is, and how its PrimFunc is marked and found.

A kernel is a scheduled S-TIR PrimFunc. Its attribute ``tvmstruct.kernel`` names the kernel
(`packed_dense`, `chain`, ...), its symbol adds the parameters that it was built for, so that
equal symbols mean equal code and a kernel compiled once serves every bucket.

A kernel with choices has a `Space` too: the same schedule function at a fixed number of rows,
which asks a `Pick` for every choice. While tuning that draws, else it answers what a record says.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

from tvm import tirx

KERNEL = "tvmstruct.kernel"
WORK = "tvmstruct.work"  # multiply-adds (or elements) per row, for reports and the schedule test


class Pick(Protocol):
    """Answers a schedule function's questions: which of ``options`` for the choice ``name``?"""

    def __call__(self, name: str, options: Sequence[int], default: int) -> int:
        """Return one of ``options``."""
        ...


def pick_default(name: str, options: Sequence[int], default: int) -> int:
    """Pick what the schedule itself suggests."""
    return default


def divisors(of: int, least: int, most: int) -> list[int]:
    """Return options for a step through ``of``: its divisors in a range, and all of it."""
    return sorted({d for d in range(least, most + 1) if of % d == 0} | {of})


@dataclass(frozen=True)
class Space:
    """The choices of a kernel once its number of rows is fixed.

    ``parameters`` say what it computes, apart from the shapes of its arguments;
    ``build(rows, pick)`` schedules it.
    """

    parameters: str
    build: Callable[[int, Pick], tirx.PrimFunc]


@dataclass(frozen=True)
class Kernel:
    """A scheduled PrimFunc under the symbol that Relax calls, and its choices if it has any."""

    symbol: str
    func: tirx.PrimFunc
    name: str = ""
    space: Space | None = None


_CACHE: dict[str, Kernel] = {}


def make_kernel(
    name: str,
    key: tuple[object, ...],
    build: Callable[[], tirx.PrimFunc],
    *,
    work: int,
    space: Space | None = None,
) -> Kernel:
    """Build, mark and remember the kernel ``name`` with parameters ``key``."""
    symbol = _symbol(name, key)
    if symbol not in _CACHE:
        func = build().with_attr("tirx.is_scheduled", True).with_attr(KERNEL, name)
        func = func.with_attr(WORK, work).with_attr("global_symbol", symbol)
        _CACHE[symbol] = Kernel(symbol, func, name, space)
    return _CACHE[symbol]


def tuned_kernel(kernel: Kernel, rows: int, pick: Pick, key: tuple[object, ...]) -> Kernel:
    """Return ``kernel`` for exactly ``rows`` rows as ``pick`` schedules it; ``key`` names that."""
    assert kernel.space is not None
    build, work = kernel.space.build, int(kernel.func.attrs[WORK])
    return make_kernel(
        kernel.name, (kernel.symbol, rows, *key), lambda: build(rows, pick), work=work
    )


def _symbol(name: str, key: tuple[object, ...]) -> str:
    text = "_".join(str(part) for part in key)
    digest = hashlib.sha256(repr((name, key)).encode()).hexdigest()[:10]
    readable = "".join(c if c.isalnum() else "_" for c in text)[:48]
    return f"tvmstruct_{name}_{readable}_{digest}"
