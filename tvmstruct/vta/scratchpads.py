"""What is known of the scratchpads without running: micro-ops, written tiles, stale outputs."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from tvmstruct.vta.accesses import Accesses
from tvmstruct.vta.config import Memory
from tvmstruct.vta.isa import Alu, Gemm, Instruction, Load


@dataclass
class ScratchpadState:
    """Sets of tiles (bit i for tile i), kept up to date instruction by instruction.

    ``uops`` (depth, 3) is what the uop memory holds, ``written`` what has been written since
    power-up, ``fresh`` the outputs that hardware's OUT memory holds: those of accumulators
    whose last write was an ALU operation or a GEMM that is no reset.
    """

    uops: np.ndarray
    written: dict[Memory, int] = field(default_factory=dict[Memory, int])
    fresh: int = 0

    def copy(self) -> ScratchpadState:
        """Return an independent copy."""
        return ScratchpadState(self.uops.copy(), dict(self.written), self.fresh)

    def unwritten(self, touched: Accesses) -> tuple[Memory, int] | None:
        """Return a memory and the tiles that are read but were never written, if any."""
        for memory, tiles in touched.reads.items():
            source = Memory.ACC if memory is Memory.OUT else memory
            if missing := tiles & ~self.written.get(source, 0):
                return memory, missing
        return None

    def apply(self, instruction: Instruction, touched: Accesses) -> None:
        """Note what an instruction writes; micro-ops themselves are up to the caller."""
        for memory, tiles in touched.writes.items():
            self.written[memory] = self.written.get(memory, 0) | tiles
        tiles = touched.writes.get(Memory.ACC, 0)
        if isinstance(instruction, Alu) or (
            isinstance(instruction, Gemm) and not instruction.reset
        ):
            self.fresh |= tiles
        elif isinstance(instruction, Load | Gemm):
            self.fresh &= ~tiles
