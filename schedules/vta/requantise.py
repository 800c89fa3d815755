"""From int32 sums to int8 on the vector ALU."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from tvmstruct.errors import VtaError
from tvmstruct.ops import Array
from tvmstruct.schedules.compute.tile_matmul import TileEpilogue

MOST_SHIFT = 15  # in one instruction, on every implementation of VTA
IMMEDIATE = 1 << 15
NONE = TileEpilogue(low=None, high=None)


@dataclass(frozen=True, eq=False)
class Requantise:
    """+ bias, ReLU, right shift of each channel, clip to [-128, 127]."""

    bias: Array  # (n_out,) int32
    shift: Array  # (n_out,) int32, 0 to 30
    relu: bool = False

    def __post_init__(self) -> None:
        least, most = int(self.shift.min()), int(self.shift.max())
        if least < 0 or most > 2 * MOST_SHIFT:
            raise VtaError(f"VTA: shifts from {least} to {most}; want 0 to {2 * MOST_SHIFT}")

    @property
    def epilogue(self) -> TileEpilogue:
        """The ALU steps: what all channels share takes an immediate, the rest tiles."""
        shift = int(self.shift.max())
        same = bool((self.bias == self.bias[0]).all()) and abs(int(self.bias[0])) < IMMEDIATE
        uniform = bool((self.shift == shift).all())
        parts = -(-shift // MOST_SHIFT)
        amounts = (min(MOST_SHIFT, shift - MOST_SHIFT * i) for i in range(parts))
        return TileEpilogue(
            bias=not same,
            add=int(self.bias[0]) if same else 0,
            relu=self.relu,
            shifts=tuple(amounts) if uniform else (),
            shift_tiles=0 if uniform else parts,
        )

    def operand(self, name: str) -> Array:
        """Return the values (n_out,) of an operand of the epilogue."""
        if name == "bias":
            return self.bias
        first = MOST_SHIFT * int(name.removeprefix("shift"))
        return (self.shift - first).clip(0, MOST_SHIFT).astype(np.int32)
