"""Dependencies between the three units of VTA, and the tokens that enforce them.

VTA orders nothing between its load, compute and store units but by tokens (VTA_ISA, section 5).
Every instruction says which tiles it reads and writes; `Hazards` remembers for each tile the last
instruction of each unit that did, and answers with the pairs of instructions that a token must
tie together. Vector clocks leave out every pair that earlier tokens already imply.

A token is pushed by exactly the instruction that is waited for. Within a channel the instructions
waited for only ever advance, so the n-th pop takes the n-th push, and since tokens point backwards
in the stream, which fetch dispatches in order, no stream can deadlock.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Hashable
from dataclasses import dataclass, field

import numpy as np

from tvmstruct.ops import Array
from tvmstruct.vta.instructions import Unit

MOST_PENDING = 255  # tokens in one channel: there hardware counters saturate
AHEAD = 200  # tokens that a unit pushes before it waits for the one that takes them


@dataclass(frozen=True, eq=False)
class Access:
    """Tiles ``index`` (any order, repeats allowed) of a memory; ``writes`` them or reads them."""

    memory: Hashable
    index: Array | slice
    writes: bool


@dataclass
class _Memory:
    """For each unit and tile the number of instructions up to its last write and last read."""

    size: int
    written: Array = field(init=False)
    read: Array = field(init=False)

    def __post_init__(self) -> None:
        self.written = np.zeros((len(Unit), self.size), np.int64)
        self.read = np.zeros((len(Unit), self.size), np.int64)


class Hazards:
    """What each unit did to each tile, and what each unit knows of the others."""

    def __init__(self) -> None:
        self._memories: dict[Hashable, _Memory] = {}
        self._known = np.zeros((len(Unit), len(Unit)), np.int64)  # by unit: done before it goes on
        self._clocks: tuple[list[Array], ...] = tuple([] for _ in Unit)
        self._tokens: dict[tuple[Unit, Unit], list[tuple[int, int]]] = {}  # (pusher, popper)

    def add_memory(self, memory: Hashable, size: int) -> None:
        """Declare a memory of ``size`` tiles."""
        self._memories[memory] = _Memory(size)

    def wanted(self, unit: Unit, accesses: tuple[Access, ...]) -> dict[Unit, int]:
        """Return how many instructions of other units must be done before the next of ``unit``."""
        found: dict[Unit, int] = {}
        for other in Unit:
            if other == unit:
                continue
            count = max((self._last(other, access) for access in accesses), default=0)
            if count > self._known[unit, other]:
                found[other] = count
        return found

    def overdue(self, unit: Unit) -> dict[Unit, int]:
        """Return what ``unit`` must wait for lest its tokens overflow the counters of others."""
        found: dict[Unit, int] = {}
        for (source, other), tokens in self._tokens.items():
            if source == unit and len(tokens) > AHEAD:
                _, popper = tokens[-AHEAD]
                if popper > self._known[unit, other]:
                    found[other] = popper
        return found

    def _last(self, unit: Unit, access: Access) -> int:
        memory = self._memories[access.memory]
        last = int(memory.written[unit, access.index].max(initial=0))
        if access.writes:
            last = max(last, int(memory.read[unit, access.index].max(initial=0)))
        return last

    def wait(self, unit: Unit, other: Unit, count: int) -> None:
        """Note that the next instruction of ``unit`` waits for the first ``count`` of another."""
        np.maximum(self._known[unit], self._clocks[other][count - 1], out=self._known[unit])
        self._tokens.setdefault((other, unit), []).append((count, len(self._clocks[unit]) + 1))

    def knows(self, unit: Unit, other: Unit) -> int:
        """Return how many instructions of another unit are done before the next of ``unit``."""
        return int(self._known[unit, other])

    def first_to_know(self, other: Unit, count: int) -> int:
        """Return the first instruction of compute that ``count`` of another unit precede."""
        clocks = self._clocks[Unit.COMPUTE]
        return bisect_left(clocks, count, key=lambda clock: clock[other]) + 1

    def count(self, unit: Unit) -> int:
        """Return how many instructions a unit has."""
        return len(self._clocks[unit])

    def issue(self, unit: Unit, accesses: tuple[Access, ...]) -> int:
        """Note an instruction and what it does; returns its number within the unit, from 1."""
        number = len(self._clocks[unit]) + 1
        self._known[unit, unit] = number
        self._clocks[unit].append(self._known[unit].copy())
        for access in accesses:
            memory = self._memories[access.memory]
            (memory.written if access.writes else memory.read)[unit, access.index] = number
        return number

    def pending(self) -> dict[tuple[Unit, Unit], int]:
        """Return for each channel (from, to) the most tokens that can be in it at a time."""
        found = {}
        for (source, unit), tokens in self._tokens.items():
            popped, most = 0, 0
            for pushed, (number, _) in enumerate(tokens, 1):
                done = self._clocks[source][number - 1][unit]
                while tokens[popped][1] <= done:
                    popped += 1
                most = max(most, pushed - popped)
            found[source, unit] = most
        return found
