"""Tensors of a checkpoint by name, read one at a time: mappings, safetensors, PyTorch's files."""

from __future__ import annotations

import importlib
import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from tvmstruct.errors import MissingDependencyError, ModelError

SUFFIXES = (".safetensors", ".ckpt", ".bin", ".pt", ".pth")
COPIES = 2  # of a weight while a model is compiled: as stored, and packed


class Checkpoint:
    """Named tensors whose shapes are known before any of them is read."""

    def __init__(
        self,
        shapes: Mapping[str, tuple[int, ...]],
        read: Callable[[str], np.ndarray],
        origin: str,
    ) -> None:
        self.shapes, self._read, self.origin = dict(shapes), read, origin

    def __contains__(self, name: str) -> bool:
        return name in self.shapes

    def __iter__(self) -> Iterator[str]:
        return iter(self.shapes)

    def shape(self, name: str) -> tuple[int, ...]:
        """Return the shape of a tensor, or say that it is missing."""
        if name not in self.shapes:
            some = ", ".join(sorted(self.shapes)[:5]) or "nothing"
            raise ModelError(f"{self.origin}: tensor {name!r} is missing; there are {some}, ...")
        return self.shapes[name]

    def array(self, name: str, shape: tuple[int, ...] | None = None) -> np.ndarray:
        """Return a tensor in float32 after checking its shape and that it fits in memory."""
        found = self.shape(name)
        if shape is not None and found != shape:
            raise ModelError(f"{self.origin}: tensor {name!r} has shape {found}, want {shape}")
        self.check_memory([name])
        return np.ascontiguousarray(self._read(name), np.float32)

    def check_memory(self, names: list[str]) -> None:
        """Raise ModelError where tensors would not fit in memory, before any is read."""
        need = COPIES * 4 * sum(int(np.prod(self.shapes[n], dtype=np.int64)) for n in names)
        if need > (free := available_memory()):
            raise ModelError(
                f"{self.origin}: {', '.join(names[:3])}{', ...' * (len(names) > 3)} take {need:,} "
                f"bytes as float32, stored and packed; {free:,} are free. Compile on a machine "
                "with more memory, or fewer layers"
            )


def available_memory() -> int:
    """Return how many bytes this process may still take."""
    try:
        for line in Path("/proc/meminfo").read_text(encoding="ascii").splitlines():
            if line.startswith("MemAvailable:"):
                return 1024 * int(line.split()[1])
    except OSError:
        pass
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def open_checkpoint(source: str | Path | Mapping[str, Any]) -> Checkpoint:
    """Return the tensors of a mapping, a file, or the first file of a folder."""
    if isinstance(source, Mapping):
        return _of_mapping(source, "the state dict")
    path = Path(source)
    if path.is_dir():
        files = [p for s in SUFFIXES for p in sorted(path.glob(f"*{s}"))]
        if not files:
            raise ModelError(f"{path}: has no file ending in {', '.join(SUFFIXES)}")
        path = files[0]
    if not path.is_file():
        raise ModelError(f"{path}: does not exist; give a checkpoint or a folder with one")
    return _safetensors(path) if path.suffix == ".safetensors" else _torch(path)


def _of_mapping(state: Mapping[str, Any], origin: str) -> Checkpoint:
    shapes = {n: tuple(map(int, a.shape)) for n, a in state.items() if hasattr(a, "shape")}
    return Checkpoint(shapes, lambda name: _numpy(state[name]), origin)


def _numpy(value: Any) -> np.ndarray:
    """Return an array, or a PyTorch tensor of any floating type, as numpy."""
    if isinstance(value, np.ndarray):
        return value.astype(np.float32)
    return value.detach().cpu().float().numpy()


def _safetensors(path: Path) -> Checkpoint:
    library = _load("safetensors", "hf", path)
    try:
        file = library.safe_open(str(path), framework="numpy")
        shapes = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}
    except Exception as error:
        raise ModelError(f"{path}: cannot be read as safetensors: {error}") from error
    return Checkpoint(shapes, file.get_tensor, str(path))


def _torch(path: Path) -> Checkpoint:
    """Return the tensors of a file that torch.save or Lightning wrote; no code of it runs."""
    torch = _load("torch", "torch", path)
    try:
        state = torch.load(str(path), map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:
        raise ModelError(f"{path}: cannot be read by torch.load: {error}") from error
    state = state.get("state_dict", state) if isinstance(state, Mapping) else state
    if not isinstance(state, Mapping):
        raise ModelError(f"{path}: holds {type(state).__name__}, want a state dict")
    return _of_mapping(state, str(path))


def _load(name: str, extra: str, path: Path) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise MissingDependencyError(
            f"{path} needs {name}: pip install tvmstruct[{extra}]"
        ) from error
