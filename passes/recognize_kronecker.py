"""Read two small products with a transpose between them as one sum of Kronecker products.

``x @ sum_k A_k (x) B_k`` is spelled without any matrix of its size: features are read as
n1 x n2, multiplied along the n2 by B, whose terms lie side by side, rearranged, multiplied along
n1 and the terms by A, and read as m1 x m2; features are padded before and cropped after where
n1 n2 and m1 m2 are more than there are (Shapeshifter).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from tvm import relax

from tvmstruct import compat, ops
from tvmstruct.families.kronecker import Shape, factor_shapes, kronecker
from tvmstruct.layers import Form, Layer, LayerTable
from tvmstruct.passes.factored import common_name, cropped_width, is_cropped
from tvmstruct.rewrite import Graph

R = relax.op


@dataclass(frozen=True)
class _Product:
    """``x @ w``, which has ``size`` values."""

    name: str
    w: np.ndarray
    x: relax.Expr
    size: int


@dataclass(frozen=True)
class _Found:
    """The layer, what it reads and how many rows of it there are."""

    layer: Layer
    form: Form
    x: relax.Expr
    rows: int


class RecognizeKronecker:
    """Replace the chain by one layer in the form of its factors, whatever its matrix would cost.

    Who stores factors wants little memory: this comes before `RecognizeOperator`, which would
    take a matrix where that has fewer multiply-adds.
    """

    name = "recognize_kronecker"

    def __init__(self, table: LayerTable, forms: dict[str, Form], names: Mapping[int, str]) -> None:
        self.table, self.forms, self.names = table, forms, names

    def rewrite(self, graph: Graph, call: relax.Call) -> relax.Expr | None:
        """Return the structured layer at the last call of a chain, or None."""
        width = cropped_width(call)
        end = call.args[0] if width else call
        found = self._match(graph, end, width)
        shape = compat.static_shape(call)
        if found is None or shape is None or (not width and is_cropped(graph, call)):
            return None
        layer = found.layer
        self.forms.setdefault(layer.key, found.form)
        rows = R.reshape(found.x, (found.rows, layer.op.n_in))
        y = self.table.call(layer, [rows], (found.rows, layer.op.n_out))
        return R.reshape(y, shape)

    def _match(self, graph: Graph, end: relax.Expr, width: int) -> _Found | None:
        out = _reordered(graph, end, 2)  # (..., m2, m1) -> (..., m1, m2)
        if out is None or out.order != (1, 0):
            return None
        second = self._product(graph, out.x)
        middle = None if second is None else _reordered(graph, second.x, 3)
        if second is None or middle is None or middle.order != (1, 2, 0):
            return None
        first = self._product(graph, middle.x)
        if first is None:
            return None
        return self._join(graph, (first, second), (out.sizes, middle.sizes), width)

    def _product(self, graph: Graph, expr: relax.Expr) -> _Product | None:
        """Return a product with a constant matrix, if nothing else reads it."""
        call = graph.call(expr, "relax.matmul")
        if call is None or not graph.single(expr):
            return None
        value, shape = graph.value(call.args[1]), compat.static_shape(call)
        if not compat.is_constant(value) or shape is None:
            return None
        w = compat.constant_array(value)
        if w.ndim != 2 or w.dtype != np.float32:
            return None
        name = self.names.get(compat.address(compat.constant_tensor(value)), "factor")
        return _Product(name, w, call.args[0], math.prod(shape))

    def _join(
        self,
        graph: Graph,
        products: tuple[_Product, _Product],
        sizes: tuple[tuple[int, ...], tuple[int, ...]],
        width: int,
    ) -> _Found | None:
        first, second = products
        (m2, m1), (n1, also_m2, r) = sizes
        n2, columns = first.w.shape
        if also_m2 != m2 or columns != m2 * r or second.w.shape != (r * n1, m1):
            return None
        rows = first.size // (n1 * columns)
        x, n_in = _before_padding(graph, first.x, n1 * n2)
        b = first.w.reshape(n2, m2, r).transpose(2, 0, 1)
        a = second.w.reshape(r, n1, m1)
        op = ops.product(
            *ops.pad(n_in, n1 * n2), kronecker(a, b), *ops.crop(m1 * m2, width or m1 * m2)
        )
        op = ops.cast(op, first.w.dtype)
        names = (common_name(first.name, second.name),)
        dense = n_in * op.n_out
        reason = f"as the graph has it; a dense one takes {dense:,} multiply-adds"
        parameters = _parameters(n_in, op.n_out, r, (n1, m1), (n2, m2))
        return _Found(Layer(names, op), Form(op, "kronecker", parameters, 0.0, reason), x, rows)


@dataclass(frozen=True)
class _Reordered:
    """A reshape of a transpose of the last axes of an array: what it reads, sizes, order."""

    x: relax.Expr
    sizes: tuple[int, ...]
    order: tuple[int, ...]


def _reordered(graph: Graph, expr: relax.Expr, axes: int) -> _Reordered | None:
    """Return how ``expr`` reorders the last ``axes`` of an array, if nothing else reads a step."""
    outer = graph.call(expr, "relax.reshape")
    moved = None if outer is None else graph.call(outer.args[0], "relax.permute_dims")
    if outer is None or moved is None or not graph.single(outer.args[0]):
        return None
    source = moved.args[0]
    shape, order = compat.static_shape(source), [int(a) for a in moved.attrs.axes or ()]
    if (inner := graph.call(source, "relax.reshape")) is not None:
        if not graph.single(source):
            return None
        source = inner.args[0]
    lead = 0 if shape is None else len(shape) - axes
    if shape is None or lead < 0 or order[:lead] != list(range(lead)):
        return None
    return _Reordered(source, shape[lead:], tuple(a - lead for a in order[lead:]))


def _parameters(n_in: int, n_out: int, r: int, a: Shape, b: Shape) -> dict[str, object]:
    """Return the rank and, where they are not those of Shapeshifter, the shapes of the factors."""
    usual = factor_shapes(n_in, n_out, r=r) == (a, b)
    return {"r": r} if usual else {"r": r, "a": a, "b": b}


def _before_padding(graph: Graph, expr: relax.Expr, width: int) -> tuple[relax.Expr, int]:
    """Return the features before zeros were put behind them, and how many there are."""
    reshaped = graph.call(expr, "relax.reshape")
    source = expr if reshaped is None else reshaped.args[0]
    padded = graph.call(source, "relax.nn.pad")
    shape = None if padded is None else compat.static_shape(padded)
    if padded is None or shape is None or shape[-1] != width:
        return expr, width
    inner, zeros = compat.static_shape(padded.args[0]), padded.attrs
    widths = [int(n) for n in zeros.pad_width]
    if zeros.pad_mode != "constant" or zeros.pad_value != 0 or any(widths[:-1]) or inner is None:
        return expr, width
    return padded.args[0], inner[-1]
