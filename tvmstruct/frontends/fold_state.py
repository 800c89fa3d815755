"""What is known of the values of an ONNX graph while it is folded: shapes, constants, weights."""

from __future__ import annotations

from collections.abc import Mapping
from math import prod

import numpy as np
from onnx import NodeProto, TypeProto, defs, helper, numpy_helper, shape_inference
from onnx.reference import ReferenceEvaluator

from tvmstruct.errors import ModelError
from tvmstruct.frontends.branches import branches, reads, rename
from tvmstruct.frontends.nodes import describe
from tvmstruct.frontends.onnx_recurrent import KINDS, infer_layer
from tvmstruct.frontends.ranges import Range
from tvmstruct.frontends.source import tensor_view
from tvmstruct.frontends.validate import Graph

MAX_FOLDED_BYTES = 1 << 26  # larger constants are computed at run time
MAX_VALUE_BYTES = 1 << 38
UNEVALUATED = frozenset({"Einsum", "Conv", "AveragePool", "MaxPool", "MatMulInteger", *KINDS})
INFERENCE_SIZE = 1024  # ONNX inference reads the contents of small integer arrays only

Shape = tuple[int, ...]


class Folder:
    """State of one walk: what is known about each value so far."""

    def __init__(self, graph: Graph, tokens: Mapping[str, int]) -> None:
        self.graph = graph
        self.schemas: dict[str, defs.OpSchema] = {}
        self.values = dict(graph.constants)
        self.shapes: dict[str, Shape] = {n: a.shape for n, a in self.values.items()}
        self.dtypes: dict[str, np.dtype] = {n: a.dtype for n, a in self.values.items()}
        self.aliases: dict[str, str] = {}
        self.ranges: dict[str, Range | None] = {}
        self.counted: set[str] = set()
        self.kept: list[NodeProto] = []
        self.safe: set[str] = set()
        self.weights = {n: tensor_view(t) for n, t in graph.tensors.items()}
        self.originals = dict(self.weights)
        for name, array in self.weights.items():
            self.shapes[name], self.dtypes[name] = array.shape, array.dtype
        for name, rows in tokens.items():
            self.ranges[name] = (0, rows - 1)

    def array(self, name: str) -> np.ndarray | None:
        """Return the array of a constant or weight."""
        value = self.values.get(name)
        return self.weights.get(name) if value is None else value

    def known(self, node: NodeProto) -> bool:
        """Tell whether every input of ``node`` is a constant or a weight."""
        return all(i in self.values or i in self.weights for i in node.input if i)

    def infer(self, node: NodeProto) -> None:
        """Find dtype and static shape of every output."""
        if (layer := self.graph.layers.get(node.name)) is not None:
            found = infer_layer(node, layer, self.shapes, self.dtypes)
            for name, (shape, dtype) in found.items():
                self.shapes[name], self.dtypes[name] = shape, dtype
            return
        for name, proto in infer_types(self, node).items():
            tensor = proto.tensor_type
            dims = [d.dim_value if d.HasField("dim_value") else -1 for d in tensor.shape.dim]
            if not tensor.HasField("shape") or min(dims, default=0) < 0:
                raise ModelError(
                    f"{describe(node)}: the shape of {name!r} depends on the data, not only on "
                    "the input shapes; such models cannot be compiled"
                )
            dtype = np.dtype(helper.tensor_dtype_to_np_dtype(tensor.elem_type))
            if prod(dims) * dtype.itemsize > MAX_VALUE_BYTES:
                raise ModelError(f"{describe(node)}: {name!r} of shape {dims} is absurdly large")
            self.shapes[name], self.dtypes[name] = tuple(dims), dtype

    def output_bytes(self, node: NodeProto) -> int:
        """Return the size of all outputs together."""
        return sum(prod(self.shapes[o]) * self.dtypes[o].itemsize for o in node.output if o)


def infer_types(state: Folder, node: NodeProto) -> dict[str, TypeProto]:
    names = [i for i in node.input if i]
    types = {
        n: helper.make_tensor_type_proto(
            helper.np_dtype_to_tensor_dtype(state.dtypes[n]), state.shapes[n]
        )
        for n in names
    }
    data = {
        n: numpy_helper.from_array(np.asarray(state.values[n]))
        for n in names
        if n in state.values and state.values[n].size <= INFERENCE_SIZE
    }
    schema = state.schemas.get(node.op_type)
    try:
        if schema is None:
            schema = defs.get_schema(node.op_type, state.graph.opset, "")
            state.schemas[node.op_type] = schema
        opsets = [helper.make_opsetid("", state.graph.opset)]
        found = shape_inference.infer_node_outputs(schema, node, types, data, None, opsets)
    except Exception as error:
        shapes = ", ".join(f"{n} {state.dtypes[n]}{list(state.shapes[n])}" for n in names)
        raise ModelError(
            f"{describe(node)} does not accept its inputs ({shapes}): {str(error).strip()[:300]}"
        ) from error
    missing = [o for o in node.output if o and o not in found]
    if missing:
        raise ModelError(f"{describe(node)}: no shape can be inferred for {missing}")
    return {o: found[o] for o in node.output if o}


def evaluate(state: Folder, node: NodeProto) -> dict[str, np.ndarray] | None:
    """Run ``node`` on known arrays; None where the reference implementation disagrees or fails."""
    feeds = {i: state.array(i) for i in node.input if i}
    if node.op_type in UNEVALUATED or (node.op_type == "Div" and _divides_negative(feeds)):
        return None
    try:
        with np.errstate(all="ignore"):
            results = ReferenceEvaluator(node, opsets={"": state.graph.opset}).run(None, feeds)
    except Exception:  # not an error of the model: the node then runs in the compiled module
        return None
    arrays = dict(zip([o for o in node.output if o], map(np.asarray, results), strict=False))
    for name, array in arrays.items():
        if array.shape != state.shapes[name] or array.dtype != state.dtypes[name]:
            return None
    return arrays


def _divides_negative(feeds: Mapping[str, np.ndarray | None]) -> bool:
    """ONNX division truncates, the reference implementation rounds down."""
    return any(
        a is None or (a.dtype.kind in "iu" and (a.min(initial=0) < 0 or not a.all()))
        for a in feeds.values()
    )


def renamed(state: Folder, node: NodeProto) -> NodeProto:
    if not any(i in state.aliases for i in reads(node)):
        return node
    return rename(node, lambda name: state.aliases.get(name, name))


def live(nodes: list[NodeProto], used: set[str]) -> tuple[tuple[NodeProto, ...], set[str]]:
    kept: list[NodeProto] = []
    used = set(used)
    for node in reversed(nodes):
        if used.intersection(node.output):
            used.update(reads(node))
            kept.append(node)
    return tuple(reversed(kept)), used


def chosen_branch(state: Folder, node: NodeProto) -> list[NodeProto] | None:
    """Return the nodes of the branch that an ``If`` takes; None where that is not known."""
    condition = state.values.get(state.aliases.get(node.input[0], node.input[0]))
    if condition is None:
        return None
    if condition.size != 1:
        raise ModelError(f"{describe(node)}: its condition has {condition.size} values, not one")
    branch = branches(node)[0 if condition.reshape(-1)[0] else 1]
    ends = zip(branch.output, node.output, strict=True)
    return [
        *branch.node,
        *(helper.make_node("Identity", [a.name], [b], name=f"{b}#if") for a, b in ends if b),
    ]
