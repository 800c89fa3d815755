# pyright: reportMissingImports=false, reportMissingModuleSource=false
"""What each contender runs for a case; imported only inside a worker process.

A stack shares one weight (or two, there and back), and nothing is divided here: the caller
divides the time by the number of layers, which leaves the time inside compiled code. Weights
are constants everywhere, so every contender may pack them beforehand.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from cases import Encoder, Stack, load
from claims import Case
from embedding_cases import Lookup
from lookup_cases import FEW, INPUTS, Gather, LookupCase, LookupFfn
from recurrent_cases import LstmCase, PackagedCase

from tvmstruct.ops import Array

SKIP = 13.0  # under the maximum: with scores of a `Question` the output is wrong by up to 0.9%
OPTIONS: dict[str, dict[str, Any]] = {
    "tvmstruct-bf16": {"precision": "bf16"},
    "tvmstruct-int8": {"precision": "int8"},
    "tvmstruct-baseline": {"memory": "baseline"},
    "tvmstruct-minimal": {"memory": "minimal"},
    "tvmstruct-skip": {"skip": SKIP},
}

Call = Callable[[], Any]
Feeds = dict[str, Array]


def build(name: str, case: Case, files: Sequence[str], threads: int) -> tuple[Call, str]:
    """Return a function that computes the case once, and as what ours compiled it."""
    if isinstance(case, Lookup | LstmCase | PackagedCase):
        return case.contender(name, threads), ""
    if isinstance(case, Gather) and case.hashed:
        return case.kernel(threads), ""
    if name in ("torch", "torch-bf16"):
        return _torch(case, files, threads, bf16=name == "torch-bf16"), ""
    if name == "tvmstruct-dense":
        assert isinstance(case, Stack)
        case, files = Stack(case.rows, case.k, case.n, case.layers), ()
    if isinstance(case, LookupCase) and name.startswith("tvmstruct"):
        return _lookup(case, OPTIONS.get(name, {}))
    model, feeds = _model(case, files)
    if name == "onnxruntime":
        run = onnxruntime_call(model, threads)
        return lambda: run(feeds), ""
    if name.startswith("openvino"):
        precision = {"openvino-f32": "f32", "openvino-default": None}[name]
        shapes = {name: array.shape for name, array in feeds.items()}
        run = openvino_call(model, shapes, threads, precision)
        run(feeds)
        return lambda: run({}), ""
    form = case.form if isinstance(case, Stack) else None
    return _tvmstruct(model, feeds, threads, OPTIONS.get(name, {}), form)


def _model(case: Case, files: Sequence[str]) -> tuple[bytes, Feeds]:
    """Return the case as an ONNX model and its inputs; a dense stack needs no files."""
    if isinstance(case, Stack):
        weights, x = load(files, case) if files else _random_stack(case)
        return stack_model(weights, x), {"x": x}
    if not isinstance(case, Encoder):
        return case.model()
    from tvmstruct.demo import find_model

    shape = (case.rows, case.length)
    ids = np.random.default_rng(0).integers(1000, 20000, shape)
    return find_model().read_bytes(), {"input_ids": ids, "attention_mask": np.ones_like(ids)}


def _random_stack(stack: Stack) -> tuple[list[Array], Array]:
    rng = np.random.default_rng(3)
    distinct = [rng.standard_normal(s, np.float32) / np.float32(s[0] ** 0.5) for s in stack.shapes]
    weights = [distinct[i % len(distinct)] for i in range(stack.layers)]
    return weights, rng.standard_normal((stack.rows, stack.k), np.float32)


def stack_model(weights: Sequence[Array], x: Array) -> bytes:
    """Return products with ``weights`` in a row as an ONNX model; equal arrays are one constant."""
    from onnx import TensorProto, helper, numpy_helper

    unique = {id(w): w for w in weights}
    names = {key: f"w{i}" for i, key in enumerate(unique)}
    nodes, last = [], "x"
    for i, w in enumerate(weights):
        nodes.append(helper.make_node("MatMul", [last, names[id(w)]], [f"y{i}"]))
        last = f"y{i}"
    graph = helper.make_graph(
        nodes,
        "stack",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, x.shape)],
        [helper.make_tensor_value_info(last, TensorProto.FLOAT, None)],
        [numpy_helper.from_array(w, names[key]) for key, w in unique.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)])
    model.ir_version = 9
    return model.SerializeToString()


def onnxruntime_call(model: bytes, threads: int) -> Callable[[Feeds], Array]:
    """Return ONNX Runtime's first result of some inputs."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    session = onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    return lambda feeds: session.run(None, feeds)[0]


def openvino_call(
    model: bytes, shapes: dict[str, tuple[int, ...]], threads: int, precision: str | None
) -> Callable[[Feeds], Any]:
    """Return OpenVINO's first result of some inputs; those that are not given are the last ones."""
    import openvino

    core = openvino.Core()
    settings = {"INFERENCE_NUM_THREADS": threads, "PERFORMANCE_HINT": "LATENCY", "NUM_STREAMS": 1}
    if precision:
        settings["INFERENCE_PRECISION_HINT"] = precision
    graph = core.read_model(model)
    graph.reshape({name: list(shape) for name, shape in shapes.items()})
    request = core.compile_model(graph, "CPU", settings).create_infer_request()
    tensors = {name: request.get_tensor(name).data for name in shapes}

    def call(feeds: Feeds) -> Any:
        for name, array in feeds.items():
            tensors[name][...] = array
        request.infer()
        return request.get_output_tensor(0).data

    return call


def _torch(case: Case, files: Sequence[str], threads: int, *, bf16: bool) -> Call:
    import torch

    torch.set_num_threads(threads)
    if isinstance(case, Encoder):
        raise ValueError("no PyTorch form of this model is installed")
    if isinstance(case, LookupFfn):
        return case.torch(bf16=bf16)
    if not isinstance(case, Stack):
        return case.torch()
    dtype = torch.bfloat16 if bf16 else torch.float32
    weights, x = load(files, case)
    # (n, k), as nn.Linear keeps them
    cache = {id(w): torch.from_numpy(np.ascontiguousarray(w.T)).to(dtype) for w in weights}
    layers = [cache[id(w)] for w in weights]
    start = torch.from_numpy(x).to(dtype)

    @torch.inference_mode()
    def call() -> Any:
        y = start
        for w in layers:
            y = torch.nn.functional.linear(y, w)
        return y

    return call


def _lookup(case: LookupCase, options: dict[str, Any]) -> tuple[Call, str]:
    """Return the lookup form of ours; few tokens come anew with each call, for rows in cache."""
    from itertools import cycle

    import tvmstruct
    from tvmstruct.arrays import aligned_empty

    compiled = tvmstruct.compile(case.source(), **options)
    x = case.feeds()["x"]
    rng, inputs = np.random.default_rng(3), []
    for _ in range(INPUTS // case.rows if case.rows <= FEW else 1):
        array = aligned_empty(x.shape, x.dtype)
        array[...] = rng.standard_normal(x.shape, np.float32)
        inputs.append(array)
    turns = cycle(inputs)
    forms = [layer.form for layer in compiled.report().layers if layer.form != "sequence"]
    return lambda: compiled(next(turns)), ", ".join(dict.fromkeys(forms))


def _tvmstruct(
    model: bytes, feeds: Feeds, threads: int, options: dict[str, Any], form: str | None
) -> tuple[Call, str]:
    import tvmstruct
    from tvmstruct.arrays import aligned_empty

    # TVM_NUM_THREADS already holds ``threads``: the argument would cost a thread switch per call.
    assert tvmstruct.resolve_target("host").threads == threads
    compiled = tvmstruct.compile(tvmstruct.from_onnx(model), buckets="exact", **options)
    arrays = []
    for spec in compiled.inputs:
        array = aligned_empty(feeds[spec.name].shape, feeds[spec.name].dtype)
        array[...] = feeds[spec.name]
        arrays.append(array)
    compiled(*arrays)
    forms = [layer.form for layer in compiled.report().layers if layer.form != "sequence"]
    if form is not None and {f.split()[0] for f in forms} != {form}:
        raise ValueError(f"compiled as {', '.join(sorted(set(forms)))}; the weight is {form}")
    return lambda: compiled(*arrays), ", ".join(dict.fromkeys(forms))
