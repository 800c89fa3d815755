"""Small ONNX models and helpers to run them, for the tests."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import onnx
from onnx import ModelProto, NodeProto, TensorProto, helper, numpy_helper

FLOAT, INT64, BOOL = TensorProto.FLOAT, TensorProto.INT64, TensorProto.BOOL


def rng(seed: int = 0) -> np.random.Generator:
    """Return a seeded generator."""
    return np.random.default_rng(seed)


def weight(*shape: int, seed: int = 0, dtype: str = "float32") -> np.ndarray:
    """Return a random weight of unit-ish gain."""
    scale = 1 / np.sqrt(shape[0])
    return (rng(seed).normal(size=shape) * scale).astype(dtype)


def value(name: str, shape: Sequence[int | str | None] | None, elem: int = FLOAT):
    """Return a typed input or output."""
    return helper.make_tensor_value_info(name, elem, shape)


def make_model(
    nodes: Sequence[NodeProto],
    inputs: Sequence[onnx.ValueInfoProto],
    outputs: Sequence[onnx.ValueInfoProto],
    arrays: Mapping[str, np.ndarray] | None = None,
    opset: int = 17,
) -> ModelProto:
    """Return a model of these parts."""
    initialisers = [numpy_helper.from_array(a, n) for n, a in (arrays or {}).items()]
    graph = helper.make_graph(nodes, "test", inputs, outputs, initialisers)
    ir_version = 4 if opset < 11 else 8
    opsets = [helper.make_opsetid("", opset)]
    return helper.make_model(graph, opset_imports=opsets, ir_version=ir_version)


def dense_model(opset: int = 17, dtype: str = "float32") -> ModelProto:
    """``relu(x @ w1 + b1) @ w2`` on (batch, 24)."""
    arrays = {
        "layer.0.weight": weight(24, 40, seed=1, dtype=dtype),
        "layer.0.bias": weight(40, seed=2, dtype=dtype),
        "layer.1.weight": weight(40, 12, seed=3, dtype=dtype),
    }
    nodes = [
        helper.make_node("MatMul", ["x", "layer.0.weight"], ["h"], name="up"),
        helper.make_node("Add", ["h", "layer.0.bias"], ["hb"]),
        helper.make_node("Relu", ["hb"], ["r"]),
        helper.make_node("MatMul", ["r", "layer.1.weight"], ["y"], name="down"),
    ]
    elem = helper.np_dtype_to_tensor_dtype(np.dtype(dtype))
    return make_model(
        nodes, [value("x", ["batch", 24], elem)], [value("y", ["batch", 12], elem)], arrays, opset
    )


def gemm_model(
    trans_a: int, trans_b: int, alpha: float, beta: float, *, bias: bool = True, opset: int = 17
) -> ModelProto:
    """One Gemm of (5, 24) by (24, 18)."""
    w = weight(24, 18, seed=1)
    arrays = {"w": w.T.copy() if trans_b else w}
    arrays |= {"b": weight(18, seed=2)} if bias else {}
    node = helper.make_node(
        "Gemm", ["x", *arrays], ["y"], transA=trans_a, transB=trans_b, alpha=alpha, beta=beta
    )
    shape = [24, 5] if trans_a else [5, 24]
    return make_model([node], [value("x", shape)], [value("y", [5, 18])], arrays, opset)


def encoder_model(opset: int = 17, *, positions: int = 32, index_dtype: int = INT64) -> ModelProto:
    """A one-layer encoder with the shape arithmetic of a torch export, without Unsqueeze."""
    hidden, heads, rows = 24, 3, 50
    arrays: dict[str, np.ndarray] = {
        "words.weight": weight(rows, hidden, seed=1),
        "positions.weight": weight(positions, hidden, seed=2),
        "position_ids": np.arange(positions, dtype=np.int64)[None],
        "query.weight": weight(hidden, hidden, seed=3),
        "key.weight": weight(hidden, hidden, seed=4),
        "value.weight": weight(hidden, hidden, seed=5),
        "query.bias": weight(hidden, seed=6),
        "one_index": np.array(1, np.int64),
        "zero_index": np.array(0, np.int64),
        "start": np.array([0], np.int64),
        "axis": np.array([1], np.int64),
        "as_vector": np.array([1], np.int64),
        "heads": np.array([0, 0, heads, hidden // heads], np.int64),
        "merged": np.array([0, 0, hidden], np.int64),
        "mask_shape": np.array([0, 1, 1, -1], np.int64),
        "one": np.array(1, np.float32),
        "lowest": np.array(-1e4, np.float32),
        "scale": np.array(np.sqrt(hidden // heads), np.float32),
    }
    n = helper.make_node
    nodes = [
        n("Shape", ["input_ids"], ["shape"]),
        n("Gather", ["shape", "one_index"], ["length"]),
        n("Reshape", ["length", "as_vector"], ["end"]),
        n("Slice", ["position_ids", "start", "end", "axis"], ["here"]),
        n("Gather", ["words.weight", "input_ids"], ["w"], name="lookup"),
        n("Gather", ["positions.weight", "here"], ["p"]),
        n("Add", ["w", "p"], ["e"]),
        n("Reshape", ["attention_mask", "mask_shape"], ["m4"]),
        n("Cast", ["m4"], ["mf"], to=FLOAT),
        n("Sub", ["one", "mf"], ["inverse"]),
        n("Mul", ["inverse", "lowest"], ["additive"]),
    ]
    for part, axes in (("query", [0, 2, 1, 3]), ("key", [0, 2, 3, 1]), ("value", [0, 2, 1, 3])):
        nodes += [
            n("MatMul", ["e", f"{part}.weight"], [f"{part}_d"]),
            n("Add", [f"{part}_d", "query.bias"], [f"{part}_b"]),
            n("Reshape", [f"{part}_b", "heads"], [f"{part}_h"]),
            n("Transpose", [f"{part}_h"], [f"{part}_t"], perm=axes),
        ]
    nodes += [
        n("MatMul", ["query_t", "key_t"], ["s"]),
        n("Div", ["s", "scale"], ["scaled"]),
        n("Add", ["scaled", "additive"], ["masked"]),
        n("Softmax", ["masked"], ["probability"], axis=3),
        n("MatMul", ["probability", "value_t"], ["mixed"]),
        n("Transpose", ["mixed"], ["back"], perm=[0, 2, 1, 3]),
        n("Reshape", ["back", "merged"], ["hidden"]),
    ]
    shape = ["batch", "sequence"]
    inputs = [value("input_ids", shape, index_dtype), value("attention_mask", shape, INT64)]
    return make_model(nodes, inputs, [value("hidden", ["b", "s", hidden])], arrays, opset)


def bert_weights(
    layers: int, hidden: int, inner: int, *, rows: int = 60, positions: int = 40, seed: int = 0
) -> dict[str, np.ndarray]:
    """Return random weights of a BERT-like encoder; matrices are (in, out), as MatMul wants."""
    generator = rng(seed)

    def matrix(n: int, m: int) -> np.ndarray:
        return (generator.normal(size=(n, m)) / np.sqrt(n)).astype(np.float32)

    def norm(name: str) -> dict[str, np.ndarray]:
        gain, shift = generator.normal(size=(2, hidden)).astype(np.float32) * 0.1
        return {f"{name}.weight": 1 + gain, f"{name}.bias": shift}

    weights = {
        "embeddings.words": generator.normal(size=(rows, hidden)).astype(np.float32),
        "embeddings.positions": generator.normal(size=(positions, hidden)).astype(np.float32),
        **norm("embeddings.norm"),
    }
    for i in range(layers):
        at = f"encoder.layer.{i}"
        parts = dict.fromkeys(("query", "key", "value", "attention.output"), (hidden, hidden))
        parts |= {"intermediate": (hidden, inner), "output": (inner, hidden)}
        for part, shape in parts.items():
            weights[f"{at}.{part}.weight"] = matrix(*shape)
            weights[f"{at}.{part}.bias"] = matrix(1, shape[1])[0] * 0.1
        weights |= norm(f"{at}.attention.norm") | norm(f"{at}.norm")
    return weights


def bert_model(weights: Mapping[str, np.ndarray], heads: int) -> ModelProto:
    """Return a BERT-like encoder as torch exports it, with erf GELU and LayerNormalization."""
    hidden = weights["embeddings.norm.weight"].shape[0]
    layers = 1 + max(int(n.split(".")[2]) for n in weights if n.startswith("encoder."))
    arrays = dict(weights) | {
        "one_index": np.array([1], np.int64),
        "zero_vector": np.array([0], np.int64),
        "split": np.array([0, 0, heads, hidden // heads], np.int64),
        "merge": np.array([0, 0, hidden], np.int64),
        "mask_axes": np.array([1, 2], np.int64),
        "one": np.float32(1),
        "half": np.float32(0.5),
        "lowest": np.array(np.finfo(np.float32).min),
        "root": np.float32(np.sqrt(hidden // heads)),
        "root2": np.float32(np.sqrt(2)),
    }
    n = helper.make_node
    nodes = [
        n("Shape", ["input_ids"], ["shape"]),
        n("Gather", ["shape", "one_index"], ["end"]),
        n("Slice", ["embeddings.positions", "zero_vector", "end", "zero_vector"], ["places"]),
        n("Gather", ["embeddings.words", "input_ids"], ["words"]),
        n("Add", ["words", "places"], ["embedded"]),
        n("Unsqueeze", ["attention_mask", "mask_axes"], ["mask4"]),
        n("Cast", ["mask4"], ["mask_float"], to=FLOAT),
        n("Sub", ["one", "mask_float"], ["hide"]),
        n("Mul", ["hide", "lowest"], ["additive"]),
    ]

    def norm(x: str, name: str, out: str) -> None:
        scale = [f"{name}.weight", f"{name}.bias"]
        nodes.append(n("LayerNormalization", [x, *scale], [out], axis=-1, epsilon=1e-12))

    def dense(x: str, name: str, out: str) -> None:
        nodes.append(n("MatMul", [x, f"{name}.weight"], [f"{out}.product"]))
        nodes.append(n("Add", [f"{name}.bias", f"{out}.product"], [out]))

    norm("embedded", "embeddings.norm", "x.0")
    for i in range(layers):
        at, x = f"encoder.layer.{i}", f"x.{i}"
        for part, axes in (("query", [0, 2, 1, 3]), ("key", [0, 2, 3, 1]), ("value", [0, 2, 1, 3])):
            dense(x, f"{at}.{part}", f"{at}.{part}")
            nodes.append(n("Reshape", [f"{at}.{part}", "split"], [f"{at}.{part}.split"]))
            nodes.append(n("Transpose", [f"{at}.{part}.split"], [f"{at}.{part}.heads"], perm=axes))
        nodes += [
            n("MatMul", [f"{at}.query.heads", f"{at}.key.heads"], [f"{at}.scores"]),
            n("Div", [f"{at}.scores", "root"], [f"{at}.scaled"]),
            n("Add", [f"{at}.scaled", "additive"], [f"{at}.masked"]),
            n("Softmax", [f"{at}.masked"], [f"{at}.probabilities"], axis=-1),
            n("MatMul", [f"{at}.probabilities", f"{at}.value.heads"], [f"{at}.mixed"]),
            n("Transpose", [f"{at}.mixed"], [f"{at}.back"], perm=[0, 2, 1, 3]),
            n("Reshape", [f"{at}.back", "merge"], [f"{at}.context"]),
        ]
        dense(f"{at}.context", f"{at}.attention.output", f"{at}.attended")
        nodes.append(n("Add", [f"{at}.attended", x], [f"{at}.sum"]))
        norm(f"{at}.sum", f"{at}.attention.norm", f"{at}.middle")
        dense(f"{at}.middle", f"{at}.intermediate", f"{at}.wide")
        nodes += [
            n("Div", [f"{at}.wide", "root2"], [f"{at}.wide.scaled"]),
            n("Erf", [f"{at}.wide.scaled"], [f"{at}.erf"]),
            n("Add", [f"{at}.erf", "one"], [f"{at}.erf.one"]),
            n("Mul", [f"{at}.wide", f"{at}.erf.one"], [f"{at}.twice"]),
            n("Mul", [f"{at}.twice", "half"], [f"{at}.gelu"]),
        ]
        dense(f"{at}.gelu", f"{at}.output", f"{at}.down")
        nodes.append(n("Add", [f"{at}.down", f"{at}.middle"], [f"{at}.total"]))
        norm(f"{at}.total", f"{at}.norm", "hidden" if i == layers - 1 else f"x.{i + 1}")
    shape = ["batch", "sequence"]
    inputs = [value("input_ids", shape, INT64), value("attention_mask", shape, INT64)]
    return make_model(nodes, inputs, [value("hidden", ["batch", "sequence", hidden])], arrays)


def run_module(mod, inputs: Sequence[np.ndarray]) -> list[np.ndarray]:
    """Build with TVM's default pipeline and run."""
    import tvm
    from tvm import relax

    machine = relax.VirtualMachine(tvm.compile(mod, target="llvm"), tvm.cpu())
    result = machine["main"](*[tvm.runtime.tensor(np.ascontiguousarray(a)) for a in inputs])
    return [result.numpy()] if hasattr(result, "numpy") else [r.numpy() for r in result]


def run_onnx(model: ModelProto | str, inputs: Mapping[str, np.ndarray]) -> list[np.ndarray]:
    """Run with ONNX Runtime."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 3
    data = model if isinstance(model, str) else model.SerializeToString()
    session = onnxruntime.InferenceSession(data, options, providers=["CPUExecutionProvider"])
    return session.run(None, dict(inputs))
