# pyright: reportMissingImports=false, reportMissingModuleSource=false
"""What each contender runs for a case; imported only inside a worker process.

``stack`` puts so many equal layers in a row (sharing one weight, which so stays in cache) and
divides nothing: the caller divides the time by the stack, which leaves the time inside
compiled code. Weights are constants everywhere, so every contender may pack them beforehand.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from peers import Case


def build(name: str, case: Case, threads: int) -> Callable[[], Any]:
    """Return a function of no arguments that computes the case once."""
    model, feeds = _model(case)
    runners = {
        "torch": _torch,
        "onnxruntime": _onnxruntime,
        "openvino-f32": lambda *a: _openvino(*a, precision="f32"),
        "openvino-default": lambda *a: _openvino(*a, precision=None),
        "tvmstruct": _tvmstruct,
        "tvmstruct-bf16": lambda *a: _tvmstruct(*a, precision="bf16"),
        "tvmstruct-int8": lambda *a: _tvmstruct(*a, precision="int8"),
    }
    if name == "torch":
        return _torch(case, feeds, threads)
    return runners[name](model, feeds, threads)


def _model(case: Case) -> tuple[bytes, dict[str, np.ndarray]]:
    """Return the case as an ONNX model and its inputs."""
    if case.kind == "file":
        import onnx

        rng = np.random.default_rng(0)
        shape = tuple(case.options["shape"])
        ids = rng.integers(0, 30522, shape)
        return onnx.load(case.options["path"]).SerializeToString(), {
            "input_ids": ids,
            "attention_mask": np.ones(shape, np.int64),
        }
    weights, x = dense_weights(case)
    return _onnx_stack(weights, x), {"x": x}


def dense_weights(case: Case) -> tuple[list[np.ndarray], np.ndarray]:
    """Return the weights of a stack of dense layers (k, n), and its input (rows, k)."""
    rng = np.random.default_rng(0)
    k, n, rows = (case.options[name] for name in ("k", "n", "rows"))
    stack = case.options.get("stack", 1)
    w = member(case.options, rng)
    there = [w / float(np.sqrt(k))]
    back = [rng.standard_normal((n, k), "float32") / float(np.sqrt(n))] if k != n else there
    weights = [(there if i % 2 == 0 else back)[0] for i in range(stack)]
    return weights, rng.standard_normal((rows, k), "float32")


def member(options: dict[str, Any], rng: np.random.Generator) -> np.ndarray:
    """Return a (k, n) matrix that is exactly of the family in ``options``, dense without one."""
    k, n = options["k"], options["n"]
    family = options.get("family")
    if family is None:
        return rng.standard_normal((k, n), "float32")
    from tvmstruct.families import FAMILIES

    # The nearest member to a small random matrix is a random member of its family.
    fit = FAMILIES[family].nearest(
        rng.standard_normal((k, n)).astype(np.float32), **options["parameters"]
    )
    dense = fit.op.to_dense()
    return (dense / np.abs(dense).std()).astype(np.float32)


def _onnx_stack(weights: list[np.ndarray], x: np.ndarray) -> bytes:
    from onnx import TensorProto, helper, numpy_helper

    names = {id(w): f"w{i}" for i, w in enumerate({id(w): w for w in weights}.values())}
    unique = {names[id(w)]: w for w in weights}
    nodes, last = [], "x"
    for i, w in enumerate(weights):
        nodes.append(helper.make_node("MatMul", [last, names[id(w)]], [f"y{i}"]))
        last = f"y{i}"
    graph = helper.make_graph(
        nodes,
        "stack",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, x.shape)],
        [helper.make_tensor_value_info(last, TensorProto.FLOAT, None)],
        [numpy_helper.from_array(np.ascontiguousarray(w), name) for name, w in unique.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)])
    model.ir_version = 9
    return model.SerializeToString()


def _onnxruntime(model: bytes, feeds: dict[str, np.ndarray], threads: int) -> Callable[[], Any]:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    session = onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    return lambda: session.run(None, feeds)[0]


def _openvino(
    model: bytes, feeds: dict[str, np.ndarray], threads: int, *, precision: str | None
) -> Callable[[], Any]:
    import openvino

    core = openvino.Core()
    settings = {"INFERENCE_NUM_THREADS": threads, "PERFORMANCE_HINT": "LATENCY", "NUM_STREAMS": 1}
    if precision:
        settings["INFERENCE_PRECISION_HINT"] = precision
    graph = core.read_model(model)
    graph.reshape({name: list(array.shape) for name, array in feeds.items()})
    request = core.compile_model(graph, "CPU", settings).create_infer_request()
    inputs = [openvino.Tensor(array, shared_memory=True) for array in feeds.values()]
    for i, tensor in enumerate(inputs):
        request.set_input_tensor(i, tensor)

    def call() -> Any:
        request.infer()
        return request.get_output_tensor(0).data

    return call


def _torch(case: Case, feeds: dict[str, np.ndarray], threads: int) -> Callable[[], Any]:
    import torch

    torch.set_num_threads(threads)
    if case.kind != "stack":
        raise ValueError("no PyTorch form of this model is installed")
    weights, _ = dense_weights(case)
    cache = {id(w): torch.from_numpy(np.ascontiguousarray(w.T)) for w in weights}
    layers = [cache[id(w)] for w in weights]  # (n, k), as nn.Linear keeps them
    x = torch.from_numpy(feeds["x"])

    @torch.inference_mode()
    def call() -> Any:
        y = x
        for w in layers:
            y = torch.nn.functional.linear(y, w)
        return y

    return call


def _tvmstruct(
    model: bytes, feeds: dict[str, np.ndarray], threads: int, *, precision: str = "f32"
) -> Callable[[], Any]:
    import tvmstruct
    from tvmstruct.arrays import aligned_empty

    # TVM_NUM_THREADS already holds ``threads``: the argument would cost a thread switch per call.
    assert tvmstruct.resolve_target("host").threads == threads
    compiled = tvmstruct.compile(tvmstruct.from_onnx(model), buckets="exact", precision=precision)
    arrays = []
    for spec in compiled.inputs:
        array = aligned_empty(feeds[spec.name].shape, feeds[spec.name].dtype)
        array[...] = feeds[spec.name]
        arrays.append(array)
    return lambda: compiled(*arrays)
