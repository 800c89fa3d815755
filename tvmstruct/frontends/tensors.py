"""Tensors by name from a file: safetensors, or a state dict that PyTorch saved."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType

import numpy as np

from tvmstruct.errors import MissingDependencyError, ModelError

TORCH_SUFFIXES = frozenset({".pt", ".pth", ".bin", ".ckpt"})


def read_tensors(path: str | Path) -> dict[str, np.ndarray]:
    """Return the tensors of a .safetensors file, or of a state dict in .pt, .pth, .bin or .ckpt.

    PyTorch's files are read without running what is pickled in them.
    """
    path = Path(path)
    if path.suffix in TORCH_SUFFIXES:
        return _read_torch(path)
    library = load_safetensors()
    try:
        with library.safe_open(str(path), framework="numpy") as file:
            return {name: file.get_tensor(name) for name in file.keys()}
    except Exception as error:
        raise ModelError(f"{path}: cannot be read as safetensors: {error}") from error


def load_safetensors() -> ModuleType:
    """Return the library, or say which extra installs it."""
    try:
        return importlib.import_module("safetensors")
    except ImportError as error:
        raise MissingDependencyError(
            "reading weights needs safetensors: pip install tvmstruct[hf]"
        ) from error


def _read_torch(path: Path) -> dict[str, np.ndarray]:
    try:
        torch = importlib.import_module("torch")
    except ImportError as error:
        raise MissingDependencyError(
            f"{path}: reading a PyTorch file needs torch: pip install tvmstruct[torch], or save "
            "the state dict with safetensors"
        ) from error
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        raise ModelError(f"{path}: cannot be read as a PyTorch state dict: {error}") from error
    if isinstance(state, Mapping) and isinstance(state.get("state_dict"), Mapping):
        state = state["state_dict"]  # training frameworks put it beside the optimiser's
    if not isinstance(state, Mapping):
        raise ModelError(f"{path}: holds a {type(state).__name__}; save model.state_dict()")
    tensors = {str(name): t for name, t in state.items() if isinstance(t, torch.Tensor)}
    half = (torch.bfloat16, torch.float16)
    return {n: (t.float() if t.dtype in half else t).numpy() for n, t in tensors.items()}
