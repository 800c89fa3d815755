"""What passes share that read weights in factors: names of the factors, and crops at the end."""

from __future__ import annotations

from tvm import relax

from tvmstruct import compat
from tvmstruct.rewrite import Graph


def is_cropped(graph: Graph, call: relax.Call) -> bool:
    """Return whether a chain goes on after ``call`` with a slice of its features."""
    slices = (v for v in graph.bound.values() if cropped_width(v))
    return any(graph.value(v.args[0]).same_as(call) for v in slices)


def cropped_width(call: relax.Call) -> int:
    """Return how many features of the last axis a slice keeps from its start, or 0."""
    if compat.op_name(call) != "relax.strided_slice":
        return 0
    after, source = compat.static_shape(call), compat.static_shape(call.args[0])
    if after is None or source is None or after[:-1] != source[:-1]:
        return 0
    axes, begin, _, *strides = ([int(v) for v in arg.fields] for arg in call.args[1:])
    if axes not in ([len(source) - 1], [-1]) or begin != [0] or strides not in ([], [[1]]):
        return 0
    return after[-1]


def common_name(*names: str) -> str:
    """Return what names share up to their last dot, as ``query.weight`` of its factors, or all."""
    stems = {name.rpartition(".")[0] for name in names}
    return stems.pop() if len(stems) == 1 and stems != {""} else "+".join(names)
