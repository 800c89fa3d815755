"""Transpose a square of values in registers."""

from __future__ import annotations

from collections.abc import Callable

from tvm import tirx
from tvm.ir import Expr
from tvm.script.ir_builder import tirx as T

from tvmstruct.schedules.x86.attention_tile import Index, ramp, registers

Load = Callable[[int, Index, int], Expr]  # (row, first column, lanes)


def transpose_square(load: Load, to: tirx.Buffer, row: int, column: Expr, size: int) -> None:
    """Transpose ``size`` x ``size`` values in registers, swapping ever smaller quarters."""
    rows = registers(size, size)
    for i in range(size):
        T.buffer_store(rows[i], load(row + i, column, size), [ramp(0, size)])
    half = size // 2
    while half:
        swapped = registers(size, size)
        for i in (i for i in range(size) if not i & half):
            low, high = (rows[j][ramp(0, size)] for j in (i, i + half))
            kept = [j if not j & half else size + (j ^ half) for j in range(size)]
            gone = [j | half if not j & half else size + j for j in range(size)]
            for j, picks in ((i, kept), (i + half, gone)):
                value = tirx.Shuffle([low, high], picks)
                T.buffer_store(swapped[j], value, [ramp(0, size)])
        rows, half = swapped, half // 2
    for i in range(size):
        T.buffer_store(to, rows[i][ramp(0, size)], [column + i, ramp(row, size)])
