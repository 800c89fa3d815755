"""Checkpoints from which training goes on bit for bit: weights, optimiser, random state, step.

A file is a line with a version, the SHA-256 of what follows, and a ``torch.save`` archive. It is
read with ``weights_only``: nothing in it is executed.
"""

from __future__ import annotations

import hashlib
import io
import os
import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from tvmstruct.errors import ArtifactError

MAGIC = b"tvmstruct checkpoint 1\n"
DIGEST = hashlib.sha256().digest_size
KEYS = {"model", "parts", "rng", "step", "extra"}


def save_checkpoint(
    path: str | Path,
    model: nn.Module,
    *,
    step: int,
    parts: Mapping[str, Any] | None = None,
    extra: Mapping[str, Any] | None = None,
) -> None:
    """Write a checkpoint at once or not at all: a crash leaves the one before.

    ``parts`` have a ``state_dict``: the optimiser, a schedule. ``extra`` is what else the loop
    carries: tensors, numbers, strings, lists and dictionaries of them.
    """
    content = {
        "model": model.state_dict(),
        "parts": {name: part.state_dict() for name, part in (parts or {}).items()},
        "rng": torch.get_rng_state(),
        "step": int(step),
        "extra": dict(extra or {}),
    }
    buffer = io.BytesIO()
    torch.save(content, buffer)
    payload = buffer.getvalue()
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with beside.open("wb") as file:
            file.write(MAGIC + hashlib.sha256(payload).digest() + payload)
            file.flush()
            os.fsync(file.fileno())
        beside.replace(path)
    finally:
        beside.unlink(missing_ok=True)


def load_checkpoint(
    path: str | Path, model: nn.Module, *, parts: Mapping[str, Any] | None = None
) -> tuple[int, dict[str, Any]]:
    """Restore what `save_checkpoint` wrote and torch's random state; return step and extra.

    Nothing is changed unless the whole file fits. Raises ArtifactError where the file is missing,
    damaged or hostile, or belongs to another model.
    """
    parts, path = parts or {}, Path(path)
    content = _read(path)
    _check_model(path, content["model"], model)
    if set(content["parts"]) != set(parts):
        raise ArtifactError(
            f"{path}: holds the parts {sorted(content['parts'])}, asked for are {sorted(parts)}"
        )
    before = {name: part.state_dict() for name, part in parts.items()}
    random = torch.get_rng_state()
    try:
        for name, part in parts.items():
            part.load_state_dict(content["parts"][name])
        torch.set_rng_state(content["rng"])
    except (ValueError, KeyError, TypeError, RuntimeError, AttributeError) as error:
        for name, part in parts.items():
            part.load_state_dict(before[name])
        torch.set_rng_state(random)
        raise ArtifactError(f"{path}: its {', '.join(parts)} do not fit: {error}") from error
    model.load_state_dict(content["model"])
    return content["step"], content["extra"]


def _read(path: Path) -> dict[str, Any]:
    try:
        data = path.read_bytes()
    except OSError as error:
        raise ArtifactError(f"{path}: cannot be read: {error}") from error
    head = len(MAGIC) + DIGEST
    if not data.startswith(MAGIC) or len(data) < head:
        raise ArtifactError(f"{path}: is no checkpoint of this version of tvmstruct.training")
    digest, payload = data[len(MAGIC) : head], data[head:]
    if hashlib.sha256(payload).digest() != digest:
        raise ArtifactError(f"{path}: is damaged or cut short (its checksum differs)")
    try:
        content = torch.load(io.BytesIO(payload), weights_only=True, map_location="cpu")
    except (pickle.UnpicklingError, RuntimeError, ValueError, KeyError, EOFError) as error:
        raise ArtifactError(f"{path}: holds more than tensors and numbers: {error}") from error
    if not isinstance(content, dict) or set(content) != KEYS:
        raise ArtifactError(f"{path}: has other entries than {', '.join(sorted(KEYS))}")
    kinds = {"model": dict, "parts": dict, "rng": torch.Tensor, "step": int, "extra": dict}
    for name, kind in kinds.items():
        if not isinstance(content[name], kind):
            raise ArtifactError(f"{path}: {name} is a {type(content[name]).__name__}")
    return content


def _check_model(path: Path, state: Mapping[str, Any], model: nn.Module) -> None:
    own = model.state_dict()
    if set(state) != set(own):
        missing, unknown = sorted(set(own) - set(state)), sorted(set(state) - set(own))
        raise ArtifactError(
            f"{path}: belongs to another model: it lacks {missing[:5]}, it has {unknown[:5]}"
        )
    for name, tensor in own.items():
        found = state[name]
        if not isinstance(found, torch.Tensor) or (found.shape, found.dtype) != (
            tensor.shape,
            tensor.dtype,
        ):
            kind = getattr(found, "shape", type(found).__name__)
            raise ArtifactError(f"{path}: {name} is {kind}, the model's {tuple(tensor.shape)}")
