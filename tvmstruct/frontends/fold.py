"""Fold an ONNX graph at fixed input shapes: shape arithmetic becomes constants.

One walk in graph order. The shape of every value comes from ONNX's own inference, node by node;
a node whose inputs are all known is evaluated by ONNX's reference implementation. Weights are
never copied: they stay named inputs of what is left.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import prod

import numpy as np
from onnx import NodeProto

from tvmstruct.errors import ModelError, TvmstructError, UnsupportedOperatorError
from tvmstruct.frontends.fold_state import (
    MAX_FOLDED_BYTES,
    Folder,
    chosen_branch,
    evaluate,
    live,
    renamed,
)
from tvmstruct.frontends.nodes import attribute, describe
from tvmstruct.frontends.onnx_recurrent import check_lengths
from tvmstruct.frontends.operators import INDEXED
from tvmstruct.frontends.ranges import Range, array_range, node_range
from tvmstruct.frontends.validate import Graph

UNCHANGED_IF_SAME_SHAPE = frozenset(
    {"Reshape", "Expand", "Cast", "Squeeze", "Unsqueeze", "Tile", "Slice"}
)

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


def _same_value(state: Folder, node: NodeProto) -> str | None:
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


def _steps_forward(state: Folder, node: NodeProto) -> bool:
    if len(node.input) < 5 or not node.input[4]:
        return True
    steps = state.values.get(node.input[4])
    return steps is not None and bool((steps > 0).all())


def _check_gather(state: Folder, node: NodeProto) -> None:
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


def _track(state: Folder, node: NodeProto) -> None:
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


def _dtype_range(state: Folder, node: NodeProto) -> Range:
    info = np.iinfo(state.dtypes[node.output[0]])
    return int(info.min), int(info.max)


def _keep(state: Folder, node: NodeProto) -> None:
    if node.op_type == "LayerNormalization" and any(node.output[1:]):
        raise UnsupportedOperatorError(f"{describe(node)}: only its first output can be compiled")
    clipped = node.op_type == "GatherElements"
    checked = clipped or (node.op_type == "GatherND" and not attribute(node, "batch_dims", 0))
    if node.op_type in INDEXED and not checked and node.input[1] not in state.values:
        raise UnsupportedOperatorError(
            f"{describe(node)}: positions that are computed from the inputs cannot be checked; "
            "only constant positions can be compiled"
        )
    if node.op_type == "Gather":
        _check_gather(state, node)
    _track(state, node)
    state.kept.append(node)


def _shape_value(state: Folder, node: NodeProto) -> np.ndarray:
    shape = state.shapes[node.input[0]]
    if node.op_type == "Size":
        return np.array(prod(shape), np.int64)
    end = attribute(node, "end", len(shape))
    return np.array(shape[attribute(node, "start", 0) : end], np.int64)


def _visit(state: Folder, node: NodeProto, tables: bool) -> None:
    if node.op_type == "If":
        for inner in _decided(state, node):
            _visit(state, inner, tables)
        return
    node = renamed(state, node)
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


def _decided(state: Folder, node: NodeProto) -> list[NodeProto]:
    if (chosen := chosen_branch(state, node)) is None:
        raise UnsupportedOperatorError(
            f"{describe(node)}: its condition depends on values that are computed at run time; "
            "where an input decides it, fix that: from_onnx(..., constants={name: value})"
        )
    return chosen


def _evaluated(state: Folder, node: NodeProto, tables: bool) -> bool:
    """Compute what is known, small enough and no copy of a weight; tell whether it was."""
    if not state.known(node) or state.output_bytes(node) > MAX_FOLDED_BYTES:
        return False
    if any(i in state.weights for i in node.input) and not (
        tables and node.op_type in ("Gather", "Slice")
    ):
        return False
    if node.op_type == "Gather":
        _check_gather(state, node)
    if (arrays := evaluate(state, node)) is None:
        return False
    state.values.update(arrays)
    return True


def fold(graph: Graph, shapes: Mapping[str, Shape], tokens: Mapping[str, int]) -> Folded:
    """Return ``graph`` folded at these input shapes."""
    state = Folder(graph, tokens)
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
    nodes, used = live(state.kept, set(outputs.values()))
    used |= {s.name for s in graph.inputs}
    return Folded(
        nodes=nodes,
        shapes={n: s for n, s in state.shapes.items() if n in used},
        dtypes={n: d for n, d in state.dtypes.items() if n in used},
        constants={n: a for n, a in state.values.items() if n in used},
        aliases=outputs,
        safe_gathers=frozenset(state.safe),
    )


def try_fold(graph: Graph, shapes: Mapping[str, Shape], tokens: Mapping[str, int]) -> bool:
    """Tell whether the model accepts these shapes."""
    try:
        fold(graph, shapes, tokens)
    except TvmstructError:
        return False
    return True
