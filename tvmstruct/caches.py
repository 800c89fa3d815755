"""The caches of a machine: which level holds so many bytes, and what share of reads each serves."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from tvmstruct.errors import InputError

L1, L2, L3, MEMORY = "L1", "L2", "L3", "memory"
LEVELS = (L1, L2, L3, MEMORY)
SYSFS = Path("/sys/devices/system/cpu/cpu0/cache")
UNITS = {"": 1, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30}


@dataclass(frozen=True)
class Caches:
    """Bytes of the caches: ``l1`` and ``l2`` of one core, ``l3`` shared by all ``threads``."""

    l1: int = 32 << 10
    l2: int = 1 << 20
    l3: int = 32 << 20
    threads: int = 1

    def __post_init__(self) -> None:
        if not 0 < self.l1 <= self.l2 <= self.l3 or self.threads < 1:
            raise InputError(
                f"caches: {self.l1}, {self.l2} and {self.l3} bytes for {self.threads} threads; "
                "want sizes above 0 that grow, and a thread at least"
            )

    def __str__(self) -> str:
        text = f"{_short(self.l1)} L1 and {_short(self.l2)} L2 a core, {_short(self.l3)} L3"
        return f"{text}, {self.threads} thread{'s' if self.threads > 1 else ''}"

    def sizes(self, *, split: bool = False) -> Mapping[str, int]:
        """Return the bytes of each level; of all cores together where their work is ``split``."""
        cores = self.threads if split else 1
        return {L1: cores * self.l1, L2: cores * self.l2, L3: self.l3}

    def holding(self, size: float, *, split: bool = False) -> str:
        """Return the nearest level that holds ``size`` bytes, each core its part if ``split``."""
        return next((n for n, room in self.sizes(split=split).items() if size <= room), MEMORY)

    def shares(self, size: float) -> Mapping[str, float]:
        """Return the share of reads that each level serves where all of ``size`` is as likely.

        A cache that always keeps what was used last then holds a random part of its own size.
        """
        out: dict[str, float] = {}
        before = 0.0
        for name, room in self.sizes().items():
            share = min(1.0, room / size) if size else 1.0
            out[name] = max(0.0, share - before)
            before = max(before, share)
        return out | {MEMORY: 1.0 - before}


def parse_caches(text: str, threads: int = 1) -> Caches:
    """Return the caches that ``48K,2M,32M`` names: first, second and last level."""
    sizes = [re.fullmatch(r"(\d+)([KMG]?)(?:i?B)?", part.strip()) for part in text.split(",")]
    if len(sizes) != 3 or None in sizes:
        raise InputError(f"caches {text!r}: want three sizes such as 48K,2M,32M")
    found = (int(m[1]) * UNITS[m[2]] for m in sizes if m is not None)
    return Caches(*found, threads=threads)


def host_caches(threads: int = 1, root: Path = SYSFS) -> Caches:
    """Return the caches of this machine as Linux tells them, common ones where it does not."""
    found: dict[str, int] = {}
    for folder in sorted(root.glob("index*")):
        level, kind, size = (_read(folder / name) for name in ("level", "type", "size"))
        match = re.fullmatch(r"(\d+)([KMG]?)", size)
        if match and kind != "Instruction":
            found[f"l{level}"] = int(match[1]) * UNITS[match[2]]
    known = {name: size for name, size in found.items() if name in ("l1", "l2", "l3")}
    known.setdefault("l3", max(known.get("l2", 0), Caches.l3))
    return Caches(**known, threads=threads)


def _read(path: Path) -> str:
    try:
        return path.read_text().strip()
    except OSError:
        return ""


def _short(size: int) -> str:
    unit = next(u for u in ("G", "M", "K", "") if size >= UNITS[u])
    return f"{size / UNITS[unit]:g} {unit}iB" if unit else f"{size} B"
