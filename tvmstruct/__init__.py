"""tvmstruct: make trained NLP models small and fast by giving their layers structure.

>>> import tvmstruct
>>> source = tvmstruct.from_onnx("model.onnx")
>>> model = tvmstruct.compile(source, target="llvm -mcpu=znver2")
>>> hidden = model(input_ids, attention_mask)
>>> model.report().show()
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tvmstruct import embeddings, models, vta
    from tvmstruct.compiler import compile, load
    from tvmstruct.frontends import (
        Source,
        from_lookupffn,
        from_onnx,
        from_pretrained,
        from_relax,
        from_torch,
        read_lookups,
    )
    from tvmstruct.frontends.word2ket import from_word2ket
    from tvmstruct.lookup import Lookup
    from tvmstruct.model import CompiledModel
    from tvmstruct.planning import LayerPlan, Plan
    from tvmstruct.profiling import Profile, profile
    from tvmstruct.report import Report
    from tvmstruct.skipping import Skip
    from tvmstruct.targets import resolve as resolve_target
    from tvmstruct.tuning import TuneReport, tune

__version__ = "0.1.0"

_HOME = {
    "compile": "compiler",
    "load": "compiler",
    "Source": "frontends",
    "from_lookupffn": "frontends",
    "from_onnx": "frontends",
    "from_pretrained": "frontends",
    "from_relax": "frontends",
    "from_torch": "frontends",
    "read_lookups": "frontends",
    "Lookup": "lookup",
    "from_word2ket": "frontends.word2ket",
    "CompiledModel": "model",
    "LayerPlan": "planning",
    "Plan": "planning",
    "Profile": "profiling",
    "profile": "profiling",
    "Report": "report",
    "Skip": "skipping",
    "TuneReport": "tuning",
    "resolve_target": "targets",
    "tune": "tuning",
}

_MODULES = ("embeddings", "models", "vta")

__all__ = [
    "CompiledModel",
    "LayerPlan",
    "Lookup",
    "Plan",
    "Profile",
    "Report",
    "Skip",
    "Source",
    "TuneReport",
    "compile",
    "embeddings",
    "from_lookupffn",
    "from_onnx",
    "from_pretrained",
    "from_relax",
    "from_torch",
    "from_word2ket",
    "load",
    "models",
    "profile",
    "read_lookups",
    "resolve_target",
    "tune",
    "vta",
]


def __getattr__(name: str) -> object:
    """Import a public name when it is first used: ``--help`` must not wait for TVM."""
    if name not in _HOME and name not in _MODULES:
        raise AttributeError(f"module 'tvmstruct' has no attribute {name!r}")
    from tvmstruct.threads import configure

    configure()  # TVM reads its thread variables once, so before anything imports it
    if name in _MODULES:
        return importlib.import_module(f"tvmstruct.{name}")
    target = "resolve" if name == "resolve_target" else name
    value = getattr(importlib.import_module(f"tvmstruct.{_HOME[name]}"), target)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
