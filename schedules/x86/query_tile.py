"""Which kind of tile computes some queries."""

from __future__ import annotations

from tvmstruct.schedules.x86.attention_tile import Index, Operands, Problem, Tile
from tvmstruct.schedules.x86.narrow_tile import NarrowTile
from tvmstruct.schedules.x86.skipping_stream import SkippingStream
from tvmstruct.schedules.x86.wide_tile import WideTile


def declare_tile(problem: Problem, at: Operands, start: Index, queries: int) -> Tile:
    """Allocate the scratch memory of a tile of ``queries`` queries from ``start`` on."""
    kind = NarrowTile if problem.narrow else WideTile
    if problem.streamed and problem.skip is not None:
        kind = SkippingStream
    return kind.declare(problem, at, start, queries)
