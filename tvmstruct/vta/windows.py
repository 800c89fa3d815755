"""What a run of instructions touches together, for a run that moves forwards."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from tvmstruct.vta.accesses import Accesses
from tvmstruct.vta.config import Config, Memory

FAR = 1 << 33


class Footprint(NamedTuple):
    """Tiles of all memories side by side in one set, and the span of DRAM loads and stores."""

    reads: int = 0
    writes: int = 0
    loads: tuple[int, int] = (FAR, 0)
    stores: tuple[int, int] = (FAR, 0)

    def join(self, other: Footprint) -> Footprint:
        """Return what both touch."""
        return Footprint(
            self.reads | other.reads,
            self.writes | other.writes,
            _span(self.loads, other.loads),
            _span(self.stores, other.stores),
        )

    def may_conflict(self, other: Footprint) -> bool:
        """Return whether one may write what the other touches; exact but for DRAM."""
        return bool(
            self.writes & (other.reads | other.writes)
            or other.writes & self.reads
            or _meet(self.stores, other.loads)
            or _meet(self.loads, other.stores)
        )


NOTHING = Footprint()


def footprint(touched: Accesses, config: Config) -> Footprint:
    """Return what an instruction touches; a STORE reads ACC, micro-ops have one unit only."""
    low, sets = 0, [0, 0]
    for memory in (Memory.WGT, Memory.INP, Memory.ACC):
        for i, members in enumerate((touched.reads, touched.writes)):
            sets[i] |= members.get(memory, 0) << low
        if memory is Memory.ACC:
            sets[0] |= touched.reads.get(Memory.OUT, 0) << low
        low += config.depth(memory)
    span = (touched.dram.start, touched.dram.end) if touched.dram else (FAR, 0)
    if Memory.OUT in touched.reads:
        return Footprint(*sets, stores=span)
    return Footprint(*sets, loads=span)


class Window:
    """Footprints of items ``start`` and later of a growing list, ``start`` never going back.

    Two stacks: sums from each item to the end of an old part, and one sum of the new part.
    Every item is then joined at most twice, however long windows are.
    """

    def __init__(self, items: Sequence[Footprint]) -> None:
        self.items = items
        self.sums: list[Footprint] = []  # from the end of the old part backwards
        self.end = 0  # of the old part
        self.new, self.seen = NOTHING, 0

    def joined(self, start: int) -> Footprint:
        """Return what the items from ``start`` on touch together."""
        while self.seen < len(self.items):
            self.new = self.new.join(self.items[self.seen])
            self.seen += 1
        if start >= self.end:
            self._move(start)
        else:
            del self.sums[self.end - start :]
        return self.sums[-1].join(self.new) if self.sums else self.new

    def _move(self, start: int) -> None:
        """Make all that was seen the old part."""
        self.sums, total = [], NOTHING
        for item in reversed(self.items[start : self.seen]):
            total = total.join(item)
            self.sums.append(total)
        self.end, self.new = self.seen, NOTHING


def _span(a: tuple[int, int], b: tuple[int, int]) -> tuple[int, int]:
    return min(a[0], b[0]), max(a[1], b[1])


def _meet(a: tuple[int, int], b: tuple[int, int]) -> bool:
    return a[0] < b[1] and b[0] < a[1]
