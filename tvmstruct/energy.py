"""Energy of moving data, from counted bytes and two constants of LookupFFN (Zeng et al., 2023).

Section 1 of the paper: an access of 64 bits costs 14 pJ in SRAM and 300 to 450 pJ in DRAM.  It
makes no difference between caches, so neither does this; arithmetic, leakage and writes back to
memory are left out.  An estimate tells forms of a layer apart, not machines.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from tvmstruct.caches import L1, L3, LEVELS, MEMORY

WORD = 8  # bytes of an access
SRAM_PJ = 14.0
DRAM_PJ = (300.0, 450.0)
TILE = (8, 32)  # rows and columns whose sums a dense kernel keeps in registers

ASSUMPTIONS = (
    "14 pJ for 8 bytes from any cache, 300 to 450 pJ from memory (LookupFFN, section 1)",
    "weights are read once a call, from the nearest level that holds all that a call reads",
    "rows of a table come from the nearest level that holds the whole table, or from there",
    "results are written and read in the nearest level that holds them",
    f"products load operands from L1 for tiles of {TILE[0]} x {TILE[1]} sums in registers",
)


@dataclass(frozen=True)
class Energy:
    """Joules, at the lower and the upper constant of memory."""

    low: float = 0.0
    high: float = 0.0

    def __add__(self, other: Energy) -> Energy:
        return Energy(self.low + other.low, self.high + other.high)

    def __str__(self) -> str:
        unit, scale = next((u for u in UNITS if self.high >= u[1]), UNITS[-1])
        low, high = (f"{value / scale:.3g}" for value in (self.low, self.high))
        return f"{low} {unit}" if low == high else f"{low} to {high} {unit}"


UNITS = (("J", 1.0), ("mJ", 1e-3), ("uJ", 1e-6), ("nJ", 1e-9), ("pJ", 1e-12))


@dataclass(frozen=True)
class Traffic:
    """Bytes that a piece of work moves between cores and each level of the memory."""

    bytes: Mapping[str, float] = field(default_factory=dict[str, float])

    def __post_init__(self) -> None:
        assert set(self.bytes) <= set(LEVELS), self.bytes

    def __add__(self, other: Traffic) -> Traffic:
        total = Counter(self.bytes)
        total.update(other.bytes)
        return Traffic({name: total[name] for name in LEVELS if total[name]})

    def __getitem__(self, level: str) -> float:
        return self.bytes.get(level, 0.0)

    @property
    def total(self) -> float:
        """Bytes over all levels."""
        return sum(self.bytes.values())

    @property
    def energy(self) -> Energy:
        """What moving them costs."""
        cached = (self.total - self[MEMORY]) * SRAM_PJ
        low, high = (cached + self[MEMORY] * pj for pj in DRAM_PJ)
        return Energy(low / WORD * 1e-12, high / WORD * 1e-12)


def add_up(parts: Iterable[Traffic]) -> Traffic:
    """Return the sum of some traffic."""
    return sum(parts, Traffic())


def at(level: str, size: float) -> Traffic:
    """Return traffic of ``size`` bytes with one level."""
    return Traffic({level: size})


def from_miss_rates(size: float, first: float, last: float) -> Traffic:
    """Return the traffic of ``size`` bytes read, by the measured miss rates of L1 and of the LLC.

    Table 6 of LookupFFN: 22.68% and 12.77% for its faster gather.  What misses the first level
    and hits a later one counts as L3.
    """
    return Traffic(
        {L1: size * (1 - first), L3: size * first * (1 - last), MEMORY: size * first * last}
    )


def operands(macs: float, item: int = 4) -> Traffic:
    """Return what multiply-adds load from L1 where a tile of `TILE` sums is kept in registers."""
    rows, columns = TILE
    return at(L1, macs * item * (1 / rows + 1 / columns))
