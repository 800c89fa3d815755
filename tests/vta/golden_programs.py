"""The twelve reference programs: streams, images before and after, counters, cycles."""

import gzip
import json
from dataclasses import dataclass
from functools import cache
from pathlib import Path

FOLDER = Path(__file__).parent / "golden"


@dataclass(frozen=True)
class Golden:
    """A program for the default design, with what the reference simulator made of it."""

    name: str
    base: int
    counters: dict[str, int]
    cycles: int

    @property
    def insn(self) -> bytes:
        return (FOLDER / f"{self.name}.insn.bin").read_bytes()

    @property
    def before(self) -> bytes:
        return gzip.decompress((FOLDER / f"{self.name}.dram.gz").read_bytes())

    @property
    def after(self) -> bytes:
        return gzip.decompress((FOLDER / f"{self.name}.out.gz").read_bytes())


@cache
def golden_programs() -> tuple[Golden, ...]:
    rows = json.loads((FOLDER / "index.json").read_text(encoding="utf-8"))
    return tuple(Golden(r["name"], r["base"], r["counters"], r["cycles"]) for r in rows)
