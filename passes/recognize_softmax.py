"""Put a softmax back together where a graph spells it out."""

from __future__ import annotations

from tvm import relax

from tvmstruct import compat
from tvmstruct.rewrite import Graph


class RecognizeSoftmax:
    """Replace ``exp(x - max(x)) / sum(exp(x - max(x)))`` over one axis."""

    name = "recognize_softmax"

    def rewrite(self, graph: Graph, call: relax.Call) -> relax.Expr | None:
        """Return ``nn.softmax``, or None where the quotient is none.

        Without the maximum subtracted it is no softmax for large x: exp overflows.
        """
        if compat.op_name(call) != "relax.divide":
            return None
        weights, total = call.args
        axis = _reduces(graph, total, "relax.sum", weights)
        exp = graph.call(weights, "relax.exp")
        shifted = graph.call(exp.args[0], "relax.subtract") if exp is not None else None
        if axis is None or shifted is None:
            return None
        x, top = shifted.args
        if _reduces(graph, top, "relax.max", x) != axis:
            return None
        return relax.op.nn.softmax(x, axis)


def _reduces(graph: Graph, expr: relax.Expr, name: str, of: relax.Expr) -> int | None:
    """Return the one axis over which ``expr`` reduces ``of``, kept with length one, or None."""
    call, shape = graph.call(expr, name), compat.static_shape(of)
    if call is None or shape is None or not call.attrs.keepdims:
        return None
    axes = [int(a) % len(shape) for a in call.attrs.axis or ()]
    return axes[0] if len(axes) == 1 and call.args[0].same_as(of) else None
