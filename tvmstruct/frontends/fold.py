"""Fold an ONNX graph at fixed input shapes: shape arithmetic becomes constants.

One walk in graph order. The shape of every value comes from ONNX's own inference, node by node;
a node whose inputs are all known is evaluated by ONNX's reference implementation. Weights are
never copied: they stay named inputs of what is left.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from math import prod

import numpy as np
from onnx import NodeProto, TypeProto, defs, helper, numpy_helper, shape_inference
from onnx.reference import ReferenceEvaluator

from tvmstruct.errors import ModelError, TvmstructError, UnsupportedOperatorError
from tvmstruct.frontends.branches import branches, reads, rename, with_branches
from tvmstruct.frontends.nodes import attribute, describe
from tvmstruct.frontends.onnx_recurrent import KINDS, check_lengths, infer_layer
from tvmstruct.frontends.operators import INDEXED
from tvmstruct.frontends.ranges import Range, array_range, node_range
from tvmstruct.frontends.source import new_tensor, tensor_view
from tvmstruct.frontends.validate import SMALL, Graph

MAX_FOLDED_BYTES = 1 << 26  # larger constants are computed at run time
MAX_VALUE_BYTES = 1 << 38
UNCHANGED_IF_SAME_SHAPE = frozenset(
    {"Reshape", "Expand", "Cast", "Squeeze", "Unsqueeze", "Tile", "Slice"}
)
UNEVALUATED = frozenset({"Einsum", "Conv", "AveragePool", "MaxPool", "MatMulInteger", *KINDS})
INFERENCE_SIZE = 1024  # ONNX inference reads the contents of small integer arrays only

Shape = tuple[int, ...]


@dataclass(frozen=True, eq=False)
class Folded:
    """What is left of a graph at fixed shapes; ``aliases`` maps each output to its value."""

    nodes: tuple[NodeProto, ...]
    shapes: dict[str, Shape]
    dtypes: dict[str, np.dtype]
    constants: dict[str, np.ndarray]
    aliases: dict[str, str]
    safe_gathers: frozenset[str]


class _Folder:
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
        for name, proto in _infer_types(self, node).items():
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


def _infer_types(state: _Folder, node: NodeProto) -> dict[str, TypeProto]:
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


def _evaluate(state: _Folder, node: NodeProto) -> dict[str, np.ndarray] | None:
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


def _rename(state: _Folder, node: NodeProto) -> NodeProto:
    if not any(i in state.aliases for i in reads(node)):
        return node
    return rename(node, lambda name: state.aliases.get(name, name))


def _same_value(state: _Folder, node: NodeProto) -> str | None:
    """Return the input that ``node`` passes on unchanged at these shapes."""
    source, result = node.input[0] if node.input else "", node.output[0]
    if node.op_type == "Where":
        condition = state.values.get(node.input[0])
        if condition is None or condition.size == 0 or condition.min() != condition.max():
            return None
        source = node.input[1 if condition.min() else 2]
    elif node.op_type in ("Dropout", "Identity"):
        training = len(node.input) > 2 and node.input[2]
        return None if training or any(node.output[1:]) else source
    elif node.op_type == "Slice" and not _steps_forward(state, node):
        return None
    elif node.op_type not in UNCHANGED_IF_SAME_SHAPE:
        return None
    same = state.shapes[source] == state.shapes[result]
    return source if same and state.dtypes[source] == state.dtypes[result] else None


def _steps_forward(state: _Folder, node: NodeProto) -> bool:
    if len(node.input) < 5 or not node.input[4]:
        return True
    steps = state.values.get(node.input[4])
    return steps is not None and bool((steps > 0).all())


def _check_gather(state: _Folder, node: NodeProto) -> None:
    """Prove the index of a lookup in range, or leave it to be clipped at run time."""
    data, index = node.input[0], node.input[1]
    shape = state.shapes[data]
    axis = attribute(node, "axis", 0)
    rows = shape[axis] if -len(shape) <= axis < len(shape) else 0
    found = state.ranges.get(index)
    constant = state.values.get(index)
    if constant is not None and constant.size:
        found = array_range(constant)
        if found and (found[0] < -rows or found[1] >= rows):
            raise ModelError(f"{describe(node)}: index {found} outside a table of {rows} rows")
    if found is None:
        return
    if index in state.counted and found[1] >= rows:
        raise ModelError(
            f"{describe(node)}: a counted position can reach {found[1]} but the table "
            f"{data!r} has {rows} rows; use shorter inputs"
        )
    if found[0] >= 0 and found[1] < rows:
        state.safe.add(node.output[0])


def _track(state: _Folder, node: NodeProto) -> None:
    """Record bounds of the outputs of a node that stays."""
    inputs = [i for i in node.input if i]
    for name in inputs:
        if name not in state.ranges and name in state.values:
            state.ranges[name] = array_range(state.values[name])
    found = node_range(node, [state.ranges.get(i) for i in inputs], state.shapes)
    if found is not None and state.dtypes[node.output[0]].kind in "iub":
        limits = (0, 1) if state.dtypes[node.output[0]].kind == "b" else _dtype_range(state, node)
        if limits[0] <= found[0] and found[1] <= limits[1]:
            state.ranges.update(dict.fromkeys(node.output, found))
    if node.op_type == "CumSum" or any(i in state.counted for i in inputs):
        state.counted.update(node.output)


def _dtype_range(state: _Folder, node: NodeProto) -> Range:
    info = np.iinfo(state.dtypes[node.output[0]])
    return int(info.min), int(info.max)


def _keep(state: _Folder, node: NodeProto) -> None:
    if node.op_type == "LayerNormalization" and any(node.output[1:]):
        raise UnsupportedOperatorError(f"{describe(node)}: only its first output can be compiled")
    checked = node.op_type == "GatherND" and not attribute(node, "batch_dims", 0)  # by clipping
    if node.op_type in INDEXED and not checked and node.input[1] not in state.values:
        raise UnsupportedOperatorError(
            f"{describe(node)}: positions that are computed from the inputs cannot be checked; "
            "only constant positions can be compiled"
        )
    if node.op_type == "Gather":
        _check_gather(state, node)
    _track(state, node)
    state.kept.append(node)


def _shape_value(state: _Folder, node: NodeProto) -> np.ndarray:
    shape = state.shapes[node.input[0]]
    if node.op_type == "Size":
        return np.array(prod(shape), np.int64)
    end = attribute(node, "end", len(shape))
    return np.array(shape[attribute(node, "start", 0) : end], np.int64)


def _chosen(state: _Folder, node: NodeProto) -> list[NodeProto] | None:
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


def _visit(state: _Folder, node: NodeProto, tables: bool) -> None:
    if node.op_type == "If":
        for inner in _decided(state, node):
            _visit(state, inner, tables)
        return
    node = _rename(state, node)
    state.infer(node)
    if (layer := state.graph.layers.get(node.name)) is not None:
        lengths = state.values.get(node.input[1])
        check_lengths(node, layer, lengths, state.shapes[node.input[0]])
        state.kept.append(node)
        return
    if node.op_type in ("Shape", "Size"):
        state.values[node.output[0]] = _shape_value(state, node)
    elif not _evaluated(state, node, tables):
        if (source := _same_value(state, node)) is not None:
            state.aliases[node.output[0]] = state.aliases.get(source, source)
        else:
            _keep(state, node)


def _decided(state: _Folder, node: NodeProto) -> list[NodeProto]:
    if (chosen := _chosen(state, node)) is None:
        raise UnsupportedOperatorError(
            f"{describe(node)}: its condition depends on values that are computed at run time; "
            "where an input decides it, fix that: from_onnx(..., constants={name: value})"
        )
    return chosen


def _evaluated(state: _Folder, node: NodeProto, tables: bool) -> bool:
    """Compute what is known, small enough and no copy of a weight; tell whether it was."""
    if not state.known(node) or state.output_bytes(node) > MAX_FOLDED_BYTES:
        return False
    if any(i in state.weights for i in node.input) and not (
        tables and node.op_type in ("Gather", "Slice")
    ):
        return False
    if node.op_type == "Gather":
        _check_gather(state, node)
    if (arrays := _evaluate(state, node)) is None:
        return False
    state.values.update(arrays)
    return True


def fold(graph: Graph, shapes: Mapping[str, Shape], tokens: Mapping[str, int]) -> Folded:
    """Return ``graph`` folded at these input shapes."""
    state = _Folder(graph, tokens)
    for spec in graph.inputs:
        state.shapes[spec.name], state.dtypes[spec.name] = shapes[spec.name], np.dtype(spec.dtype)
    for node in graph.nodes:
        _visit(state, node, tables=True)
    outputs = {s.name: state.aliases.get(s.name, s.name) for s in graph.outputs}
    for spec in graph.outputs:
        if state.dtypes[outputs[spec.name]] != np.dtype(spec.dtype):
            raise ModelError(
                f"output {spec.name!r} is declared {spec.dtype} but computes "
                f"{state.dtypes[outputs[spec.name]]}; the file is damaged"
            )
    nodes, used = _live(state.kept, set(outputs.values()))
    used |= {s.name for s in graph.inputs}
    return Folded(
        nodes=nodes,
        shapes={n: s for n, s in state.shapes.items() if n in used},
        dtypes={n: d for n, d in state.dtypes.items() if n in used},
        constants={n: a for n, a in state.values.items() if n in used},
        aliases=outputs,
        safe_gathers=frozenset(state.safe),
    )


def _live(nodes: list[NodeProto], used: set[str]) -> tuple[tuple[NodeProto, ...], set[str]]:
    kept: list[NodeProto] = []
    used = set(used)
    for node in reversed(nodes):
        if used.intersection(node.output):
            used.update(reads(node))
            kept.append(node)
    return tuple(reversed(kept)), used


def fold_static(graph: Graph) -> Graph:
    """Evaluate once what does not depend on any input: constants, casts and scalings of weights."""
    state = _Folder(graph, {})
    uses = _count_uses(graph)
    stored = dict(graph.stored_dtypes)
    rest = _fold_nodes(state, graph.nodes, uses, stored)
    return _rebuild(state, graph, rest, stored)


def _fold_nodes(
    state: _Folder, nodes: Iterable[NodeProto], uses: dict[str, int], stored: dict[str, str]
) -> list[NodeProto]:
    """Return what is left of nodes, chosen branches in the place of their ``If``."""
    rest: list[NodeProto] = []
    for node in map(lambda n: _rename(state, n), nodes):
        if node.op_type == "If":
            chosen = _chosen(state, node)
            if chosen is None:
                node = with_branches(node, lambda ns: _fold_nodes(state, ns, uses, stored))
            rest += [node] if chosen is None else _fold_nodes(state, chosen, uses, stored)
            continue
        if node.op_type == "Transpose" or not node.input or not state.known(node):
            rest.append(node)
            continue
        state.infer(node)
        limit = MAX_FOLDED_BYTES + sum(a.nbytes for a in state.weights.values())
        arrays = _evaluate(state, node) if state.output_bytes(node) <= limit else None
        if arrays is None:
            rest.append(node)
            continue
        _absorb(state, node, arrays, uses, stored)
    return rest


def _count_uses(graph: Graph) -> dict[str, int]:
    uses: dict[str, int] = {s.name: 1 for s in graph.outputs}
    for node in graph.nodes:
        for name in reads(node):
            uses[name] = uses.get(name, 0) + 1
    return uses


def _absorb(
    state: _Folder,
    node: NodeProto,
    arrays: dict[str, np.ndarray],
    uses: dict[str, int],
    stored: dict[str, str],
) -> None:
    """Keep the result of a static node; a weight's only derivation keeps the weight's name."""
    parents = [i for i in node.input if i in state.weights]
    for output, array in arrays.items():
        if not parents or array.size <= SMALL:
            state.values[output] = array
            continue
        name = output
        if len(parents) == 1 and len(arrays) == 1 and uses.get(parents[0], 0) == 1:
            name = parents[0]
            if output in {s.name for s in state.graph.outputs}:
                name = output
        if name != output:
            state.aliases[output] = name
            uses[name] = uses.get(output, 0)
        if array.dtype != state.dtypes[parents[0]]:
            stored.setdefault(name, stored.get(parents[0], state.dtypes[parents[0]].name))
        state.weights[name] = array
        state.shapes[name], state.dtypes[name] = array.shape, array.dtype


def _rebuild(state: _Folder, graph: Graph, rest: list[NodeProto], stored: dict[str, str]) -> Graph:
    nodes, used = _live(rest, {s.name for s in graph.outputs})
    nodes = tuple(_rename(state, n) for n in nodes)
    used |= {state.aliases.get(n, n) for n in used}
    tensors = {}
    for name, array in state.weights.items():
        if name in used:
            same = state.originals.get(name) is array
            tensors[name] = graph.tensors[name] if same else new_tensor(array)
    return replace(
        graph,
        nodes=nodes,
        tensors=tensors,
        constants={n: a for n, a in state.values.items() if n in used},
        stored_dtypes={n: d for n, d in stored.items() if n in used},
    )


def try_fold(graph: Graph, shapes: Mapping[str, Shape], tokens: Mapping[str, int]) -> bool:
    """Tell whether the model accepts these shapes."""
    try:
        fold(graph, shapes, tokens)
    except TvmstructError:
        return False
    return True


__all__ = ["Folded", "describe", "fold", "fold_static", "try_fold"]
