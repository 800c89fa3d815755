"""A model for VTA as a portable package: launches that a driver can load, and the CPU's part.

The manifest names the VTA configuration, every launch (stream, constants, buffers, where x goes
and y comes from), every site (the launches and the scales of a chain of layers) and ``cpu``, a
saved model for the CPU that calls sites by their symbols. A driver for a board needs no more than
``config``, ``launches`` and ``sites``.
"""

from __future__ import annotations

import json
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tvmstruct.errors import ArtifactError
from tvmstruct.saving import load_model, save_model
from tvmstruct.vta import container, sites
from tvmstruct.vta.compiler import VtaBucket
from tvmstruct.vta.config import Config
from tvmstruct.vta.container import Blobs, Package
from tvmstruct.vta.launch import Launch, read_launch
from tvmstruct.vta.offload import IntegerSite
from tvmstruct.vta.simulated_kernel import Kernel
from tvmstruct.vta.site_entry import Writer, read_layers
from tvmstruct.vta.target import Accelerator

if TYPE_CHECKING:
    from tvmstruct.model import CompiledModel

CPU = "cpu.tvms"


def save_package(model: CompiledModel, path: str | Path) -> None:
    """Write a model for VTA to a folder, or to a zip where ``path`` ends so."""
    accelerator = model.spec.accelerator
    assert accelerator is not None
    blobs, writer = Blobs(), Writer()
    entries = {
        site.symbol: {"name": site.name, **writer.content(site.layers, blobs)}
        for site in _sites(model)
    }
    manifest = {
        "config": json.loads(accelerator.config.to_json()),
        "launches": writer.launches,
        "sites": entries,
        "buckets": [
            {"shapes": [list(s) for s in key], "sites": [s.symbol for s in _sites_of(bucket)]}
            for key, bucket in model.buckets.items()
        ],
    }
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / CPU
        save_model(model, file)
        manifest["cpu"] = blobs.put(file.read_bytes())
    container.write(path, manifest, blobs)


def load_package(path: str | Path) -> CompiledModel:
    """Return the model of a package; its launches run in the simulator.

    Raises ArtifactError where the package is damaged or makes no sense.
    """
    package = Package(path)
    try:
        return _restore(package)
    except ArtifactError:
        raise
    except (KeyError, TypeError, ValueError, AttributeError, IndexError) as error:
        raise package.damaged(f"{container.MANIFEST} lacks or garbles {error}") from error


def package_launches(path: str | Path) -> list[Launch]:
    """Return the launches of a package, checked, without the CPU's part."""
    package = Package(path)
    try:
        return _launches(package)
    except ArtifactError:
        raise
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise package.damaged(f"{container.MANIFEST} lacks or garbles {error}") from error


def _sites_of(bucket: Any) -> list[IntegerSite]:
    return [site for site in bucket.sites if isinstance(site, IntegerSite)]


def _sites(model: CompiledModel) -> list[IntegerSite]:
    found = {s.symbol: s for bucket in model.buckets.values() for s in _sites_of(bucket)}
    return list(found.values())


def _launches(package: Package) -> list[Launch]:
    config = Config.from_mapping(package.manifest["config"])
    return [read_launch(entry, config, package.blob) for entry in package.manifest["launches"]]


def _restore(package: Package) -> CompiledModel:
    about = package.manifest
    kernels = [Kernel(launch) for launch in _launches(package)]
    entered = {
        symbol: sites.enter(
            IntegerSite(symbol, str(entry["name"]), read_layers(package, symbol, entry, kernels))
        )
        for symbol, entry in about["sites"].items()
    }
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / CPU
        file.write_bytes(package.blob(about["cpu"]))
        model = load_model(file, VtaBucket)
    config = Config.from_mapping(about["config"])
    accelerator = Accelerator(config)
    model.spec = replace(
        model.spec, accelerator=accelerator, key=f"{accelerator.key}:{model.spec.key}"
    )
    used = {
        tuple(tuple(shape) for shape in entry["shapes"]): entry["sites"]
        for entry in about["buckets"]
    }
    for key, bucket in model.buckets.items():
        assert isinstance(bucket, VtaBucket)
        bucket.keep([entered[symbol] for symbol in used[key]], len(model.outputs))
    return model
