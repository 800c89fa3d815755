"""Micro-ops on chip: a ring of kernels, each loaded when it is first used or was overwritten.

As in TVM's VTA runtime (VTA_ISA, section 9), but a launch whose micro-ops all fit loads them at
once, before anything else, while the units wait for their first data anyway.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from tvmstruct.errors import VtaMemoryError
from tvmstruct.ops import Array
from tvmstruct.vta.config import Config, Memory
from tvmstruct.vta.instructions import Uop
from tvmstruct.vta.isa import encode_uops
from tvmstruct.vta.stream import Entry, Transfer2d

PORTABLE_DEPTH = 2048  # micro-ops that every implementation holds

Uops = tuple[tuple[int, int, int], ...]


class UopCache:
    """What is in the micro-op memory, and all micro-ops of a launch in DRAM."""

    def __init__(self, config: Config) -> None:
        self.config = config
        self.depth = min(config.depth(Memory.UOP), PORTABLE_DEPTH)
        self._next = 0
        self._resident: dict[Uops, int] = {}
        self._in_dram: dict[Uops, int] = {}
        self._count = 0
        self._loads: list[tuple[Entry, Uops]] = []
        self._wrapped = False

    def request(self, uops: Uops) -> tuple[tuple[int, int], Entry | None]:
        """Return the first and the end of micro-ops on chip, and the load that puts them there.

        Raises VtaMemoryError where a kernel is larger than the memory.
        """
        if uops in self._resident:
            start = self._resident[uops]
            return (start, start + len(uops)), None
        if len(uops) > self.depth:
            raise VtaMemoryError(
                f"VTA uop scratchpad: a kernel of {len(uops)} micro-ops is "
                f"{len(uops) - self.depth} over its depth of {self.depth}; take smaller tiles"
            )
        if self._next + len(uops) > self.depth:
            self._next, self._wrapped = 0, True
        start, end = self._next, self._next + len(uops)
        self._resident = {
            held: at for held, at in self._resident.items() if at >= end or at + len(held) <= start
        }
        self._resident[uops], self._next = start, end
        if uops not in self._in_dram:
            self._in_dram[uops] = self._count
            self._count += len(uops)
        entry = Transfer2d(start, 0, 1, len(uops), len(uops)).load(Memory.UOP)
        self._loads.append((entry, uops))
        return (start, end), entry

    def words(self) -> Array:
        """Return all micro-ops of the launch, one 32-bit word each."""
        table = [Uop(*uop) for uops in self._in_dram for uop in uops]
        return np.frombuffer(encode_uops(table, self.config), np.uint32)

    def place(self, entries: Sequence[Entry], tile: int) -> list[Entry]:
        """Return the stream with its loads of micro-ops in place, which lie from ``tile`` on."""
        for entry, uops in self._loads:
            entry.set_dram(tile + self._in_dram[uops])
        if self._wrapped or len(self._loads) < 2:
            return list(entries)
        loads = {id(entry) for entry, _ in self._loads}
        single = Transfer2d(0, tile, 1, self._count, self._count).load(Memory.UOP)
        return [single, *(entry for entry in entries if id(entry) not in loads)]
