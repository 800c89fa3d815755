"""Replace ``softmax(q k^T * scale + mask) v`` by one attention kernel.

The rule is anchored at the product with the values. Heads are brought into row buffers by
transposes and reshapes, which `simplify_layout` cancels against those of the graph.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from tvm import relax

from tvmstruct import compat
from tvmstruct.layers import Attention, LayerTable
from tvmstruct.rewrite import Graph, Reject

R = relax.op
HIDDEN = -1e8  # a mask constant at most this low hides a key whether it is added or selected


@dataclass
class _Scores:
    """``scale * (q @ k) + mask``, taken apart."""

    product: relax.Call
    scale: float
    mask: relax.Expr | None


class FuseAttention:
    """Recognise scaled dot-product attention with an additive or selecting mask."""

    name = "fuse_attention"

    def __init__(self, table: LayerTable) -> None:
        self.table = table

    def rewrite(self, graph: Graph, call: relax.Call) -> relax.Expr | Reject | None:
        """Return the attention call, or why this product of probabilities and values is none."""
        if compat.op_name(call) != "relax.matmul":
            return None
        softmax = graph.call(call.args[0], "relax.nn.softmax")
        if softmax is None:
            return None
        where = f"attention.{len(self.table.nodes)}"
        scores = _take_apart(graph, softmax.args[0])
        if isinstance(scores, str):
            return Reject(where, scores)
        q, k = scores.product.args
        shapes = [compat.static_shape(e) for e in (q, k, call.args[1], softmax.args[0])]
        if why := _refusal(graph, call, softmax, shapes):
            return Reject(where, why)
        return self._build(call, (q, k, call.args[1]), scores, shapes)

    def _build(self, call, tensors, scores: _Scores, shapes) -> relax.Expr | Reject:
        q, k, v = tensors
        (batch, heads, queries, depth), (_, _, _, keys) = shapes[0], shapes[1]
        width = shapes[2][3]
        kind, dims, mask = _mask(scores.mask, (batch, heads, queries, keys))
        if kind == "refused":
            return Reject(f"attention.{len(self.table.nodes)}", str(mask))
        node = Attention(
            heads, depth, width, queries, keys, scores.scale,
            (heads * depth, 0), (heads * depth, 0), (heads * width, 0), kind, dims,
        )  # fmt: skip
        rows = [
            R.reshape(R.permute_dims(q, [0, 2, 1, 3]), (batch * queries, heads * depth)),
            R.reshape(R.permute_dims(k, [0, 3, 1, 2]), (batch * keys, heads * depth)),
            R.reshape(R.permute_dims(v, [0, 2, 1, 3]), (batch * keys, heads * width)),
        ]
        args = rows if mask is None else [*rows, mask]
        y = self.table.call(node, args, (batch * queries, heads * width))
        return R.permute_dims(R.reshape(y, (batch, queries, heads, width)), [0, 2, 1, 3])


def _refusal(graph: Graph, call, softmax, shapes) -> str:
    """Return the condition that keeps this graph from being fused attention, or nothing."""
    q, k, v, scores = shapes
    if None in shapes or any(len(s) != 4 for s in shapes):
        return f"shapes q {q}, k {k}, v {v}: want (batch, heads, length, depth) of rank 4"
    if softmax.attrs.axis not in (-1, 3):
        return f"softmax runs over axis {softmax.attrs.axis}, want the last"
    if compat.dtype_of(call) != "float32":
        return f"computes in {compat.dtype_of(call)}, want float32"
    if not graph.single(call.args[0]):
        return "the probabilities are read elsewhere too"
    if not q[:2] == k[:2] == v[:2] == scores[:2] or q[3] != k[2] or k[3] != v[2]:
        return f"shapes q {q}, k {k}, v {v} do not belong together (or broadcast heads)"
    return ""


def _take_apart(graph: Graph, expr: relax.Expr) -> _Scores | str:
    """Follow masks and scales from the softmax's input down to the product."""
    scale, mask = 1.0, None
    while True:
        if (product := graph.call(expr, "relax.matmul")) is not None:
            return _Scores(product, scale, mask)
        if not graph.single(expr):
            return "the scores are read elsewhere too"
        step = graph.value(expr)
        found = _scaled(graph, step)
        if found is not None:
            factor, expr = found
            scale *= factor
        elif mask is None and (masked := _masked(graph, step)) is not None:
            expr, mask = masked
            if scale != 1.0:
                return "the mask is scaled together with the scores"
        else:
            name = compat.op_name(step) or type(step).__name__
            return f"{name} stands between the product and the softmax"


def _scaled(graph: Graph, step) -> tuple[float, relax.Expr] | None:
    name = compat.op_name(step)
    if name == "relax.divide" and (divisor := graph.constant(step.args[1])):
        return 1.0 / divisor, step.args[0]
    if name == "relax.multiply":
        for a, b in (step.args, tuple(reversed(step.args))):
            if (factor := graph.constant(b)) is not None:
                return factor, a
    return None


def _masked(graph: Graph, step) -> tuple[relax.Expr, relax.Expr] | None:
    """Return scores and additive mask of an add, or of a where with a hiding constant."""
    name = compat.op_name(step)
    if name == "relax.add":
        a, b = step.args
        return (a, b) if _holds_product(graph, a) else (b, a)
    if name == "relax.where":
        keep, a, b = step.args
        for scores, hidden, flip in ((a, b, False), (b, a, True)):
            low = graph.constant(hidden)
            if low is not None and low <= HIDDEN:
                zero, floor = relax.const(np.float32(0)), relax.const(np.float32(_floor(low)))
                return scores, R.where(keep, *((floor, zero) if flip else (zero, floor)))
    return None


def _floor(low: float) -> float:
    """Return what to add so that, as after a select, hidden scores are all one number.

    Adding a smaller one such as -1e9 would keep digits of large scores, which decide a row
    whose keys are all hidden.
    """
    return low if math.isinf(low) else float(np.finfo(np.float32).min)


def _holds_product(graph: Graph, expr) -> bool:
    while (found := _scaled(graph, graph.value(expr))) is not None:
        expr = found[1]
    return graph.call(expr, "relax.matmul") is not None


def _mask(mask: relax.Expr | None, full: tuple[int, ...]):
    """Return (kind, dims that vary, mask tensor) for the kernel, or ("refused", (), why)."""
    if mask is None:
        return "none", (), None
    shape = _shape_of(mask)
    if shape is None or len(shape) > 4:
        return "refused", (), f"mask of shape {shape} does not broadcast to {full}"
    shape = (1,) * (4 - len(shape)) + shape
    if any(m not in (1, f) for m, f in zip(shape, full, strict=True)):
        return "refused", (), f"mask of shape {shape} does not broadcast to {full}"
    batch, heads, queries, keys = shape
    if keys != full[3]:
        return "refused", (), f"mask of shape {shape} is the same for all {full[3]} keys"
    if (heads, queries) == (1, 1) and batch == full[0]:
        return "keys", ("batch",), R.reshape(mask, (batch, keys))
    names = ("batch", "heads", "queries")
    dims = tuple(n for n, m in zip(names, shape, strict=False) if m > 1)
    return "full", dims, R.reshape(mask, shape)


def _shape_of(mask: relax.Expr) -> tuple[int, ...] | None:
    if compat.op_name(mask) == "relax.where" and not isinstance(mask, relax.Var):
        return compat.static_shape(mask.args[0])  # built by this rule, not yet typed
    return compat.static_shape(mask)
