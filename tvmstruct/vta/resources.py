"""What designs take of an FPGA: LUTs, flip-flops, DSP slices and block RAM.

Limits of the boards are those of the devices' data sheets (Xilinx DS190 for Zynq-7000, DS891 for
Zynq UltraScale+).  Nothing was synthesised here.  Costs are estimates, with these sources:

* Floating-point cores (``ADD`` to ``COMPARE``): figures of the size that Vivado HLS reports for
  its single-precision cores on a 7-series part at 100 MHz, full use of DSPs.  They are quoted from
  experience with such reports, not taken from one of this project; only their ratios matter for
  how a board is shared out.
* A multiplier of 8 by 8 bits takes one DSP slice, or 71 LUTs where no slice is left, which is
  about what Xilinx's multiplier generator needs; other widths scale with the product.
* Adders, registers and control are counted by bits, one LUT and flip-flop each.
* Block RAM is exact for the geometry: 36 Kib blocks of 64 x 512 down to 1 x 32768 without parity.

Clocks are assumed not to fall as a design grows.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import astuple, dataclass, fields
from typing import TYPE_CHECKING, Self

if TYPE_CHECKING:
    from tvmstruct.vta.config import Config


@dataclass(frozen=True)
class Resources:
    """Amounts of each kind; ``bram`` counts blocks of 36 Kib."""

    lut: float = 0
    ff: float = 0
    dsp: float = 0
    bram: float = 0

    def __add__(self, other: Self) -> Resources:
        pairs = zip(astuple(self), astuple(other), strict=True)
        return Resources(*(a + b for a, b in pairs))

    def __mul__(self, factor: float) -> Resources:
        return Resources(*(factor * amount for amount in astuple(self)))

    def __sub__(self, other: Self) -> Resources:
        return self + other * -1

    def fits(self, limits: Self) -> bool:
        """Return whether no amount is over its limit."""
        pairs = zip(astuple(self), astuple(limits), strict=True)
        return all(amount <= limit + 1e-9 for amount, limit in pairs)

    def share(self, limits: Self) -> tuple[str, float]:
        """Return the kind that is scarcest, and the part of it that is taken."""
        parts = {f.name: getattr(self, f.name) / getattr(limits, f.name) for f in fields(self)}
        kind = max(parts, key=parts.__getitem__)
        return kind, parts[kind]

    def __str__(self) -> str:
        return ", ".join(f"{f.name} {getattr(self, f.name):,.0f}" for f in fields(self))


LIMITS: Mapping[str, Resources] = {
    "pynq": Resources(53_200, 106_400, 220, 140),  # xc7z020
    "ultra96": Resources(70_560, 141_120, 360, 216),  # xczu3eg
    "zcu104": Resources(230_400, 460_800, 1_728, 312),  # xczu7ev; its URAM is left unused
}
"""What each board has."""

SHELL = Resources(lut=5_000, ff=7_000, bram=4)
"""Bus interconnect, control registers and clocks, around any design (assumed)."""

# Single-precision cores, one result a cycle.
ADD = Resources(lut=390, ff=205, dsp=2)
MULTIPLY = Resources(lut=321, ff=143, dsp=3)
DIVIDE = Resources(lut=994, ff=761)
EXPONENT = Resources(lut=924, ff=277, dsp=7)
COMPARE = Resources(lut=239, ff=66)

BANK = Resources(bram=0.5)
"""A lane's own bank: 18 Kib, one half read while the other is filled."""

MULTIPLY_ADD = MULTIPLY + ADD + BANK
SOFTMAX = COMPARE + EXPONENT + ADD + DIVIDE + BANK
"""One score a cycle: against the running maximum, exponent, sum, division."""
ACTIVATION = MULTIPLY * 2 + EXPONENT + ADD + DIVIDE + BANK
"""One value a cycle: x / (1 + exp(-1.702 x)), the sigmoid form of GELU."""
CONTROL = Resources(lut=800, ff=1_000, bram=2)
"""Loops, addresses and the buffers of rows of one operation (assumed)."""

LUT_MULTIPLIER = 71 / 64  # LUTs for each product of two bits
ALU_LUTS, ALU_FFS = 8, 4  # for each bit of a lane: add, compare, two shifters, selection
VTA_CONTROL = Resources(lut=8_000, ff=10_000, bram=12)
"""Fetch, load, compute and store control, their queues of 512 instructions, DMA (assumed)."""
GEOMETRY = [(64 >> i, 512 << i) for i in range(7)]  # bits wide, deep, of one block


def blocks(width: int, depth: int) -> int:
    """Return the least blocks of 36 Kib for a memory of ``depth`` words of ``width`` bits."""
    return min(-(-width // w) * -(-depth // d) for w, d in GEOMETRY)


def vta_resources(config: Config, limits: Resources) -> Resources:
    """Return what a VTA of ``config`` takes where at most ``limits.dsp`` multipliers are slices.

    The matrix unit has one multiplier and one adder for each multiply-add of a tile operation; the
    ALU one lane for each element of an accumulator tile.  With the extension ``vvma`` there are
    ``batch x block`` more multipliers, a second copy of the input buffer, for a second port, and
    wider products in the matrix unit.
    """
    from tvmstruct.vta.config import Memory

    macs, lanes = config.macs_per_tile, config.batch * config.block_out
    product = config.width(Memory.INP) * config.width(Memory.WGT)
    vectors = config.batch * config.block_in if "vvma" in config.extensions else 0
    slices = min(macs + vectors, int(limits.dsp))
    scaled = config.width(Memory.INP) if vectors else 0  # more bits of what is multiplied
    product += scaled * config.width(Memory.WGT)
    in_luts = (macs + vectors - slices) * LUT_MULTIPLIER * product
    tree = macs * (config.width(Memory.INP) + config.width(Memory.WGT) + scaled + 4)
    alu = lanes * config.width(Memory.ACC)
    memories = [Memory.UOP, Memory.INP, Memory.WGT, Memory.ACC, Memory.OUT]
    if vectors:
        memories.append(Memory.INP)
    bram = sum(blocks(8 * config.tile_bytes(m), config.depth(m)) for m in memories)
    arithmetic = Resources(
        lut=in_luts + tree + ALU_LUTS * alu, ff=tree + ALU_FFS * alu, dsp=slices, bram=bram
    )
    return SHELL + VTA_CONTROL + arithmetic
