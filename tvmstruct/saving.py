"""A compiled model as one file, and back, without a compiler on the machine that loads it.

The file holds the compiled kernels, one executable per bucket, the packed weights and a
manifest; every part has a SHA-256 that is checked before any code is loaded. It does not hold
the source: a loaded model serves the shapes compiled before saving and refuses others.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import tvm

from tvmstruct import artifact, linking, pipeline
from tvmstruct.arrays import aligned_empty
from tvmstruct.artifact import Artifact
from tvmstruct.buckets import Policy
from tvmstruct.errors import ArtifactError
from tvmstruct.frontends.source import TensorSpec
from tvmstruct.model import Bucket, CompiledModel
from tvmstruct.report import LayerRecord
from tvmstruct.targets import check_runs_here, host_features, resolve

if TYPE_CHECKING:
    from tvmstruct.compiler import Compiler


def save_model(model: CompiledModel, path: str | Path) -> None:
    """Write ``model`` to ``path`` at once or not at all."""
    if model.saved is not None:
        sections = {name: _as_saved(model.saved, name) for name in model.saved.table}
        artifact.write(path, model.saved.manifest, sections, features=model.saved.features)
        return
    assert model.compiler is not None
    manifest, sections = _contents(model, model.compiler)
    artifact.write(path, manifest, sections, features=model.spec.features)


def load_model(path: str | Path, bucket_type: type[Bucket] = Bucket) -> CompiledModel:
    """Return the model saved at ``path``, its code in buckets of ``bucket_type``."""
    saved = artifact.read(path, features=host_features())
    saved.verify()
    try:
        return _restore(saved, bucket_type)
    except (KeyError, TypeError, IndexError) as error:
        raise ArtifactError(
            f"{path}: the manifest lacks or garbles {error}; compile and save the model again"
        ) from error


def _contents(model: CompiledModel, compiler: Compiler) -> tuple[dict[str, Any], dict[str, Any]]:
    store, sections = compiler.session.store, {}
    libraries: dict[int, str] = {}
    weights: dict[str, str] = {}
    buckets = []
    for i, (key, bucket) in enumerate(model.buckets.items()):
        assert bucket.lowered is not None
        for library in bucket.libraries:
            if id(library) not in libraries:
                libraries[id(library)] = name = f"kernels.{len(libraries)}"
                sections[name] = linking.to_bytes(library)
        for weight in bucket.lowered.weights:
            if weight not in weights:
                weights[weight] = name = f"weight.{len(weights)}"
                sections[name] = _storable(store.tensors[weight])
        sections[f"bucket.{i}"] = linking.to_bytes(
            pipeline.build(bucket.lowered.planned, compiler.session)
        )
        buckets.append(
            {
                "shapes": [list(shape) for shape in key],
                "weights": [weights[w] for w in bucket.lowered.weights],
                "kernels": [libraries[id(lib)] for lib in bucket.libraries],
            }
        )
    dtypes = {weights[w]: str(store.tensors[w].dtype) for w in weights}
    return _manifest(model, buckets, dtypes), sections


def _manifest(
    model: CompiledModel, buckets: list[Any], dtypes: Mapping[str, str]
) -> dict[str, Any]:
    safe = [s for s, why in model.padder.verdicts.items() if not why]
    return {
        "inputs": [asdict(s) for s in model.inputs],
        "outputs": [asdict(s) for s in model.outputs],
        "token_inputs": model.token_inputs,
        "length_inputs": model.length_inputs,
        "default_ones": list(model.default_ones),
        "default_zeros": list(model.default_zeros),
        "limits": dict(model.policy.limits or {}),
        "paddable": safe,
        "target": str(model.spec.target),
        "layers": [_plain(asdict(r)) for r in model.report().layers],
        "notes": list(model.notes),
        "buckets": buckets,
        "dtypes": dict(dtypes),
    }


def _restore(saved: Artifact, bucket_type: type[Bucket]) -> CompiledModel:
    about = saved.manifest
    spec = resolve(about["target"])
    check_runs_here(spec)
    sizes = [_sizes(about, bucket["shapes"]) for bucket in about["buckets"]]
    model = CompiledModel(
        tuple(map(_spec, about["inputs"])),
        tuple(map(_spec, about["outputs"])),
        spec,
        Policy("fixed", tuple(sizes), about["limits"]),
        compiler=None,
        token_inputs=about["token_inputs"],
        length_inputs=about.get("length_inputs", {}),
        default_ones=about["default_ones"],
        default_zeros=about["default_zeros"],
        records=[LayerRecord(**{**r, "shape": tuple(r["shape"])}) for r in about["layers"]],
        saved=saved,
    )
    model.notes = tuple(map(str, about["notes"]))
    model.padder.verdicts = dict.fromkeys(about["paddable"], "")
    weights = {name: _tensor(saved, name, dtype) for name, dtype in about["dtypes"].items()}
    names = {name for bucket in about["buckets"] for name in bucket["kernels"]}
    libraries = {name: linking.load_bytes(saved.section(name)) for name in sorted(names)}
    for i, bucket in enumerate(about["buckets"]):
        module = linking.load_bytes(saved.section(f"bucket.{i}"))
        used = [libraries[name] for name in bucket["kernels"]]
        for library in used:
            _executable(module).import_module(library)
        key = tuple(tuple(shape) for shape in bucket["shapes"])
        dtypes = [spec.dtype for spec in model.inputs]
        values = [weights[w] for w in bucket["weights"]]
        model.buckets[key] = bucket_type(module, values, key, dtypes, libraries=used)
    return model


def _executable(module: tvm.runtime.Module) -> tvm.runtime.Module:
    """Return the Relax executable inside a loaded library: the module that looks kernels up."""
    return next((m for m in module.imports if m.kind == "relax.VMExecutable"), module)


def _sizes(about: Mapping[str, Any], shapes: list[Any]) -> dict[str, int]:
    return {
        dim: size
        for spec, shape in zip(about["inputs"], shapes, strict=True)
        for dim, size in zip(spec["shape"], shape, strict=True)
        if isinstance(dim, str)
    }


def _spec(entry: Mapping[str, Any]) -> TensorSpec:
    return TensorSpec(entry["name"], entry["dtype"], tuple(entry["shape"]))


def _storable(tensor: tvm.runtime.Tensor) -> np.ndarray:
    """Return a tensor as an array that the file can hold: bfloat16 as its bits."""
    if str(tensor.dtype) == "bfloat16":
        return tensor.numpy().view(np.uint16)
    return np.from_dlpack(tensor)


def _tensor(saved: Artifact, name: str, dtype: str) -> tvm.runtime.Tensor:
    """Copy a section into aligned memory of its own, so that the file may go away."""
    array = saved.array(name)
    if dtype == "bfloat16":
        import ml_dtypes

        return tvm.runtime.tensor(array.view(ml_dtypes.bfloat16))
    copy = aligned_empty(array.shape, array.dtype)
    np.copyto(copy, array)
    return tvm.runtime.from_dlpack(copy)


def _as_saved(saved: Artifact, name: str) -> Any:
    entry = saved.table[name]
    return saved.section(name) if entry.dtype is None else saved.array(name)


def _plain(value: Any) -> Any:
    """Turn numpy scalars into Python numbers, which is what JSON can hold."""
    if isinstance(value, Mapping):
        return {str(k): _plain(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(v) for v in value]
    return value.item() if isinstance(value, np.generic) else value
