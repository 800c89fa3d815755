"""What frontends ask of ONNX nodes: copies with names of their own, attributes, a description."""

from __future__ import annotations

from collections.abc import Iterable

from onnx import AttributeProto, NodeProto

from tvmstruct.frontends.branches import with_branches


def own_nodes(nodes: Iterable[NodeProto], taken: set[str] | None = None) -> tuple[NodeProto, ...]:
    """Copy nodes, so that the message with its weights can be freed, and make names unique."""
    copies, taken = [], set() if taken is None else taken
    for index, node in enumerate(nodes):
        copy = NodeProto()
        copy.CopyFrom(node)
        copy.domain = ""
        name = node.name or f"{node.op_type}_{index}"
        copy.name = name if name not in taken else f"{name}#{len(taken)}"
        taken.add(copy.name)
        if copy.op_type == "If":
            copy = with_branches(copy, lambda inner: own_nodes(inner, taken))
        copies.append(copy)
    return tuple(copies)


def attribute(node: NodeProto, name: str, default: int) -> int:
    """Return an integer attribute of a node."""
    for item in node.attribute:
        if item.name == name and item.type == AttributeProto.INT:
            return item.i
    return default


def describe(node: NodeProto) -> str:
    """Return operator and node name for messages."""
    return f"{node.op_type} (node {node.name or '-> ' + ', '.join(node.output)!r})"


def text_attribute(node: NodeProto, name: str, default: str) -> str:
    """Return a string attribute of a node."""
    for item in node.attribute:
        if item.name == name and item.type == AttributeProto.STRING:
            return item.s.decode("utf-8", "replace")
    return default
