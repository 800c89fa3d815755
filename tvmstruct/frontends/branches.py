"""ONNX ``If`` nodes: branches whose names are unique and whose constants lie outside.

A branch is chosen while the graph is folded, once its condition is known from constants or from
the shapes of the inputs; until then it is a list of nodes like any other.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator

from onnx import AttributeProto, GraphProto, ModelProto, NodeProto

from tvmstruct.errors import ModelError

BRANCHES = ("then_branch", "else_branch")
DEEPEST = 32  # nesting of branches that is read


def branches(node: NodeProto) -> tuple[GraphProto, GraphProto]:
    """Return what an ``If`` node does where its condition is true, and where it is false."""
    found = {a.name: a.g for a in node.attribute if a.type == AttributeProto.GRAPH}
    missing = [name for name in BRANCHES if name not in found]
    if missing or len(node.input) != 1:
        raise ModelError(f"If node {node.name!r} needs one condition, then_branch and else_branch")
    for name in BRANCHES:
        if len(found[name].output) != len(node.output) or found[name].input:
            raise ModelError(
                f"If node {node.name!r}: {name} must take no inputs and yield "
                f"{len(node.output)} outputs"
            )
    return found[BRANCHES[0]], found[BRANCHES[1]]


def walk(nodes: Iterable[NodeProto], depth: int = DEEPEST) -> Iterator[NodeProto]:
    """Yield the nodes, and those of their branches before the node that holds them."""
    for node in nodes:
        if node.op_type == "If" and node.domain in ("", "ai.onnx"):
            if depth == 0:
                raise ModelError(f"If nodes are nested more than {DEEPEST} deep")
            for branch in branches(node):
                yield from walk(branch.node, depth - 1)
        yield node


def reads(node: NodeProto) -> list[str]:
    """Return the values that a node reads, its branches included."""
    names = list(node.input)
    if node.op_type == "If":
        for branch in branches(node):
            own = {o for n in branch.node for o in n.output}
            used = [i for n in branch.node for i in reads(n)] + [v.name for v in branch.output]
            names += [name for name in used if name not in own]
    return [name for name in names if name]


def with_branches(
    node: NodeProto, change: Callable[[Iterable[NodeProto]], Iterable[NodeProto]]
) -> NodeProto:
    """Return an ``If`` node with the nodes of both branches changed."""
    copy = NodeProto()
    copy.CopyFrom(node)
    for branch in branches(copy):
        changed = list(change(list(branch.node)))
        del branch.node[:]
        branch.node.extend(changed)
    return copy


def rename(node: NodeProto, names: Callable[[str], str]) -> NodeProto:
    """Return the node with the values that it reads renamed, in its branches too."""
    copy = NodeProto()
    copy.CopyFrom(node)
    _rename_reads(copy, names)
    return copy


def _rename_reads(node: NodeProto, names: Callable[[str], str]) -> None:
    node.input[:] = [names(name) if name else name for name in node.input]
    if node.op_type == "If":
        for branch in branches(node):
            for inner in branch.node:
                _rename_reads(inner, names)
            for value in branch.output:
                value.name = names(value.name)


def open_branches(model: ModelProto) -> ModelProto:
    """Return the model with unique names in branches, their constants beside the graph's own.

    The model itself where it has no ``If``.
    """
    if not any(n.op_type == "If" for n in model.graph.node):
        return model
    copy = ModelProto()
    copy.CopyFrom(model)
    graph = copy.graph
    sum(1 for _ in walk(graph.node))  # checks every branch before any is changed
    taken = {t.name for t in graph.initializer} | {v.name for v in graph.input}
    taken |= {o for n in graph.node for o in n.output}
    hoisted: list[NodeProto] = []
    for node in graph.node:
        _open(node, {}, taken, graph, hoisted)
    nodes = [*hoisted, *graph.node]
    own = [NodeProto() for _ in nodes]
    for target, node in zip(own, nodes, strict=True):
        target.CopyFrom(node)
    del graph.node[:]
    graph.node.extend(own)
    return copy


def _open(
    node: NodeProto,
    scope: dict[str, str],
    taken: set[str],
    graph: GraphProto,
    hoisted: list[NodeProto],
) -> None:
    node.input[:] = [scope.get(i, i) for i in node.input]
    if node.op_type != "If":
        return
    for branch in branches(node):
        inner = dict(scope)
        for tensor in branch.initializer:
            tensor.name = _unique(tensor.name, inner, taken)
            graph.initializer.append(tensor)
        del branch.initializer[:]
        kept: list[NodeProto] = []
        for child in branch.node:
            _open(child, inner, taken, graph, hoisted)
            child.output[:] = [_unique(o, inner, taken) if o else o for o in child.output]
            copy = NodeProto()
            copy.CopyFrom(child)
            (hoisted if child.op_type == "Constant" else kept).append(copy)
        del branch.node[:]
        branch.node.extend(kept)
        for value in branch.output:
            value.name = inner.get(value.name, value.name)


def _unique(name: str, scope: dict[str, str], taken: set[str]) -> str:
    """Return a name that nothing else has, and let the scope know it by its own."""
    found, count = name, 1
    while found in taken:
        found = f"{name}#{count}"
        count += 1
    taken.add(found)
    scope[name] = found
    return found
