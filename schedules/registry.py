"""Kernels by name: what a compiled kernel is, and how its PrimFunc is marked and found.

A kernel is a scheduled S-TIR PrimFunc. Its attribute ``tvmstruct.kernel`` names the kernel
(`packed_dense`, `chain`, ...), its symbol adds the parameters that it was built for, so that
equal symbols mean equal code and a kernel compiled once serves every bucket.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass

from tvm import tirx

KERNEL = "tvmstruct.kernel"
WORK = "tvmstruct.work"  # multiply-adds (or elements) per row, for reports and the schedule test


@dataclass(frozen=True)
class Kernel:
    """A scheduled PrimFunc under the symbol that Relax calls."""

    symbol: str
    func: tirx.PrimFunc


_CACHE: dict[str, Kernel] = {}


def make_kernel(
    name: str, key: tuple[object, ...], build: Callable[[], tirx.PrimFunc], *, work: int
) -> Kernel:
    """Build, mark and remember the kernel ``name`` with parameters ``key``."""
    symbol = _symbol(name, key)
    if symbol not in _CACHE:
        func = build().with_attr("tirx.is_scheduled", True).with_attr(KERNEL, name)
        func = func.with_attr(WORK, work).with_attr("global_symbol", symbol)
        _CACHE[symbol] = Kernel(symbol, func)
    return _CACHE[symbol]


def _symbol(name: str, key: tuple[object, ...]) -> str:
    text = "_".join(str(part) for part in key)
    digest = hashlib.sha256(repr((name, key)).encode()).hexdigest()[:10]
    readable = "".join(c if c.isalnum() else "_" for c in text)[:48]
    return f"tvmstruct_{name}_{readable}_{digest}"
