"""Exporters' guards around a softmax: rows without any key become zeros instead of NaN.

The attention kernel gives zeros for such rows anyway, so a guard is peeled off.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from tvm import relax

from tvmstruct import compat
from tvmstruct.passes.constant_values import number
from tvmstruct.rewrite import Graph

# not any(score != -inf), as PyTorch decomposes a softmax that gives zeros for empty rows
EMPTY_ROW = (
    "relax.logical_not", "relax.astype", "relax.max", "relax.astype", "relax.logical_not",
    "relax.equal",
)  # fmt: skip


@dataclass(frozen=True)
class Guard:
    """The probabilities that a guard lets through, and the variables that it is made of."""

    kept: relax.Expr
    reads: list[relax.Var]


def guarded(graph: Graph, call: relax.Expr) -> Guard | None:
    """Match ``where(row is empty, 0, p)`` and ``where(isnan(p), 0, p)``.

    NaN in a score thus shows as NaN, where the second guard would have hidden it.
    """
    if compat.op_name(call) != "relax.where" or number(graph, call.args[1]) != 0.0:
        return None
    condition, zeros, kept = call.args
    chain = _chain(graph, condition)
    names = tuple(compat.op_name(graph.value(e)) for e in chain)
    tested = graph.value(chain[-1]).args[0] if chain else None
    row_is_empty = names == EMPTY_ROW and _is_last_softmax(graph, kept, tested)
    row_is_nan = names == ("relax.isnan",) and kept.same_as(tested)
    if not row_is_empty and not row_is_nan:
        return None
    return Guard(kept, [e for e in (*chain, zeros) if isinstance(e, relax.Var)])


def _chain(graph: Graph, expr: relax.Expr) -> list[relax.Expr]:
    """Return a condition and what it is made of, down to the test of scores."""
    chain = []
    while compat.op_name(call := graph.value(expr)) in (*EMPTY_ROW, "relax.isnan"):
        chain.append(expr)
        name = compat.op_name(call)
        if name in ("relax.equal", "relax.isnan"):
            compares = name == "relax.isnan" or graph.constant(call.args[1]) == -np.inf
            return chain if compares else []
        if name == "relax.max" and not _over_rows(call):
            return []
        expr = call.args[0]
    return []


def _over_rows(call: relax.Call) -> bool:
    return bool(call.attrs.keepdims) and [int(a) for a in call.attrs.axis or ()] == [-1]


def _is_last_softmax(graph: Graph, expr: relax.Expr, scores: relax.Expr | None) -> bool:
    softmax, shape = graph.call(expr, "relax.nn.softmax"), compat.static_shape(expr)
    if softmax is None or not shape or not softmax.args[0].same_as(scores):
        return False
    return int(softmax.attrs.axis) in (-1, len(shape) - 1)
