"""What a manifest says of a site: programs of launches and moved features, with their scales."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from tvmstruct.errors import ArtifactError
from tvmstruct.ops import Array
from tvmstruct.vta import sites
from tvmstruct.vta.container import Blobs, Package
from tvmstruct.vta.integer import Program, Reorder
from tvmstruct.vta.launch import launch_entry
from tvmstruct.vta.quantize import Quantised
from tvmstruct.vta.simulated_kernel import Kernel


def site_symbol(layers: Quantised) -> str:
    """Return the symbol of a site: a hash of all that its entry in a manifest holds."""
    blobs, writer = Blobs(), Writer()
    return _symbol(writer.content(layers, blobs), writer.launches)


def _symbol(content: Mapping[str, Any], launches: Sequence[Mapping[str, Any]]) -> str:
    """Return the hash of a site's entry with its launches in the place of their numbers."""
    used = [
        [step.get("launch") is not None and launches[step["launch"]] for step in program["steps"]]
        for program in content["programs"]
    ]
    numbered = [{**p, "steps": [s.get("reorder") for s in p["steps"]]} for p in content["programs"]]
    text = json.dumps([{**content, "programs": numbered}, used], sort_keys=True)
    return f"{sites.PREFIX}{hashlib.sha256(text.encode()).hexdigest()[:32]}"


class Writer:
    """Collects the launches of a manifest, each once."""

    def __init__(self) -> None:
        self.launches: list[dict[str, Any]] = []  # their entries
        self._numbers: dict[str, int] = {}

    def content(self, layers: Quantised, blobs: Blobs) -> dict[str, Any]:
        """Return what a manifest says of the layers of a site."""
        programs = [
            {
                "x_scale": blobs.put(program.x_scale.astype("<f8").tobytes()),
                "y_scale": blobs.put(program.y_scale.astype("<f4").tobytes()),
                "steps": [self._step(step, blobs) for step in program.steps],
            }
            for program in layers.programs
        ]
        bias = None if layers.bias is None else blobs.put(layers.bias.astype("<f4").tobytes())
        return {"programs": programs, "bias": bias, "relu": layers.relu}

    def _step(self, step: Any, blobs: Blobs) -> dict[str, Any]:
        if isinstance(step, Reorder):
            return {"reorder": blobs.put(step.index.astype("<i8").tobytes())}
        entry = launch_entry(step.launch, blobs)
        key = json.dumps(entry, sort_keys=True)
        if key not in self._numbers:
            self._numbers[key] = len(self.launches)
            self.launches.append(entry)
        return {"launch": self._numbers[key]}


def read_layers(
    package: Package, symbol: str, entry: Mapping[str, Any], kernels: Sequence[Kernel]
) -> Quantised:
    """Return the layers of a site, whose symbol must be the hash of what they do.

    Raises ArtifactError, KeyError, TypeError or ValueError where the entry makes no sense.
    """
    content = {name: entry[name] for name in ("programs", "bias", "relu")}
    if symbol != _symbol(content, package.manifest["launches"]):
        raise package.damaged(f"site {symbol} is not what its name is the hash of")
    programs = tuple(_program(package, program, kernels) for program in entry["programs"])
    bias = None if entry["bias"] is None else _floats(package, entry["bias"], "<f4")
    return Quantised(programs, bias, bool(entry["relu"]), (), ())


def _program(package: Package, entry: Mapping[str, Any], kernels: Sequence[Kernel]) -> Program:
    """Return a program whose steps fit together."""
    x_scale = _floats(package, entry["x_scale"], "<f8")
    y_scale = _floats(package, entry["y_scale"], "<f4")
    steps: list[Any] = []
    width: int | None = None
    for step in entry["steps"]:
        made = _step(package, step, kernels)
        takes = made.launch.x.features if isinstance(made, Kernel) else None
        least = int(made.index.max(initial=-1)) if isinstance(made, Reorder) else -1
        if isinstance(made, Reorder) and made.index.min(initial=-1) < -1:
            raise package.damaged("a reordering has features under -1")
        if width is not None and (least >= width or takes not in (None, width)):
            raise package.damaged(f"a step takes {takes or least + 1} features of {width}")
        width = made.n_out
        steps.append(made)
    if width is None or y_scale.size not in (1, width):
        raise package.damaged(f"{y_scale.size} scales of {width} features")
    return Program(x_scale, tuple(steps), y_scale)


def _step(package: Package, entry: Mapping[str, Any], kernels: Sequence[Kernel]) -> Any:
    if "reorder" in entry:
        return Reorder(np.frombuffer(package.blob(entry["reorder"]), "<i8").astype(np.int64))
    number = entry["launch"]
    if type(number) is not int or not 0 <= number < len(kernels):
        raise package.damaged(f"there is no launch {number!r}")
    return kernels[number]


def _floats(package: Package, reference: Any, dtype: str) -> Array:
    found = np.frombuffer(package.blob(reference), dtype)
    if not found.size or not np.isfinite(found).all():
        raise ArtifactError(f"{package.path}: scales or biases are missing or not finite")
    return found.astype(dtype[1:])
