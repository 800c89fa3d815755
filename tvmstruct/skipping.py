"""Zero skipping in attention: what users ask for with ``skip=``."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Skip:
    """Scores more than ``threshold`` under the maximum (``raw``: under it) weigh nothing."""

    threshold: float
    raw: bool = False
