"""The accelerator of ``target="vta -config=FILE"``."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Accelerator:
    """A VTA of some configuration; ``key`` names what changes the streams made for it."""

    config: Any
    key: str

    @classmethod
    def of(cls, path: str | None) -> Accelerator:
        return cls(path, "vta")

    def kernel(self, step, rows):
        return step
