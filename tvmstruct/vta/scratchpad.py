"""Who holds which tiles of an on-chip memory: buffers of several versions, and what is in them.

A buffer has ``versions`` places of equal size. Filling it takes the place used longest ago, so the
load of one step can run while the matrix unit still reads the step before (double buffering for
two versions). A place remembers what was loaded into it: what is still there is not loaded again,
so a buffer with as many versions as there are different loads is resident.
"""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass, field

from tvmstruct.errors import VtaMemoryError


@dataclass(eq=False)
class Buffer:
    """``versions`` times ``size`` tiles from ``start`` on of the scratchpad ``memory``."""

    memory: str
    start: int
    size: int
    versions: int
    current: int = 0
    held: list[Hashable | None] = field(default_factory=list)
    fresh: bool = True  # nothing was put there yet
    _order: list[int] = field(default_factory=list)  # places, the one used longest ago first
    _spare: int = 0  # places made ready ahead

    def __post_init__(self) -> None:
        self.held = [None] * self.versions
        self._order = list(range(self.versions))

    @property
    def base(self) -> int:
        """The first tile of the current place."""
        return self.start + self.current * self.size

    def fill(self, key: Hashable | None) -> bool:
        """Move to the place that holds ``key``, else to the oldest; returns whether to load it."""
        resident = key is not None and key in self.held
        self.current = self.held.index(key) if resident else self._order[0]
        self._order.remove(self.current)
        self._order.append(self.current)
        self.held[self.current] = key
        self.fresh = False
        return not resident

    def change(self) -> None:
        """Note that what the current place holds is no longer what was loaded."""
        self.held[self.current] = None

    def spare(self) -> None:
        """Note that all places but the current one are ready for use too."""
        self._spare = self.versions - 1

    def take_spare(self) -> bool:
        """Move to a place that is ready, if there is one; returns whether there was."""
        if not self._spare:
            return False
        self._spare -= 1
        self.fill(None)
        return True


class Scratchpad:
    """One on-chip memory of ``depth`` tiles, given out from the first tile on."""

    def __init__(self, memory: str, depth: int) -> None:
        self.memory, self.depth, self.used = memory, depth, 0

    def allocate(self, size: int, versions: int) -> Buffer:
        """Return a buffer; nothing is ever spilled.

        Raises VtaMemoryError where it does not fit.
        """
        end = self.used + size * versions
        if end > self.depth:
            raise VtaMemoryError(
                f"VTA {self.memory} scratchpad: {size} tiles in {versions} versions do not fit "
                f"beside the {self.used} in use, {end - self.depth} tiles over its depth of "
                f"{self.depth}; take smaller tiles or fewer versions, VTA does not spill"
            )
        buffer = Buffer(self.memory, self.used, size, versions)
        self.used = end
        return buffer

    def release(self) -> None:
        """Take all tiles back; what they hold stays until something is written there."""
        self.used = 0
