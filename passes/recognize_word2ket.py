"""Read the lookup of a factored table, digit by digit, as one embedding: word2ketXS.

A row of ``sum_k F_1k (x) ... (x) F_nk`` is spelled as gathers by the digits of an id from each
factor, (t, q, r) for all but the last and (t, r, q) for that (or permuted to it), as products of
all but the last with each other, and as a matmul with the last, which adds up the terms.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from tvm import relax

from tvmstruct import compat
from tvmstruct.embeddings import Word2KetXS
from tvmstruct.layers import Embedding, LayerTable, TableForm
from tvmstruct.passes.factored import common_name, cropped_width, is_cropped
from tvmstruct.rewrite import Graph
from tvmstruct.schedules.compute.embedding import EmbeddingSum, tensors_of

R = relax.op
ID_TYPES = ("int32", "int64")
SPREAD = ("relax.reshape", "relax.expand_dims")


@dataclass(frozen=True)
class _Gather:
    """Rows of one factor, chosen by ``ids // unit``, and that modulo ``base`` if it is not 0."""

    name: str
    factor: np.ndarray
    ids: relax.Expr
    unit: int
    base: int


class RecognizeWord2Ket:
    """Replace the chain of gathers and products by a lookup that makes the rows at once."""

    name = "recognize_word2ket"

    def __init__(
        self, table: LayerTable, tables: dict[str, TableForm], names: Mapping[int, str]
    ) -> None:
        self.table, self.tables, self.names = table, tables, names

    def rewrite(self, graph: Graph, call: relax.Call) -> relax.Expr | None:
        """Return the lookup at the last call of a chain, or None."""
        width, shape = cropped_width(call), compat.static_shape(call)
        last = graph.call(call.args[0] if width else call, "relax.reshape")
        product = None if last is None else graph.call(last.args[0], "relax.matmul")
        if product is None or shape is None:
            return None
        gathers = self._gathers(graph, product)
        if not gathers or not _digits(gathers) or (not width and is_cropped(graph, call)):
            return None
        factors = tuple(_term_first(g.factor, g is gathers[-1]) for g in gathers)
        features = math.prod(f.shape[2] for f in factors)
        rows = math.prod(compat.static_shape(gathers[0].ids) or (0,))
        if rows == 0 or rows * (width or features) != math.prod(shape):
            return None
        name = common_name(*(g.name for g in gathers))
        form = self.tables.setdefault(name, _form(factors, width or features))
        return self._lookup(name, form, gathers[0].ids, rows, shape)

    def _lookup(
        self, name: str, form: TableForm, ids: relax.Expr, rows: int, shape: tuple[int, ...]
    ) -> relax.Expr:
        width = form.table.dimension
        total = EmbeddingSum(width, (tensors_of(form.table, compat.dtype_of(ids)),))
        node = Embedding(total, (name,), form.table)
        y = self.table.call(node, [R.reshape(ids, (rows,))], (rows, width))
        return R.reshape(y, shape)

    def _gathers(self, graph: Graph, product: relax.Call) -> list[_Gather] | None:
        """Return the gathers of the factors in order, or None where one is none."""
        found = [self._gather(graph, product.args[1])]
        left = product.args[0]
        while (more := _outer(graph, left)) is not None:
            left, right = more
            found.insert(0, self._gather(graph, right))
        found.insert(0, self._gather(graph, left))
        return None if None in found else [g for g in found if g is not None]

    def _gather(self, graph: Graph, expr: relax.Expr) -> _Gather | None:
        take = graph.call(expr, "relax.take")
        if take is None:
            return None
        turned = graph.call(take.args[0], "relax.permute_dims")  # of a factor in its own order
        table = graph.value(take.args[0] if turned is None else turned.args[0])
        if not compat.is_constant(table):
            return None
        array, index = compat.constant_array(table), take.args[1]
        if turned is not None:
            array = array.transpose(
                [int(a) for a in turned.attrs.axes] if turned.attrs.axes else None
            )
        axis = take.attrs.axis
        if array.ndim != 3 or array.dtype != np.float32 or axis is None or int(axis) != 0:
            return None
        base = unit = 0
        if (modulo := graph.call(index, "relax.floor_mod")) is not None:
            base, index = _whole(graph, modulo.args[1]), modulo.args[0]
        if (quotient := graph.call(index, "relax.divide")) is not None:
            unit, index = _whole(graph, quotient.args[1]), quotient.args[0]
        if compat.dtype_of(index) not in ID_TYPES:
            return None
        name = self.names.get(compat.address(compat.constant_tensor(table)), "factor")
        return _Gather(name, array, index, unit or 1, base)


def _outer(graph: Graph, expr: relax.Expr) -> tuple[relax.Expr, relax.Expr] | None:
    """Return both sides of a product that combines all features of one with all of the other.

    The reshape that merges their features may have become one with the next product's.
    """
    merged = graph.call(expr, "relax.reshape")
    times = graph.call(expr if merged is None else merged.args[0], "relax.multiply")
    sides = [] if times is None else [graph.call(arg, *SPREAD) for arg in times.args]
    if len(sides) != 2 or sides[0] is None or sides[1] is None:
        return None
    left, right = ((compat.static_shape(side) or ())[-3:] for side in sides)
    if len(left) < 3 or len(right) < 3 or (left[1], right[0]) != (1, 1) or left[2] != right[2]:
        return None
    return sides[0].args[0], sides[1].args[0]


def _digits(gathers: list[_Gather]) -> bool:
    """Return whether the gathers are by the digits of one id, and by all of them."""
    unit = 1
    for place, gather in reversed(list(enumerate(gathers))):
        t = gather.factor.shape[0]
        if gather.unit != unit or gather.base != (t if place else 0):
            return False
        unit *= t
    ranks = {g.factor.shape[1 if g is gathers[-1] else 2] for g in gathers}
    return len(ranks) == 1 and all(g.ids.same_as(gathers[0].ids) for g in gathers)


def _term_first(factor: np.ndarray, last: bool) -> np.ndarray:
    """Return a factor as (r, t, q)."""
    return np.ascontiguousarray(factor.transpose((1, 0, 2) if last else (2, 0, 1)))


def _form(factors: tuple[np.ndarray, ...], width: int) -> TableForm:
    vocabulary = math.prod(f.shape[1] for f in factors)
    table = Word2KetXS(factors, vocabulary, width)
    parameters = {"order": len(factors), "r": table.rank}
    return TableForm(table, "word2ket_xs", parameters, reason="as the graph has it")


def _whole(graph: Graph, expr: relax.Expr) -> int:
    """Return a constant above 0, or -1, which no digit has."""
    value = graph.constant(expr)
    return int(value) if value is not None and value >= 1 else -1
