"""Read an ONNX file defensively: every damaged or hostile model becomes a named error."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import onnx
import tvm
from google.protobuf.message import DecodeError
from onnx import AttributeProto, ModelProto, NodeProto, TensorProto, helper, numpy_helper

from tvmstruct.errors import ModelError, UnsupportedOperatorError
from tvmstruct.frontends.branches import BRANCHES, open_branches, walk
from tvmstruct.frontends.nodes import own_nodes
from tvmstruct.frontends.onnx_quantized_lstm import dequantize_layers, is_quantized
from tvmstruct.frontends.source import TensorSpec, new_tensor

if TYPE_CHECKING:
    from tvmstruct.frontends.onnx_recurrent import Layer

MIN_OPSET, MAX_OPSET = 9, 21
MAX_TENSOR_BYTES = 1 << 36  # 64 GiB: larger declared shapes are damage or an attack
MAX_NODES = 1 << 20
SMALL = 16  # float arrays up to this many elements are constants, not weights
SMALL_INDEX_BYTES = 1 << 20  # integer arrays up to this size are constants (positions, shapes)

DTYPES = frozenset(
    {"float16", "bfloat16", "float32", "float64", "bool"}
    | {f"{sign}int{bits}" for sign in ("", "u") for bits in (8, 16, 32, 64)}
)


@dataclass(frozen=True, eq=False)
class Graph:
    """A checked ONNX graph: weights and constants taken out of the protobuf message."""

    nodes: tuple[NodeProto, ...]
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    tensors: dict[str, tvm.runtime.Tensor]
    constants: dict[str, np.ndarray]
    opset: int
    stored_dtypes: dict[str, str]
    name: str
    layers: dict[str, Layer] = field(default_factory=dict)  # by name of their node
    scales: dict[str, np.ndarray] = field(default_factory=dict)  # of weights that were integers


def read_model(model: str | Path | bytes | ModelProto) -> tuple[ModelProto, Path | None]:
    """Return the parsed model and the folder of its external data, if it came from a file."""
    if isinstance(model, ModelProto):
        return model, None
    if isinstance(model, bytes | bytearray | memoryview):
        return _parse(bytes(model), "the given bytes"), None
    path = Path(model)
    try:
        data = path.read_bytes()
    except OSError as error:
        raise ModelError(f"{path}: cannot be read ({error.strerror}); check the path") from error
    return _parse(data, str(path)), path.resolve().parent


def _parse(data: bytes, where: str) -> ModelProto:
    model = ModelProto()
    try:
        model.ParseFromString(data)
    except (DecodeError, ValueError, RuntimeError) as error:
        raise ModelError(
            f"{where}: {len(data)} bytes are not an ONNX model ({error}); "
            "the file is truncated or damaged, fetch it again"
        ) from error
    return model


def check_model(model: ModelProto, folder: Path | None) -> Graph:
    """Check ``model`` and take its arrays out of the message."""
    opset = _check_header(model)
    if model.functions:
        model = _inline_functions(model)
    _check_names(model.graph)
    _check_operators(model.graph)
    graph = open_branches(model).graph
    arrays = _read_arrays(graph, folder)
    inputs = tuple(_input_specs(graph, arrays))
    outputs = tuple(_output_spec(v) for v in graph.output)
    nodes = own_nodes(n for n in graph.node if n.op_type != "Constant")
    nodes, arrays, stored, scales = dequantize_layers(nodes, arrays)
    _check_structure(nodes, inputs, outputs, arrays, opset)
    weights = {k: a for k, a in arrays.items() if _is_weight(a)}
    return Graph(
        nodes=nodes,
        inputs=inputs,
        outputs=outputs,
        tensors={k: new_tensor(a) for k, a in weights.items()},
        constants={k: a.copy() for k, a in arrays.items() if k not in weights},
        opset=opset,
        stored_dtypes={k: d for k, d in stored.items() if k in weights},
        name=graph.name or "model",
        scales=scales,
    )


def _is_weight(array: np.ndarray) -> bool:
    if array.dtype in (np.int64, np.int32, np.bool_):
        return array.nbytes > SMALL_INDEX_BYTES
    return array.size > SMALL


def _check_header(model: ModelProto) -> int:
    if not model.HasField("graph") or not model.graph.output:
        raise ModelError("the model has no graph with outputs: the file is truncated or not ONNX")
    versions = {o.domain or "ai.onnx": o.version for o in model.opset_import}
    opset = versions.get("ai.onnx")
    if opset is None:
        raise ModelError("the model names no ai.onnx opset; export it again with opset 17")
    if not MIN_OPSET <= opset <= MAX_OPSET:
        raise ModelError(
            f"opset {opset} is outside {MIN_OPSET} to {MAX_OPSET}; export again with opset 17, or "
            "convert it with onnx.version_converter.convert_version(model, 17)"
        )
    if len(model.graph.node) > MAX_NODES:
        raise ModelError(f"{len(model.graph.node)} nodes are more than the limit of {MAX_NODES}")
    return opset


def _inline_functions(model: ModelProto) -> ModelProto:
    from onnx import inliner

    try:
        return inliner.inline_local_functions(model)
    except Exception as error:
        raise ModelError(f"the model's local functions cannot be inlined: {error}") from error


def _check_names(graph: onnx.GraphProto) -> None:
    texts = [graph.name, *(t.name for t in graph.initializer), *(v.name for v in graph.input)]
    texts += [v.name for v in graph.output]
    inner = list(walk(graph.node))
    texts += [t for n in inner for t in (n.name, n.op_type, n.domain, *n.input, *n.output)]
    broken = [t for t in texts if isinstance(t, bytes)]  # what protobuf gives for invalid UTF-8
    if broken:
        raise ModelError(f"names are not valid UTF-8: {broken[:5]}; the file is damaged")
    defined = [t.name for t in graph.initializer]
    defined += [v.name for v in graph.input if v.name not in set(defined)]
    defined += [o for n in graph.node for o in n.output if o]
    twice = [name for name, count in Counter(defined).items() if count > 1]
    if twice:
        raise ModelError(f"names defined more than once: {twice[:5]}; every value needs one name")
    if "" in defined:
        raise ModelError("an input or initialiser has an empty name; the file is damaged")
    outputs = [v.name for v in graph.output]
    if len(set(outputs)) != len(outputs):
        raise ModelError(f"output names {outputs} repeat; every output needs its own name")
    if graph.sparse_initializer:
        raise ModelError("sparse initialisers are not supported; store the weights densely")


def _check_operators(graph: onnx.GraphProto) -> None:
    from tvmstruct.frontends.operators import SUPPORTED

    bad = [
        f"{n.domain or 'ai.onnx'}::{n.op_type} (node {n.name or '-> ' + ', '.join(n.output)!r})"
        for n in walk(graph.node)
        if (n.domain not in ("", "ai.onnx") or n.op_type not in SUPPORTED) and not is_quantized(n)
    ]
    if bad:
        more = f" and {len(bad) - 20} more" if len(bad) > 20 else ""
        raise UnsupportedOperatorError(
            f"operators that cannot be compiled: {'; '.join(bad[:20])}{more}. Export the model "
            "without them (decomposed into plain ai.onnx operators, no loops)"
        )
    for node in walk(graph.node):
        for item in node.attribute:
            _check_attribute(node, item)


def _check_attribute(node: NodeProto, item: AttributeProto) -> None:
    graph = item.type == AttributeProto.GRAPH and item.name in BRANCHES and node.op_type == "If"
    if (item.type in (AttributeProto.GRAPH, AttributeProto.GRAPHS) and not graph) or (
        item.ref_attr_name
    ):
        raise ModelError(f"node {node.name!r}: attribute {item.name!r} holds a graph; damaged file")
    if node.op_type != "Constant" and item.t.data_location == TensorProto.EXTERNAL:
        raise ModelError(
            f"node {node.name!r}: attribute {item.name!r} is stored in another file; only "
            "initialisers may be"
        )


def _read_arrays(graph: onnx.GraphProto, folder: Path | None) -> dict[str, np.ndarray]:
    arrays = {t.name: read_tensor(t, t.name, folder) for t in graph.initializer}
    for node in graph.node:
        if node.op_type == "Constant":
            if len(node.output) != 1 or not node.output[0] or len(node.attribute) != 1:
                raise ModelError(f"Constant node {node.name!r} needs one output and one value")
            arrays[node.output[0]] = _constant_value(node, folder)
    return arrays


def _constant_value(node: NodeProto, folder: Path | None) -> np.ndarray:
    attribute = node.attribute[0]
    kinds = {"value_float": np.float32, "value_floats": np.float32}
    kinds |= {"value_int": np.int64, "value_ints": np.int64}
    if attribute.name == "value" and attribute.HasField("t"):
        return read_tensor(attribute.t, node.output[0], folder)
    if attribute.name not in kinds:
        raise ModelError(f"Constant node {node.name!r}: attribute {attribute.name!r} is no tensor")
    return np.array(helper.get_attribute_value(attribute), dtype=kinds[attribute.name])


def read_tensor(tensor: TensorProto, name: str, folder: Path | None) -> np.ndarray:
    """Return the array of a TensorProto after checking dtype, dims and byte length."""
    dtype = numpy_dtype(tensor.data_type, name)
    shape = tuple(tensor.dims)
    size = _checked_bytes(name, shape, dtype)
    if tensor.data_location == TensorProto.EXTERNAL:
        return _read_external(tensor, name, folder, size).view(dtype).reshape(shape)
    if tensor.HasField("raw_data"):
        if len(tensor.raw_data) != size:
            raise ModelError(
                f"initialiser {name!r}: {len(tensor.raw_data)} bytes of data do not fit shape "
                f"{shape} of {dtype}, which needs {size}; the file is damaged"
            )
        return np.frombuffer(tensor.raw_data, dtype=dtype).reshape(shape)
    try:
        return np.asarray(numpy_helper.to_array(tensor), dtype=dtype).reshape(shape)
    except Exception as error:
        raise ModelError(
            f"initialiser {name!r}: its data do not fit shape {shape} of {dtype}: {error}"
        ) from error


def numpy_dtype(elem_type: int, name: str) -> np.dtype:
    """Return the numpy dtype of an ONNX element type that tvmstruct can hold."""
    try:
        dtype = np.dtype(helper.tensor_dtype_to_np_dtype(elem_type))
    except (KeyError, ValueError, TypeError) as error:
        raise ModelError(f"{name!r}: unknown ONNX element type {elem_type}") from error
    if dtype.name not in DTYPES:
        raise ModelError(f"{name!r}: dtype {dtype.name} is not supported; known: {sorted(DTYPES)}")
    return dtype


def _checked_bytes(name: str, shape: tuple[int, ...], dtype: np.dtype) -> int:
    size = prod(shape) * dtype.itemsize
    if any(d < 0 for d in shape) or len(shape) > 32 or size > MAX_TENSOR_BYTES:
        raise ModelError(
            f"{name!r}: shape {shape} of {dtype.name} is not possible (negative, rank over 32, or "
            f"over {MAX_TENSOR_BYTES} bytes); the file is damaged"
        )
    return size


def _read_external(tensor: TensorProto, name: str, folder: Path | None, size: int) -> np.ndarray:
    if folder is None:
        raise ModelError(
            f"initialiser {name!r} is stored in another file; pass the path of the .onnx file "
            "instead of its bytes or message"
        )
    info = {e.key: e.value for e in tensor.external_data}
    path = (folder / info.get("location", "")).resolve()
    if not path.is_relative_to(folder) or not path.is_file():
        raise ModelError(
            f"initialiser {name!r}: external file {info.get('location')!r} is missing or outside "
            f"the model's folder; put it beside the .onnx file"
        )
    try:
        offset, length = int(info.get("offset", 0)), int(info.get("length", size))
    except ValueError as error:
        raise ModelError(f"initialiser {name!r}: bad external offset or length: {error}") from error
    if length != size or offset < 0 or offset + length > path.stat().st_size:
        raise ModelError(
            f"initialiser {name!r}: {length} bytes at offset {offset} of {path.name} "
            f"({path.stat().st_size} bytes) do not hold the {size} bytes of its shape"
        )
    if size == 0:
        return np.empty(0, np.uint8)
    return np.memmap(path, dtype=np.uint8, mode="r", offset=offset, shape=(size,))


def _value_spec(value: onnx.ValueInfoProto) -> tuple[str, list[int | str | None] | None]:
    if value.type.WhichOneof("value") != "tensor_type":
        raise ModelError(f"{value.name!r} is not a tensor; sequences and maps are not supported")
    tensor = value.type.tensor_type
    dtype = numpy_dtype(tensor.elem_type, value.name).name
    if not tensor.HasField("shape"):
        return dtype, None
    dims: list[int | str | None] = []
    for dim in tensor.shape.dim:
        dims.append(dim.dim_value if dim.dim_value > 0 else dim.dim_param or None)
    fixed = tuple(d for d in dims if isinstance(d, int))
    _checked_bytes(value.name, fixed, np.dtype("uint8"))
    return dtype, dims


def _input_specs(graph: onnx.GraphProto, arrays: dict[str, np.ndarray]) -> Iterator[TensorSpec]:
    for value in graph.input:
        if value.name in arrays:
            continue
        dtype, dims = _value_spec(value)
        if dims is None:
            raise ModelError(f"input {value.name!r} has no rank; export it with a shape")
        shape = tuple(f"{value.name}_{i}" if d is None else d for i, d in enumerate(dims))
        yield TensorSpec(value.name, dtype, shape)


def _output_spec(value: onnx.ValueInfoProto) -> TensorSpec:
    dtype, dims = _value_spec(value)
    return TensorSpec(value.name, dtype, tuple(dims or ()))


def _check_structure(
    nodes: Iterable[NodeProto],
    inputs: Iterable[TensorSpec],
    outputs: Iterable[TensorSpec],
    arrays: dict[str, np.ndarray],
    opset: int,
) -> None:
    """Check order, names and attributes, with every array replaced by a typed stub."""
    values = [_stub(s.name, np.dtype(s.dtype), s.shape) for s in inputs]
    values += [_stub(name, a.dtype, a.shape) for name, a in arrays.items()]
    outs = [_stub(s.name, np.dtype(s.dtype), ()) for s in outputs]
    available = {v.name for v in values} | {o for n in nodes for o in n.output}
    missing = [s.name for s in outputs if s.name not in available]
    if missing:
        raise ModelError(f"outputs {missing} are computed by no node; the file is damaged")
    graph = helper.make_graph(list(nodes), "stub", values, outs)
    stub = helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=8)
    try:
        onnx.checker.check_model(stub)
    except Exception as error:
        raise ModelError(f"the model is not valid ONNX: {str(error).strip()[:500]}") from error


def _stub(name: str, dtype: np.dtype, shape: tuple[int | str | None, ...]) -> onnx.ValueInfoProto:
    return helper.make_tensor_value_info(name, helper.np_dtype_to_tensor_dtype(dtype), shape)
