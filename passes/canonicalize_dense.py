"""Bring every matmul with a constant weight into one form: a layer call on rows.

``matmul(x, w)`` and ``matmul(x, permute_dims(w))`` for x of any rank become
``reshape(layer(reshape(x, rows)))``; ``matmul(w, x)`` becomes its transpose. The layer's name is
that of the weight in the source file.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping

import numpy as np
from tvm import relax

from tvmstruct import compat, ops
from tvmstruct.layers import Layer, LayerTable
from tvmstruct.rewrite import Graph, Reject

R = relax.op
Weight = tuple[str, np.ndarray, bool]  # name, value, and whether the source's array is transposed


class CanonicalizeDense:
    """Replace matmul with a constant by a call of a dense layer."""

    name = "canonicalize_dense"

    def __init__(self, table: LayerTable, names: Mapping[int, str]) -> None:
        self.table, self.names = table, names

    def rewrite(self, graph: Graph, call: relax.Call) -> relax.Expr | Reject | None:
        """Return the layer call, or why this matmul is none."""
        if compat.op_name(call) != "relax.matmul":
            return None
        x, w = call.args
        if (right := self._weight(graph, w)) is not None:
            return self._dense(call, x, *right)
        if (left := self._weight(graph, x)) is not None:
            return self._from_left(call, w, *left)
        return None

    def _weight(self, graph: Graph, expr: relax.Expr) -> Weight | None:
        """Return name and value of a constant, transposed as the graph does it, and whether so."""
        value = graph.value(expr)
        if (transposed := graph.call(value, "relax.permute_dims")) is not None:
            found = self._weight(graph, transposed.args[0])
            if found is None:
                return None
            axes = transposed.attrs.axes
            order = list(range(found[1].ndim))[::-1] if axes is None else [int(a) for a in axes]
            return found[0], found[1].transpose(order), found[2] ^ (order != sorted(order))
        if (reshaped := graph.call(value, "relax.reshape", "relax.broadcast_to")) is not None:
            found = self._weight(graph, reshaped.args[0])
            return found and _same_matrix(found, reshaped)
        if not compat.is_constant(value):
            return None
        array = compat.constant_array(value)
        return self._name(compat.constant_tensor(value), array), array, False

    def _name(self, tensor, array: np.ndarray) -> str:
        if (name := self.names.get(compat.address(tensor))) is not None:
            return name
        digest = hashlib.sha256(np.ascontiguousarray(array).tobytes()).hexdigest()[:16]
        return f"constant_{digest}"

    def _dense(self, call, x, name: str, w: np.ndarray, flipped: bool) -> relax.Expr | Reject:
        shape, out = compat.static_shape(x), compat.static_shape(call)
        if why := _refusal(call, shape, out, w):
            return Reject(name, why)
        assert shape is not None
        assert out is not None
        rows = R.reshape(x, (math.prod(shape[:-1]), w.shape[0]))
        layer = Layer((name,), ops.Dense(w), transposed=flipped)
        y = self.table.call(layer, [rows], (math.prod(shape[:-1]), w.shape[1]))
        return R.reshape(y, out)

    def _from_left(self, call, x, name: str, w: np.ndarray, flipped: bool) -> relax.Expr | Reject:
        """``w @ x`` is ``(x^T @ w^T)^T``."""
        shape, out = compat.static_shape(x), compat.static_shape(call)
        if why := _refusal(call, shape, out, w):
            return Reject(name, why)
        assert shape is not None
        if len(shape) != 2:
            return Reject(name, f"stands left of an input of rank {len(shape)}, want 2")
        layer = Layer((name,), ops.Dense(w.T), transposed=not flipped)
        y = self.table.call(layer, [R.permute_dims(x)], (shape[1], w.shape[0]))
        return R.permute_dims(y)


def _same_matrix(found: Weight, call: relax.Call) -> Weight | None:
    """Return a weight reshaped as the graph does it, or, where only repeated, the weight itself."""
    name, array, flipped = found
    shape = compat.static_shape(call)
    if shape is None:
        return None
    if compat.op_name(call) == "relax.reshape":
        return name, array.reshape(shape), flipped
    return found if array.ndim == 2 and shape[-2:] == array.shape else None


def _refusal(call, shape, out, w: np.ndarray) -> str:
    """Return why a matmul with a constant is no layer, or an empty string."""
    dtypes = {compat.dtype_of(a) for a in call.args} | {compat.dtype_of(call)}
    if w.ndim != 2:
        return f"weight has rank {w.ndim}, want 2 (a batch of matrices stays a batched matmul)"
    if dtypes != {"float32"}:
        return f"computes in {', '.join(sorted(dtypes))}; layers compute in float32"
    if shape is None or out is None:
        return "the input's shape is not static in this bucket"
    return "" if math.prod(shape) else "the input is empty"
