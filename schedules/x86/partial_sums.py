"""Rows of y that are summed up share by share, each a product of a local block with a weight.

``y[rows] += block[rows, depth] @ w[depth, n]`` for one slice of the depth after the other: how
feed-forward splitting adds up chunks of hidden features and partial-head update adds up heads
(NLP-Fast, section III-B). The block never leaves the cache of the thread that made it, and w is
packed in panels.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import product

from tvm import tirx
from tvm.script.ir_builder import tirx as T

from tvmstruct.schedules.builder import i64, loops
from tvmstruct.schedules.compute.dense import row_segments
from tvmstruct.schedules.x86.packed_dense import VECTORS
from tvmstruct.schedules.x86.register_tile import accumulate
from tvmstruct.targets import Isa

Local = Callable[[object, object], object]  # (row, p): an element of the local block
Write = Callable[[int, object, object], None]  # (vector, row, sum)


@dataclass(frozen=True)
class PartialSums:
    """Rows ``[first, first + count)`` of y, in tiles of ``heights``."""

    isa: Isa
    y: tirx.Buffer
    first: object
    count: object
    heights: tuple[int, ...]

    @property
    def width(self) -> int:
        """Columns of a panel."""
        return VECTORS * self.isa.lanes

    def clear(self, n: int) -> None:
        """Set y to zero, onto which every share adds."""
        lanes = self.isa.lanes
        with loops(self.count, n // lanes) as (row, j):
            place = [self.first + row, T.ramp(j * lanes, 1, lanes)]
            T.buffer_store(self.y, T.broadcast(T.float32(0), lanes), place)

    def add(self, n: int, local: Local, w: tirx.Buffer, offset, depth: int) -> None:
        """Add ``local @ w[offset : offset + depth]`` to all n columns."""
        with loops(n // self.width) as (panel,):

            def write(v: int, row, value, panel=panel) -> None:
                at = T.ramp(panel * self.width + v * self.isa.lanes, 1, self.isa.lanes)
                row = self.first + row
                T.buffer_store(self.y, self.y[row, at] + value, [row, at])

            right = lambda p, v, panel=panel: w[panel, offset + p, self.lane(v)]  # noqa: E731
            self.multiply(local, right, depth, write)

    def multiply(self, left: Local, right: Local, depth: int, write: Write) -> None:
        """Multiply all rows of ``left`` with one panel and hand the sums to ``write``."""
        for segment in row_segments(self.count, self.heights):
            with loops(segment.count) as (t,):
                row = segment.start + t * segment.height
                tile = (segment.height, VECTORS)

                def step(p, add, row=row, tile=tile) -> None:
                    for i, v in product(*map(range, tile)):
                        add(i, v, T.broadcast(left(row + i, p), self.isa.lanes), right(p, v))

                sums = accumulate(self.isa, self.isa.lanes, tile, depth, step)
                for i, v in product(*map(range, tile)):
                    write(v, row + i, sums[v][i])

    def finish(self, n: int, bias: tirx.Buffer | None, residual: tirx.Buffer | None) -> None:
        """Add bias and residual: last, since sums onto a large residual would lose digits."""
        if bias is None and residual is None:
            return
        lanes = self.isa.lanes
        with loops(self.count, n // lanes) as (row, j):
            at = T.ramp(j * lanes, 1, lanes)
            value = self.y[self.first + row, at]
            value = value if bias is None else value + bias[at]
            value = value if residual is None else value + residual[self.first + row, at]
            T.buffer_store(self.y, value, [self.first + row, at])

    def lane(self, v: int):
        """Return the columns of vector v of a panel."""
        return T.ramp(i64(v * self.isa.lanes), 1, self.isa.lanes)
