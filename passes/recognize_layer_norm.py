"""Put layer normalisation back together where a graph spells it out, as ONNX before opset 17."""

from __future__ import annotations

import numpy as np
from tvm import relax

from tvmstruct import compat
from tvmstruct.rewrite import Graph

R = relax.op


class RecognizeLayerNorm:
    """Replace ``(x - mean) / sqrt(mean((x - mean)^2) + epsilon) * gamma + beta``."""

    name = "recognize_layer_norm"

    def rewrite(self, graph: Graph, call: relax.Call) -> relax.Expr | None:
        """Return ``nn.layer_norm``, or None where the add is the end of no normalisation."""
        if compat.op_name(call) != "relax.add":
            return None
        for scaled, beta in (call.args, tuple(reversed(call.args))):
            product = graph.call(scaled, "relax.multiply")
            if product is None or not _is_row(graph, beta, call):
                continue
            for normed, gamma in (product.args, tuple(reversed(product.args))):
                found = _normalised(graph, normed)
                if found is not None and _is_row(graph, gamma, call):
                    x, epsilon = found
                    return _layer_norm(graph, x, gamma, beta, epsilon)
        return None


def _layer_norm(graph: Graph, x, gamma, beta, epsilon: float) -> relax.Expr:
    rows = [
        relax.const(np.ascontiguousarray(compat.constant_array(graph.value(e)).reshape(-1)))
        for e in (gamma, beta)
    ]
    return R.nn.layer_norm(x, *rows, axes=[-1], epsilon=epsilon)


def _is_row(graph: Graph, expr, call: relax.Call) -> bool:
    """Return whether a constant has one value per feature of the last axis."""
    value, shape = graph.value(expr), compat.static_shape(call)
    if not compat.is_constant(value) or shape is None:
        return False
    array = compat.constant_array(value)
    return array.dtype == np.float32 and array.size == array.shape[-1:][0] == shape[-1]


def _normalised(graph: Graph, expr) -> tuple[relax.Expr, float] | None:
    """Match ``centred / sqrt(variance + epsilon)`` and return x and epsilon."""
    divided = graph.call(expr, "relax.divide")
    if divided is None:
        return None
    centred, deviation = divided.args
    x = _centred(graph, centred)
    root = graph.call(deviation, "relax.sqrt")
    inside = graph.call(root.args[0], "relax.add") if root is not None else None
    if x is None or inside is None:
        return None
    for variance, constant in (inside.args, tuple(reversed(inside.args))):
        epsilon = graph.constant(constant)
        if epsilon is not None and _is_variance(graph, variance, x):
            return x, epsilon
    return None


def _centred(graph: Graph, expr) -> relax.Expr | None:
    """Match ``x - mean(x)`` over the last axis and return x."""
    difference = graph.call(expr, "relax.subtract")
    if difference is None:
        return None
    x, mean = difference.args
    found = _mean(graph, mean)
    return x if found is not None and found.same_as(x) else None


def _is_variance(graph: Graph, expr, x) -> bool:
    """Match ``mean((x - mean(x))^2)``, the square as a power or as a product."""
    squared = _mean(graph, expr)
    call = graph.call(squared, "relax.power", "relax.multiply") if squared is not None else None
    if call is None:
        return False
    a, b = call.args
    if compat.op_name(call) == "relax.power":
        square = graph.constant(b) == 2.0
    else:
        square = a.same_as(b)
    inner = _centred(graph, a) if square else None
    return inner is not None and inner.same_as(x)


def _mean(graph: Graph, expr) -> relax.Expr | None:
    """Match a mean over the last axis that keeps it, and return what it is taken of."""
    mean = graph.call(expr, "relax.mean")
    if mean is None or not mean.attrs.keepdims:
        return None
    shape = compat.static_shape(mean.args[0])
    axes = [int(a) for a in mean.attrs.axis or ()]
    last = shape is not None and axes in ([-1], [len(shape) - 1])
    return mean.args[0] if last else None
