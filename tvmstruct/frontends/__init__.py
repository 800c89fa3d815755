"""Frontends: trained models of other frameworks become a ``Source``."""

from __future__ import annotations

import tvm

from tvmstruct.errors import ModelError
from tvmstruct.frontends.huggingface import from_pretrained
from tvmstruct.frontends.lookupffn import from_lookupffn, read_lookups
from tvmstruct.frontends.onnx import from_onnx
from tvmstruct.frontends.relax import from_relax
from tvmstruct.frontends.source import Source, TensorSpec
from tvmstruct.frontends.torch import from_torch


def as_source(model: Source | tvm.IRModule) -> Source:
    """Return ``model`` itself, or a Relax IRModule as a source with one fixed bucket."""
    if isinstance(model, Source):
        return model
    if isinstance(model, tvm.IRModule):
        return from_relax(model)
    raise ModelError(
        f"{type(model).__name__} is no model; use tvmstruct.from_onnx, from_pretrained or "
        "from_torch, or pass a Relax IRModule"
    )


__all__ = [
    "Source",
    "TensorSpec",
    "as_source",
    "from_lookupffn",
    "from_onnx",
    "from_pretrained",
    "from_relax",
    "from_torch",
    "read_lookups",
]
