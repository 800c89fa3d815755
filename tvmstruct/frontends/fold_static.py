"""Evaluate once what does not depend on any input: constants, casts and scalings of weights."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

import numpy as np
from onnx import NodeProto

from tvmstruct.frontends.branches import reads, with_branches
from tvmstruct.frontends.fold_state import (
    MAX_FOLDED_BYTES,
    Folder,
    chosen_branch,
    evaluate,
    live,
    renamed,
)
from tvmstruct.frontends.source import new_tensor
from tvmstruct.frontends.validate import SMALL, Graph


def fold_static(graph: Graph) -> Graph:
    """Evaluate once what does not depend on any input: constants, casts and scalings of weights."""
    state = Folder(graph, {})
    uses = _count_uses(graph)
    stored = dict(graph.stored_dtypes)
    rest = _fold_nodes(state, graph.nodes, uses, stored)
    return _rebuild(state, graph, rest, stored)


def _fold_nodes(
    state: Folder, nodes: Iterable[NodeProto], uses: dict[str, int], stored: dict[str, str]
) -> list[NodeProto]:
    """Return what is left of nodes, chosen branches in the place of their ``If``."""
    rest: list[NodeProto] = []
    for node in map(lambda n: renamed(state, n), nodes):
        if node.op_type == "If":
            chosen = chosen_branch(state, node)
            if chosen is None:
                node = with_branches(node, lambda ns: _fold_nodes(state, ns, uses, stored))
            rest += [node] if chosen is None else _fold_nodes(state, chosen, uses, stored)
            continue
        if node.op_type == "Transpose" or not node.input or not state.known(node):
            rest.append(node)
            continue
        state.infer(node)
        limit = MAX_FOLDED_BYTES + sum(a.nbytes for a in state.weights.values())
        arrays = evaluate(state, node) if state.output_bytes(node) <= limit else None
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
    state: Folder,
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


def _rebuild(state: Folder, graph: Graph, rest: list[NodeProto], stored: dict[str, str]) -> Graph:
    nodes, used = live(rest, {s.name for s in graph.outputs})
    nodes = tuple(renamed(state, n) for n in nodes)
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
