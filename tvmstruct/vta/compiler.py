"""``compile(target="vta")``: calibrate in float, quantise, and compile with launches."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np

from tvmstruct.buckets import shapes_at
from tvmstruct.compiler import Compiler, Shapes, check_precision
from tvmstruct.errors import InputError
from tvmstruct.model import Bucket
from tvmstruct.padding import Padder
from tvmstruct.vta import sites
from tvmstruct.vta.calibration import Calibration
from tvmstruct.vta.offload import (
    FLOAT,
    INTEGER,
    LAUNCH,
    OBSERVE,
    IntegerSite,
    Make,
    Offload,
    Refused,
    cost,
)

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping

    from tvmstruct.model import CompiledModel
    from tvmstruct.ops import Array
    from tvmstruct.vta.calibration import Batch

COMPARED = 4  # calibration batches that int8 is compared with float on


class VtaBucket(Bucket):
    """A bucket whose code calls sites, which it keeps alive."""

    sites: Sequence[sites.Site] = ()

    def run(self, arrays: Sequence[Array]) -> list[Array]:
        """Run on arrays of exactly the compiled shapes and dtypes."""
        with sites.errors_of_sites():
            return super().run(arrays)

    def run_single(self, tensors: tuple[Any, ...]) -> Array:
        """Run on the tensors of the last call."""
        with sites.errors_of_sites():
            return super().run_single(tensors)

    @property
    def notes(self) -> tuple[str, ...]:
        """What all launches of a call cost."""
        steps = [
            step
            for site in self.sites
            if isinstance(site, IntegerSite)
            for program in site.layers.programs
            for step in program.steps
        ]
        return (f"VTA in the last: {cost(steps)}", *super().notes)

    def keep(self, made: Sequence[sites.Site], outputs: int) -> VtaBucket:
        """Keep sites alive, and copy every output: a second call to see which must be is long."""
        self.sites, self._copied = tuple(made), frozenset(range(outputs))
        return self


def offloading(*how: Any, calibration: Calibration | Batch | Iterable[Batch] | None) -> VtaCompiler:
    """Return the compiler for a target with an accelerator; ``how`` is what `Compiler` takes.

    Raises InputError for a missing calibration, and what VTA beside the CPU cannot do.
    """
    _, spec, _, precision, database, memory, _ = how
    check_precision(precision)
    if precision not in ("f32", "int8"):
        raise InputError(
            f'target="vta" and precision="{precision}": dense layers are int8 on VTA and float32 '
            "where they stay on the CPU; leave precision out"
        )
    if memory == "minimal":
        raise InputError(
            'target="vta" and memory="minimal": attention that makes its own queries, keys and '
            'values would take those layers from VTA; choose memory="auto"'
        )
    plain = (*how[:3], "f32", *how[4:])
    from tvmstruct.vta.tuning import tuned_make

    make = tuned_make(spec.accelerator, database)
    return VtaCompiler(*plain, calibration=Calibration.of(calibration), make=make)


class VtaCompiler(Compiler):
    """Compiles shapes with the layers on VTA; ``make`` builds the launch of steps."""

    bucket_type = VtaBucket

    def __init__(self, *args: Any, calibration: Calibration, make: Make, **options: Any) -> None:
        super().__init__(*args, **options)
        self.calibration = calibration
        self.offload = self.session.offload = Offload(calibration, make)
        self._state = threading.RLock()

    def bucket(self, shapes: Shapes) -> Bucket:
        """Return the compiled bucket for exactly these input shapes."""
        return self.bucket_as(self.offload.state, shapes)

    def bucket_as(self, state: str, shapes: Shapes) -> Bucket:
        """Return a bucket whose layers compute as ``state`` says."""
        with self._as(state):
            while True:
                try:
                    bucket = super().bucket(shapes)
                except Refused as refused:
                    self.offload.refused[refused.key] = refused.why
                    self.offload.taken()
                    continue
                assert isinstance(bucket, VtaBucket)
                return bucket.keep(self.offload.taken(), len(self.source.outputs))

    @contextmanager
    def _as(self, state: str) -> Iterator[None]:
        with self._state:
            before, self.offload.state = self.offload.state, state
            try:
                yield
            finally:
                self.offload.state = before

    def prepare(self, model: CompiledModel) -> None:
        """Choose all scales, and note in the model's report what int8 loses on the batches."""
        model.padder = FloatPadder(model)
        batches = [model.bound(batch) for batch in self.calibration.batches]
        wanted = self._run(OBSERVE, batches)
        self.offload.state = LAUNCH
        found = self._run(INTEGER, batches[:COMPARED])
        model.notes = (comparison(found, wanted),)

    def _run(self, state: str, batches: Sequence[Sequence[Array]]) -> list[list[Array]]:
        """Return the outputs of every batch."""
        names = [spec.name for spec in self.source.inputs]
        buckets: dict[Any, Bucket] = {}
        outputs: list[list[Array]] = []
        for arrays in batches:
            key = tuple(a.shape for a in arrays)
            if key not in buckets:
                buckets[key] = self.bucket_as(state, dict(zip(names, key, strict=True)))
            outputs.append(buckets[key].run(arrays))
        return outputs


class FloatPadder(Padder):
    """Probes in float: rounding to int8 turns differences of 1e-7 into whole steps."""

    def probe_bucket(self, sizes: Mapping[str, int]) -> Bucket:
        """Return the bucket of a probe."""
        compiler = self.model.compiler
        assert isinstance(compiler, VtaCompiler)
        return compiler.bucket_as(FLOAT, shapes_at(self.model.inputs, sizes))


def comparison(found: Sequence[Sequence[Array]], wanted: Sequence[Sequence[Array]]) -> str:
    """Return the least cosine and the largest relative error of all float outputs, in words."""
    cosine, error = 1.0, 0.0
    for a, b in zip(found, wanted, strict=False):
        for x, y in zip(a, b, strict=True):
            if y.dtype.kind != "f" or not (norm := float(np.linalg.norm(y))):
                continue
            x, y = x.astype(np.float64).ravel(), y.astype(np.float64).ravel()
            error = max(error, float(np.linalg.norm(x - y)) / norm)
            cosine = min(cosine, float(x @ y) / (float(np.linalg.norm(x)) * norm or 1.0))
    batches = f"{len(found)} calibration batch{'es' if len(found) > 1 else ''}"
    return f"int8 against float on {batches}: cosine {cosine:.5f}, relative error {error:.2e}"
