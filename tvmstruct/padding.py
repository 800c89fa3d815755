"""Padding a request to a bucket and cutting the result back, where a probe allows it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from tvmstruct.frontends.source import TensorSpec
    from tvmstruct.model import Bucket, CompiledModel

SMALL, LARGE = 5, 8  # sizes of the probe: compiled at both, padded from one to the other
OTHER = 3  # what the remaining symbols are during a probe
TOLERANCE = 1e-5  # relative to the largest output: rounding may differ between two shapes


class Padder:
    """Knows which symbols of a model may be padded; finds out by probing, once per symbol."""

    def __init__(self, model: CompiledModel) -> None:
        self.model = model
        self.verdicts: dict[str, str] = {}  # symbol -> "" where safe, else why not
        self.notes: tuple[str, ...] = ()

    def bucket(self, sizes: Mapping[str, int], arrays: Sequence[np.ndarray]) -> dict[str, int]:
        """Return the sizes to run a request at: those of a bucket, or its own."""
        policy = self.model.policy
        if policy.kind == "exact":
            return dict(sizes)
        wanted = policy.padded(sizes, frozenset(sizes)) if policy.kind == "auto" else {}
        symbols = [s for s in sizes if wanted.get(s) != sizes[s]]
        paddable = {s for s in symbols if not self.verdict(s)}
        if paddable and self._has_empty_mask(arrays):
            paddable = set()  # a row without any key averages over all keys, padding included
        return policy.padded(sizes, frozenset(paddable))

    def verdict(self, symbol: str) -> str:
        """Return why a symbol must not be padded, or an empty string."""
        if symbol not in self.verdicts:
            why = self._unsafe(symbol)
            self.verdicts[symbol] = why or self._probe(symbol)
            state = self.verdicts[symbol] or "a probe at two sizes gave equal results"
            kept = "exact sizes" if self.verdicts[symbol] else "padded"
            self.notes = (*self.notes, f"{symbol}: {kept} ({state})")
        return self.verdicts[symbol]

    def _unsafe(self, symbol: str) -> str:
        """Return what is known without a probe to forbid padding."""
        model = self.model
        if model.compiler is None:
            return "it was not probed before saving"
        if any(None in (spec.shape or (None,)) for spec in model.outputs):
            return "an output's shape is not known from the input's"
        batch = all(d != symbol for s in model.inputs for d in s.shape[1:])
        if model.compiler.source.scales and not batch:
            return "activations are rounded with one scale for whole tensors, padding included"
        masked = any(symbol in s.shape[1:] for s in model.inputs if s.name in model.default_ones)
        return "" if batch or masked else "no attention mask has this dimension"

    def _probe(self, symbol: str) -> str:
        """Compare results at a small size with those padded to a larger one."""
        model, rng = self.model, np.random.default_rng(0)
        symbols = {d for s in model.inputs for d in s.shape if isinstance(d, str)}
        limits = model.policy.limits or {}
        if any(limits.get(s, LARGE) < LARGE for s in symbols):
            return "the model's largest size is too small to probe"
        sizes = {s: SMALL if s == symbol else OTHER for s in symbols}
        arrays = [self._random(spec, sizes, rng) for spec in model.inputs]
        exact = self.probe_bucket(sizes).run(arrays)
        large = {**sizes, symbol: LARGE}
        padded = self.unpad(self.probe_bucket(large).run(self.pad(arrays, large)), sizes)
        for spec, a, b in zip(model.outputs, exact, padded, strict=True):
            if a.shape != b.shape:
                return f"output {spec.name!r} has shape {b.shape} for {a.shape}"
            scale = max(1.0, float(np.abs(a).max(initial=0.0)))
            if not np.allclose(a, b, rtol=0, atol=TOLERANCE * scale, equal_nan=True):
                return f"output {spec.name!r} changes by {np.abs(a - b).max():.1e} in a probe"
        return ""

    def probe_bucket(self, sizes: Mapping[str, int]) -> Bucket:
        """Return the bucket that a probe runs."""
        return self.model._bucket(sizes)

    def _random(
        self, spec: TensorSpec, sizes: Mapping[str, int], rng: np.random.Generator
    ) -> np.ndarray:
        shape = tuple(sizes[d] if isinstance(d, str) else d for d in spec.shape)
        if spec.name in self.model.default_ones:
            mask = rng.integers(0, 2, shape)
            mask[..., 0] = 1
            mask[:1] = 1  # one row is full, the others have gaps
            return mask.astype(spec.dtype)
        if np.dtype(spec.dtype).kind == "f":
            return rng.standard_normal(shape).astype(spec.dtype)
        if (steps := self.model.length_inputs.get(spec.name)) is not None:
            most = sizes[steps] if isinstance(steps, str) else steps
            return rng.integers(1, most + 1, shape).astype(spec.dtype)
        top = self.model.token_inputs.get(spec.name, 2)
        return rng.integers(0, top, shape).astype(spec.dtype)

    def _has_empty_mask(self, arrays: Sequence[np.ndarray]) -> bool:
        return any(
            not array.any(axis=-1).all()
            for spec, array in zip(self.model.inputs, arrays, strict=True)
            if spec.name in self.model.default_ones
        )

    def pad(self, arrays: Sequence[np.ndarray], sizes: Mapping[str, int]) -> list[np.ndarray]:
        """Return arrays at the bucket's sizes: zeros after a length, row 0 again after a batch."""
        return [
            _pad(array, [sizes[d] if isinstance(d, str) else d for d in spec.shape])
            for spec, array in zip(self.model.inputs, arrays, strict=True)
        ]

    def unpad(self, outputs: Sequence[np.ndarray], sizes: Mapping[str, int]) -> list[np.ndarray]:
        """Cut every output back to the request's sizes."""
        return [
            np.ascontiguousarray(
                out[tuple(slice(sizes[d] if isinstance(d, str) else None) for d in spec.shape)]
            )
            for spec, out in zip(self.model.outputs, outputs, strict=True)
        ]


def _pad(array: np.ndarray, shape: Sequence[int]) -> np.ndarray:
    if array.shape == tuple(shape):
        return array
    out = np.zeros(shape, array.dtype)
    out[tuple(slice(n) for n in array.shape)] = array
    if array.ndim and array.shape[0] < shape[0]:
        out[array.shape[0] :] = out[:1]
    return out
