"""Return a result in its other shape as a view of the kernel's memory, not as a copy.

TVM makes views of reshapes between kernels only: one that is a result of the function would be a
kernel that copies it.
"""

from __future__ import annotations

from tvm import relax

from tvmstruct import compat
from tvmstruct.rewrite import Graph, operands

VIEW = "vm.builtin.reshape"


class ViewOutputs:
    """Make views of results that are reshapes of what a kernel wrote for them alone."""

    name = "view_outputs"

    def rewrite(self, graph: Graph, call: relax.Call) -> relax.Expr | None:
        """Return the view, or None for any other call."""
        if compat.op_name(call) != "relax.reshape" or not graph.single(call.args[0]):
            return None
        if not _fresh(graph, call.args[0]) or not _is_result(graph, call):
            return None
        return relax.op.call_pure_packed(VIEW, *call.args, ty_args=[call.ty])


def _fresh(graph: Graph, x: relax.Expr) -> bool:
    """Return whether ``x`` is memory that a kernel was given to write to, named once."""
    value = graph.value(x)
    if isinstance(value, relax.TupleGetItem):
        same = (
            other
            for other in map(graph.value, graph.bound)
            if isinstance(other, relax.TupleGetItem)
            and other.index == value.index
            and other.tuple_value.same_as(value.tuple_value)
        )
        return sum(1 for _ in same) == 1 and _fresh(graph, value.tuple_value)
    return compat.op_name(value) in ("relax.call_dps_packed", "relax.call_tir")


def _is_result(graph: Graph, call: relax.Call) -> bool:
    """Return whether nothing inside the function but a tuple of results reads a call's value."""
    values = (v for v in graph.bound.values() if not isinstance(v, relax.Tuple))
    read = {var for value in values for var in operands(value)}
    return not any(value.same_as(call) and var in read for var, value in graph.bound.items())
