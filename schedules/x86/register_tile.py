"""The loop that every product on x86 ends in: sums in registers over one depth.

A sum stays in a register when its buffer has scope "global", is strictly under 1024 bytes, and
only constants index it after unrolling: one small buffer for up to 8 lines of a column.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import product
from typing import Any

from tvm import tirx
from tvm.script.ir_builder import tirx as T

from tvmstruct.schedules.builder import fma, loops
from tvmstruct.targets import Isa

ACCUMULATORS = 8  # independent sums that hide the latency of an FMA
LINES = 8  # vectors of a buffer: 512 bytes at most

Add = Callable[[int, int, object, object], None]  # (line, column, left, right): sum += left * right


def accumulate(
    isa: Isa,
    lanes: int,
    tile: tuple[int, int],
    depth: int | tuple[int, ...],
    step: Callable[[Any, Add], None],
    start: Callable[[int, int], object] | None = None,
    *,
    dtype: str = "float32",
    dot: Callable[[object, object, object], object] | None = None,
) -> list[list]:
    """Run ``step(p, add)`` over ``depth`` and return the sums as ``[column][line]``.

    ``tile`` is (lines, columns of vectors). Where ``depth`` is a nest of loops, p is a list.
    ``start(line, column)`` gives the first value of a sum, zero without it. ``dot(sum, left,
    right)`` adds a product to a sum, fma without it. A small tile keeps several partial sums of
    each, so that enough FMAs are under way.
    """
    lines, columns = tile
    dot = dot or (lambda total, left, right: fma(left, right, total, lanes, isa.fma))
    nest = (depth,) if isinstance(depth, int) else depth
    fits = [n for n in (4, 2) if lines * columns * n <= ACCUMULATORS]
    parts, split = next(((n, i) for n in fits for i, e in enumerate(nest) if e % n == 0), (1, 0))
    totals = [[_Sums(lines, lanes, dtype) for _ in range(columns)] for _ in range(parts)]
    for part, column, line in product(range(parts), range(columns), range(lines)):
        value = tirx.const(0, dtype)
        value = value if lanes == 1 else T.broadcast(value, lanes)
        if start is not None and part == 0:
            value = start(line, column)
        totals[part][column].set(line, value)
    with loops(*(e // parts if i == split else e for i, e in enumerate(nest))) as at:
        for part in range(parts):

            def add(line: int, column: int, left, right, part: int = part) -> None:
                total = totals[part][column]
                total.set(line, dot(total.get(line), left, right))

            p = [at_i * parts + part if i == split else at_i for i, at_i in enumerate(at)]
            step(p[0] if isinstance(depth, int) else p, add)

    def result(column: int, line: int):
        value = totals[0][column].get(line)
        for part in range(1, parts):
            value = value + totals[part][column].get(line)
        return value

    return [[result(column, line) for line in range(lines)] for column in range(columns)]


class _Sums:
    """The sums of one column, in buffers small enough to stay in registers."""

    def __init__(self, lines: int, lanes: int, dtype: str) -> None:
        self.lanes = lanes
        sizes = [min(LINES, lines - first) for first in range(0, lines, LINES)]
        self.buffers = [T.alloc_buffer((n * lanes,), dtype, scope="global") for n in sizes]

    def get(self, line: int):
        return self.buffers[line // LINES][self._place(line)]

    def set(self, line: int, value) -> None:
        T.buffer_store(self.buffers[line // LINES], value, [self._place(line)])

    def _place(self, line: int):
        first = line % LINES * self.lanes
        return first if self.lanes == 1 else T.ramp(first, 1, self.lanes)
