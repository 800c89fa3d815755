"""``compile``: from a source to a `CompiledModel`, the whole way on one screen."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import tvm

from tvmstruct import pipeline
from tvmstruct.buckets import Policy
from tvmstruct.building import build_kernels
from tvmstruct.database import selector
from tvmstruct.embeddings import TABLE_FAMILIES
from tvmstruct.errors import InputError, PlanError
from tvmstruct.frontends import Source, as_source
from tvmstruct.layers import TableForm
from tvmstruct.model import Bucket, CompiledModel
from tvmstruct.planning import Plan
from tvmstruct.schedules.x86 import X86Kernels
from tvmstruct.skipping import Skip
from tvmstruct.targets import TargetSpec, resolve
from tvmstruct.vta.container import is_package

if TYPE_CHECKING:
    from tvmstruct.vta.calibration import Batch, Calibration

Shapes = Mapping[str, Sequence[int]]
MEMORIES = ("auto", "minimal", "baseline")
NO_SKIP = {
    "baseline": "its attention is separate operators over all scores, which skip nothing",
}
PRECISIONS = ("f32", "bf16", "bf16-weights", "int8")


def compile(
    source: Source | tvm.IRModule,
    target: str | dict[str, Any] | tvm.target.Target | TargetSpec = "host",
    *,
    plan: Plan | Mapping[str, Any] | str | Path | None = None,
    precision: str = "f32",
    memory: str = "auto",
    skip: Skip | float | Mapping[str, Any] | None = None,
    buckets: str | Sequence[Mapping[str, int]] = "auto",
    threads: int | None = None,
    database: str | Path | None = None,
    calibration: Calibration | Batch | Iterable[Batch] | None = None,
) -> CompiledModel:
    """Compile a model; without a plan the result is the same function up to float rounding.

    ``plan`` names layers and the forms they take. ``precision`` is how dense layers and every
    product of structured ones multiply: "f32", "bf16" (weights and inputs of a product in bfloat16,
    without AVX512-BF16 weights only), "bf16-weights" (weights only) or "int8" (a scale per output
    column, in structured layers of each block, and per row of the input); the sums are float32 or
    exact int32. Products whose blocks are too small to gain keep their inputs in float32, and under
    int8 their weights too; attention and normalisation stay in float32, and ``report()`` says
    what every layer lost.
    ``memory`` says how attention and feed-forward are cut (NLP-Fast, Table III): "auto" takes
    heads and chunks of hidden features one after the other where that is no slower, "minimal"
    makes queries, keys and values head by head too and never holds a whole hidden layer,
    "baseline" keeps scores, probabilities and hidden features in memory, to compare with.
    ``skip`` leaves out of attention what weighs next to nothing (NLP-Fast, section III-C), and
    with it some accuracy: 8 skips scores more than 8 below the maximum of their query, see `Skip`;
    ``measure_skip`` says what that saves and loses; with ``memory="minimal"`` values that hardly a
    query weighs are not made either, see ``Skip.zero_ratio``. Padding may move, within that loss,
    which weights go.
    ``buckets`` is "auto" (pad a batch or a length to the next of a few sizes where that provably
    or by probe changes nothing),
    "exact" (never pad) or a list of ``{symbol: size}``. Shapes are compiled when they are
    first used; one small shape is compiled at once, so that errors come now and ``report()``
    has something to say. ``database`` is a folder that ``tune`` wrote: kernels whose exact shape
    it has run as tuned, the others as records that come with tvmstruct or their own default say.

    ``target="vta"`` gives dense layers, with bias and ReLU, to VTA, in int8 and in a simulator; the
    rest stays float32 on the CPU, and ``report()`` says why. It needs ``calibration``: typical
    inputs by name, or several such batches, or a `tvmstruct.vta.Calibration`, from which the
    scales are chosen. ``threads`` are those of the CPU part.

    Raises TuningError, TargetError, PlanError, ModelError, UnsupportedOperatorError or InputError.
    """
    skip = Skip.of(skip)
    _check_options(precision, memory, skip)
    spec = resolve(target)
    source = as_source(source)
    how = (source, spec, _plan(plan, source), precision, database, memory, skip)
    if spec.accelerator is not None:
        from tvmstruct.vta.compiler import offloading

        compiler = offloading(*how, calibration=calibration)
    elif calibration is not None:
        raise InputError('calibration is for target="vta", which quantises; leave it out here')
    else:
        compiler = Compiler(*how)
    model = CompiledModel(
        source.inputs,
        source.outputs,
        spec,
        Policy.of(buckets, source),
        compiler=compiler,
        threads=threads,
        token_inputs=dict(source.token_inputs),
        length_inputs=dict(source.length_inputs),
        default_ones=source.default_ones,
        default_zeros=source.default_zeros,
    )
    compiler.prepare(model)
    for shapes in model.policy.first(source):
        model.compile_bucket(shapes)
    return model


def load(path: str | Path) -> CompiledModel:
    """Load a model that ``save`` wrote; it runs the shapes that were compiled before saving.

    Raises ArtifactError where the file is damaged, of another version or for another CPU.
    """
    if is_package(path):
        from tvmstruct.vta.package import load_package

        return load_package(path)
    from tvmstruct.saving import load_model

    return load_model(path)


class Compiler:
    """Compiles one shape after the other; code and weights are shared between them."""

    bucket_type: type[Bucket] = Bucket

    def __init__(
        self,
        source: Source,
        spec: TargetSpec,
        plan: Plan,
        precision: str = "f32",
        database: str | Path | None = None,
        memory: str = "auto",
        skip: Skip | None = None,
    ) -> None:
        self.source = source
        self.session = new_session(spec, plan, precision, memory, skip)
        self.session.select = selector(database, spec)
        self.session.tables |= {n: TableForm.given(t) for n, t in source.tables.items()}
        self.libraries: dict[str, tvm.runtime.Module] = {}
        self._lock = threading.Lock()

    def prepare(self, model: CompiledModel) -> None:
        """Do what must precede the first bucket of ``model``."""

    def bucket(self, shapes: Shapes) -> Bucket:
        """Return the compiled bucket for exactly these input shapes."""
        with self._lock:
            lowered = pipeline.lower(self.source.at(shapes), self.session)
            self._check_plan()
            executable = pipeline.build(lowered.planned, self.session)
            libraries = self._kernels(lowered)
            for library in libraries:
                executable.mod.import_module(library)
            weights = [self.session.store.tensors[key] for key in lowered.weights]
            inputs = self.source.inputs
            return self.bucket_type(
                executable,
                weights,
                tuple(tuple(shapes[s.name]) for s in inputs),
                [s.dtype for s in inputs],
                lowered=lowered,
                libraries=libraries,
            )

    def _kernels(self, lowered: pipeline.Lowered) -> list[tvm.runtime.Module]:
        """Compile the kernels that no bucket before needed."""
        new = {s: k.func for s, k in lowered.kernels.items() if s not in self.libraries}
        self.libraries |= build_kernels(new, self.session.spec.target)
        return list({id(lib): lib for s in lowered.kernels if (lib := self.libraries[s])}.values())

    def _check_plan(self) -> None:
        planned, found = set(self.session.plan), set(self.session.tables)
        for key in self.session.forms:
            found.add(key.removesuffix("^T"))
        if unused := sorted((planned - found) & set(self.source.tensors)):
            raise PlanError(
                f"plan: no dense layer multiplies with {unused}; a table whose rows are looked up "
                f"by ids takes one of the forms {', '.join(TABLE_FAMILIES)}"
            )
        if missing := planned - found:
            known = ", ".join(sorted(found)[:20])
            raise PlanError(f"plan: no layer is called {sorted(missing)}; the layers are: {known}")


def _plan(plan: Plan | Mapping[str, Any] | str | Path | None, source: Source) -> Plan:
    if plan is None:
        return Plan()
    if isinstance(plan, Plan):
        return plan
    if isinstance(plan, Mapping):
        return Plan.from_json(json.dumps(dict(plan)))
    return Plan.from_json(plan)


def check_precision(precision: str) -> None:
    """Raise InputError where there is no such precision."""
    if precision not in PRECISIONS:
        raise InputError(f"precision={precision!r} is unknown; known: {', '.join(PRECISIONS)}")


def new_session(
    spec: TargetSpec,
    plan: Plan | None = None,
    precision: str = "f32",
    memory: str = "auto",
    skip: Skip | None = None,
) -> pipeline.Session:
    """Return a session without kernels; TargetError where the CPU cannot compute the precision."""
    least = memory == "minimal"
    kernels = X86Kernels(spec.isa, spec.threads, spec.features, least_memory=least, skip=skip)
    if precision != "f32":
        kernels.precision(precision)
    plan = Plan() if plan is None else plan
    return pipeline.Session(spec, kernels, plan, precision=precision, memory=memory, skip=skip)


def check_memory(memory: str) -> None:
    """Raise InputError where there is no such way to cut a model."""
    if memory not in MEMORIES:
        raise InputError(f"memory={memory!r} is unknown; known: {', '.join(MEMORIES)}")


def _check_options(precision: str, memory: str, skip: Skip | None) -> None:
    check_precision(precision)
    check_memory(memory)
    if skip is not None and memory in NO_SKIP:
        raise InputError(
            f'memory="{memory}" and skip={skip.threshold:g}: {NO_SKIP[memory]}; '
            'choose memory="auto", memory="minimal" or skip=None'
        )
