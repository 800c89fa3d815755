"""The loop that every product on x86 ends in: sums in registers over one depth.

A sum stays in a register when its buffer has scope "global", is strictly under 1024 bytes, and
only constants index it after unrolling: one small buffer per column of the tile.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import product

from tvm import tirx
from tvm.script.ir_builder import tirx as T

from tvmstruct.schedules.builder import fma, loops
from tvmstruct.targets import Isa

ACCUMULATORS = 8  # independent sums that hide the latency of an FMA

Add = Callable[[int, int, object, object], None]  # (line, column, left, right): sum += left * right


def accumulate(
    isa: Isa,
    lanes: int,
    tile: tuple[int, int],
    depth: int,
    step: Callable[[object, Add], None],
    start: Callable[[int, int], object] | None = None,
    *,
    dtype: str = "float32",
    dot: Callable[[object, object, object], object] | None = None,
) -> list[list]:
    """Run ``step(p, add)`` over ``depth`` and return the sums as ``[column][line]``.

    ``tile`` is (lines, columns of vectors). ``start(line, column)`` gives the first value of a
    sum, zero without it. ``dot(sum, left, right)`` adds a product to a sum, fma without it. A
    small tile keeps several partial sums of each, so that enough FMAs
    are under way.
    """
    lines, columns = tile
    dot = dot or (lambda total, left, right: fma(left, right, total, lanes, isa.fma))
    parts = next((n for n in (4, 2) if lines * columns * n <= ACCUMULATORS and depth % n == 0), 1)
    totals = [
        [T.alloc_buffer((lines * lanes,), dtype, scope="global") for _ in range(columns)]
        for _ in range(parts)
    ]
    for part, column, line in product(range(parts), range(columns), range(lines)):
        value = T.broadcast(tirx.const(0, dtype), lanes)
        if start is not None and part == 0:
            value = start(line, column)
        T.buffer_store(totals[part][column], value, [T.ramp(line * lanes, 1, lanes)])
    with loops(depth // parts) as (p,):
        for part in range(parts):

            def add(line: int, column: int, left, right, part: int = part) -> None:
                total, place = totals[part][column], T.ramp(line * lanes, 1, lanes)
                T.buffer_store(total, dot(total[place], left, right), [place])

            step(p * parts + part, add)

    def result(column: int, line: int):
        place = T.ramp(line * lanes, 1, lanes)
        value = totals[0][column][place]
        for part in range(1, parts):
            value = value + totals[part][column][place]
        return value

    return [[result(column, line) for line in range(lines)] for column in range(columns)]
