"""The VTA accelerator: configuration, instructions, simulator, timing, code generation."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tvmstruct.vta.calibration import Calibration
    from tvmstruct.vta.config import Config
    from tvmstruct.vta.cycles import predict
    from tvmstruct.vta.scales import Options
    from tvmstruct.vta.simulator import simulate

_HOME = {
    "Calibration": "calibration",
    "Config": "config",
    "Options": "scales",
    "predict": "cycles",
    "simulate": "simulator",
}

__all__ = ["Calibration", "Config", "Options", "predict", "simulate"]


def __getattr__(name: str) -> object:
    """Import a public name when it is first used: the command line must not wait for TVM."""
    if name not in _HOME:
        raise AttributeError(f"module 'tvmstruct.vta' has no attribute {name!r}")
    value = getattr(importlib.import_module(f"tvmstruct.vta.{_HOME[name]}"), name)
    globals()[name] = value
    return value
