"""The ordered list of passes from an imported module to a scheduled one."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import tvm
from tvm import relax
from tvm.relax.backend.cpu_generic import pipeline as cpu_pipeline
from tvm.script.ir_builder import tirx as T

from tvmstruct import compat
from tvmstruct.footprint import Footprint, footprint
from tvmstruct.frontends.source import STORED_ATTR, WEIGHTS_ATTR
from tvmstruct.layers import Form, LayerTable, TableForm
from tvmstruct.passes.apply_plan import ApplyPlan
from tvmstruct.passes.canonicalize_dense import CanonicalizeDense
from tvmstruct.passes.choose_precision import ChoosePrecision
from tvmstruct.passes.clip_gathers import ClipGathers
from tvmstruct.passes.emit_kernels import EmitKernels, KernelCall, Select, keep_default
from tvmstruct.passes.emit_launches import EmitLaunches
from tvmstruct.passes.flatten_convolution import FlattenConvolution
from tvmstruct.passes.fuse_attention import FuseAttention
from tvmstruct.passes.fuse_embedding import FuseEmbedding
from tvmstruct.passes.fuse_epilogue import FuseEpilogue
from tvmstruct.passes.fuse_layer_norm import FuseLayerNorm
from tvmstruct.passes.lift_constants import LiftConstants, with_parameters
from tvmstruct.passes.merge_shared_input import MergeSharedInput
from tvmstruct.passes.minimise_attention import MinimiseAttention
from tvmstruct.passes.offload_dense import ON_ACCELERATOR, ChainOffloaded, OffloadDense
from tvmstruct.passes.order_units import OrderUnits
from tvmstruct.passes.plan_embedding import PlanEmbedding
from tvmstruct.passes.project_attention import ProjectAttention
from tvmstruct.passes.recognize_kronecker import RecognizeKronecker
from tvmstruct.passes.recognize_layer_norm import RecognizeLayerNorm
from tvmstruct.passes.recognize_lookup import RecognizeLookup
from tvmstruct.passes.recognize_operator import RecognizeOperator
from tvmstruct.passes.recognize_recurrence import RecognizeRecurrence
from tvmstruct.passes.recognize_softmax import RecognizeSoftmax
from tvmstruct.passes.recognize_word2ket import RecognizeWord2Ket
from tvmstruct.passes.recover_structure import RecoverStructure
from tvmstruct.passes.simplify_layout import SimplifyLayout
from tvmstruct.passes.split_feed_forward import SplitFeedForward
from tvmstruct.passes.view_outputs import ViewOutputs
from tvmstruct.planning import Plan
from tvmstruct.records import fused_records, layer_records, refused_records, tuned_records
from tvmstruct.report import LayerRecord
from tvmstruct.rewrite import Log, Rule, apply_rule
from tvmstruct.schedules import Kernels
from tvmstruct.schedules.builder import argument, i64, prim_func
from tvmstruct.schedules.registry import KERNEL, Kernel
from tvmstruct.skipping import Skip
from tvmstruct.targets import TargetSpec
from tvmstruct.vta.offload import Offload
from tvmstruct.weights import WeightStore

LAYOUTS = 4  # rounds in which the layouts of attention and of the graph around it cancel
STEPS = 4  # an epilogue has at most bias, activation, residual; each round folds one of them


@dataclass
class Session:
    """What all buckets of one model share: forms of weights, packed weights, the target."""

    spec: TargetSpec
    kernels: Kernels
    plan: Plan = field(default_factory=Plan)
    store: WeightStore = field(default_factory=WeightStore)
    forms: dict[str, Form] = field(default_factory=dict)
    tables: dict[str, TableForm] = field(default_factory=dict)
    errors: dict[str, float] = field(default_factory=dict)  # of tables in a lower precision
    lookups: dict[str, np.ndarray] = field(default_factory=dict)  # tables in our order of bits
    select: Select = keep_default
    precision: str = "f32"
    memory: str = "auto"
    skip: Skip | None = None
    offload: Offload | None = None


@dataclass
class Lowered:
    """One bucket, scheduled: its module, the kernels that it calls, the weights that it takes.

    ``planned`` is the module once every result has its memory.
    """

    mod: tvm.IRModule
    planned: tvm.IRModule
    kernels: dict[str, Kernel]
    weights: list[str]
    layers: list[LayerRecord]
    calls: list[KernelCall]
    footprint: Footprint


def lower(mod: tvm.IRModule, session: Session) -> Lowered:
    """Run every pass on a static module; weights leave it as parameters of ``main``."""
    names = {compat.address(t): str(n) for n, t in _attr(mod, WEIGHTS_ATTR).items()}
    stored = {str(n): str(d) for n, d in _attr(mod, STORED_ATTR).items()}
    table, log = LayerTable(), Log()
    for rule in _find_layers(table, names, stored, session):
        mod = apply_rule(mod, rule, log)
    layers = layer_records(mod, table, session.forms, names, session.tables, session.errors)
    fuse = _fuse if session.offload is None else _offload
    for rule in fuse(table, names, session):
        mod = apply_rule(mod, rule, log)
    if session.offload is not None:
        mod = apply_rule(mod, EmitLaunches(table, session.offload.symbol), log)
    layers += [*fused_records(mod, table, session.skip), *refused_records(log)]
    if session.offload is not None:
        refused = {name: why for rule, name, why in log.rejected if rule == OffloadDense.name}
        layers = session.offload.records(layers, refused)
    emit = EmitKernels(table, session.kernels, session.store, session.select)
    lift = LiftConstants(session.store)
    for rule in (emit, ViewOutputs(), lift):
        mod = apply_rule(mod, rule, log)
    mod = with_parameters(mod, lift)
    mod = _legalize(mod, session)
    planned = _plan_memory(mod, session)
    layers = tuned_records(layers, emit.tuned)
    funcs = (kernel.func for kernel in emit.used.values())
    memory = footprint(planned, funcs, session.spec.threads)
    return Lowered(mod, planned, dict(emit.used), lift.names, layers, emit.calls, memory)


def _find_layers(
    table: LayerTable, names: Mapping[int, str], stored: Mapping[str, str], session: Session
) -> Iterator[Rule]:
    yield FlattenConvolution()
    yield ClipGathers()
    yield RecognizeLookup(table, names, session.lookups, session.kernels)
    yield RecognizeRecurrence(table, session.forms, names)
    yield RecognizeKronecker(table, session.forms, names)
    yield RecognizeOperator(table, session.forms, names)
    yield CanonicalizeDense(table, names)
    yield SimplifyLayout()
    yield RecognizeWord2Ket(table, session.tables, names)
    yield PlanEmbedding(table, session.tables, session.plan, names)
    yield ApplyPlan(table, session.forms, session.plan, session.tables)
    yield RecoverStructure(table, session.forms, stored)
    yield ChoosePrecision(table, session.forms, session.kernels, session.precision, session.errors)


def _fuse(table: LayerTable, names: Mapping[int, str], session: Session) -> Iterator[Rule]:
    yield RecognizeSoftmax()
    partitioned = session.memory != "baseline"
    if partitioned:
        yield FuseAttention(table)  # before epilogues, which would take masks for residuals
    for _ in range(STEPS):
        yield FuseEpilogue(table)
    yield OrderUnits(table)
    yield RecognizeLayerNorm()
    for _ in range(LAYOUTS):
        yield SimplifyLayout()
    if session.memory != "minimal":  # one head's share of q, k and v is made at a time there
        yield MergeSharedInput(table)
    yield FuseEmbedding(table, names)
    yield FuseLayerNorm(table)
    yield SimplifyLayout()
    if session.memory == "minimal":
        yield MinimiseAttention(table, session.kernels)
    if partitioned:
        if session.skip is None:  # skipped work is dealt out by (head, tile), heads kept apart
            yield ProjectAttention(table, session.kernels)
        yield SplitFeedForward(table, session.kernels)


def _offload(table: LayerTable, names: Mapping[int, str], session: Session) -> Iterator[Rule]:
    """Fuse what stays on the CPU; layers become launches before anything else could take them."""
    assert session.offload is not None
    yield RecognizeSoftmax()
    if session.memory != "baseline":
        yield FuseAttention(table)
    for _ in range(STEPS):
        yield FuseEpilogue(table, ON_ACCELERATOR, residual=False)
    yield RecognizeLayerNorm()
    for _ in range(LAYOUTS):
        yield SimplifyLayout()
    yield MergeSharedInput(table)
    yield FuseEmbedding(table, names)
    yield OffloadDense(table, session.offload.obstacle)
    yield ChainOffloaded(table, session.offload.chains)
    for _ in range(STEPS):
        yield FuseEpilogue(table)  # of layers that stay
    yield FuseLayerNorm(table)
    yield SimplifyLayout()


def _legalize(mod: tvm.IRModule, session: Session) -> tvm.IRModule:
    """Lower what is left to PrimFuncs, fuse them, and schedule each."""
    with session.spec.target:
        mod = tvm.transform.Sequential(
            [
                *cpu_pipeline.library_dispatch_passes(session.spec.target),
                relax.transform.LegalizeOps(),
                relax.transform.AnnotateTIROpPattern(),
                relax.transform.FuseOps(),
                relax.transform.FuseTIR(),
                relax.transform.DeadCodeElimination(),
            ]
        )(mod)
        for gvar, func in list(mod.functions_items()):
            if isinstance(func, tvm.tirx.PrimFunc) and KERNEL not in (func.attrs or {}):
                mod[gvar] = session.kernels.schedule(func)
    return mod


def _plan_memory(mod: tvm.IRModule, session: Session) -> tvm.IRModule:
    """Decide which results share memory."""
    passes = cpu_pipeline.dataflow_lower_passes(session.spec.target)
    passes.append(relax.transform.StaticPlanBlockMemory())
    with session.spec.target:
        return tvm.transform.Sequential(passes)(mod)


def build(mod: tvm.IRModule, session: Session):
    """Return the Relax executable of a scheduled module."""
    target = session.spec.target
    passes = cpu_pipeline.finalize_passes(target)  # planned memory stays as it is
    if not any(isinstance(f, tvm.tirx.PrimFunc) for f in mod.functions.values()):
        mod = tvm.IRModule(mod.functions)
        mod["tvmstruct_anchor"] = _anchor()  # bytecode without any machine code cannot be saved
    with target:
        return relax.build(mod, target=target, relax_pipeline=tvm.transform.Sequential(passes))


def _anchor() -> tvm.tirx.PrimFunc:
    """Return a function that clears one number: the least machine code there is."""

    def body() -> None:
        out = argument("out", (i64(1),))
        T.buffer_store(out, T.float32(0), [i64(0)])

    return prim_func(body).with_attr("global_symbol", "tvmstruct_anchor")


def _attr(mod: tvm.IRModule, key: str) -> dict[Any, Any]:
    return dict(mod.attrs[key]) if mod.attrs and key in mod.attrs else {}
