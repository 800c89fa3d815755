"""Add up embeddings and normalise them in one kernel: word, position and type as in BERT.

A term is a gather from a dense table, a lookup that `PlanEmbedding` made, either times a number,
or constant rows that repeat over the batch. A dense gather that nothing is added to stays as it
is: one read and one write for each value is all that it costs in any kernel.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

import numpy as np
from tvm import relax

from tvmstruct import compat
from tvmstruct.embeddings import TensorTable
from tvmstruct.layers import Embedding, LayerTable, arguments
from tvmstruct.passes.constant_values import evaluate
from tvmstruct.passes.plan_embedding import refusal
from tvmstruct.rewrite import Graph, Reject
from tvmstruct.schedules.compute.embedding import EmbeddingSum, Rows, Tensors

R = relax.op


@dataclass(frozen=True)
class _Term:
    """One term of a sum, and the arguments that it takes; ``rows`` are constant ones."""

    term: Rows | Tensors
    name: str = ""
    args: tuple[relax.Expr, ...] = ()
    table: TensorTable | None = None
    rows: np.ndarray | None = None


class FuseEmbedding:
    """Replace a sum of looked-up rows, and the normalisation after it, by one node."""

    name = "fuse_embedding"

    def __init__(self, table: LayerTable, names: Mapping[int, str]) -> None:
        self.table, self.names = table, names

    def rewrite(self, graph: Graph, call: relax.Call) -> relax.Expr | Reject | None:
        """Return the node, or None where no row is looked up or what is added is no row."""
        kind, shape = compat.op_name(call), compat.static_shape(call)
        if kind not in ("relax.add", "relax.multiply", "relax.nn.layer_norm") or shape is None:
            return None
        if kind == "relax.nn.layer_norm":
            return self._normalised(graph, call, shape)
        terms = self._terms(graph, call, shape, top=True)
        if kind == "relax.multiply" and terms and isinstance(terms[0].term, Rows):
            return None  # a dense gather times a number is one generic kernel already
        return self._node(terms, shape, None, [])

    def _normalised(
        self, graph: Graph, call: relax.Call, shape: tuple[int, ...]
    ) -> relax.Expr | None:
        x, gamma, beta = call.args
        if not shape or [int(a) % len(shape) for a in call.attrs.axes] != [len(shape) - 1]:
            return None
        gamma = gamma if call.attrs.scale else relax.const(np.ones(shape[-1], "float32"))
        beta = beta if call.attrs.center else relax.const(np.zeros(shape[-1], "float32"))
        terms = self._terms(graph, x, shape)
        return self._node(terms, shape, float(call.attrs.epsilon), [gamma, beta])

    def _node(
        self, terms: list[_Term] | None, shape: tuple[int, ...], norm: float | None, more: list
    ) -> relax.Expr | None:
        if terms is None or not any(t.term.ids for t in terms):
            return None
        terms = list(_merged(terms))
        made = [t.table for t in terms if t.table is not None]
        total = EmbeddingSum(shape[-1], tuple(t.term for t in terms), norm)
        node = Embedding(total, tuple(t.name for t in terms), made[0] if made else None)
        args = [arg for t in terms for arg in t.args]
        y = self.table.call(node, [*args, *more], (math.prod(shape[:-1]), shape[-1]))
        return R.reshape(y, shape)

    def _terms(
        self, graph: Graph, expr: relax.Expr, shape: tuple[int, ...], *, top: bool = False
    ) -> list[_Term] | None:
        """Return the terms of a sum that nothing else reads, or None where one is no row."""
        value = graph.value(expr)
        if compat.is_constant(value):
            found = _repeated(compat.constant_array(value), shape)
            return found and [found]
        if not (top or graph.single(expr)) or compat.static_shape(value) != shape:
            return None
        kind = compat.op_name(value)
        if kind == "relax.take":
            found = self._lookup(graph, value, shape)
            return found and [found]
        if kind == "relax.reshape":
            return self._made(graph, value)
        if kind == "relax.multiply":
            return self._scaled(graph, value, shape)
        if kind == "relax.add":
            left, right = (self._terms(graph, arg, shape) for arg in value.args)
            terms = None if left is None or right is None else [*left, *right]
            single = terms is None or sum(t.table is not None for t in terms) <= 1
            return terms if single else None
        return None

    def _lookup(self, graph: Graph, take: relax.Call, shape: tuple[int, ...]) -> _Term | None:
        table, ids = take.args
        if not compat.is_constant(table) or refusal(take):
            return None
        array = compat.constant_array(table)
        if (known := evaluate(graph, ids)) is not None:
            return _repeated(array[np.clip(known, 0, len(array) - 1)], shape)
        name = self.names.get(compat.address(compat.constant_tensor(table)), "table")
        rows = R.reshape(ids, (math.prod(shape[:-1]),))
        return _Term(Rows(len(array), compat.dtype_of(ids)), name, (table, rows))

    def _made(self, graph: Graph, reshape: relax.Call) -> list[_Term] | None:
        """Return the term of a lookup from a planned table."""
        if not graph.single(reshape.args[0]):
            return None
        call = graph.value(reshape.args[0])
        node = self.table.node(call)
        if (
            not isinstance(node, Embedding)
            or node.total.norm is not None
            or len(node.total.terms) != 1
        ):
            return None
        return [_Term(node.total.terms[0], node.names[0], tuple(arguments(call)), node.table)]

    def _scaled(self, graph: Graph, call: relax.Call, shape: tuple[int, ...]) -> list[_Term] | None:
        for factor, other in (call.args, tuple(reversed(call.args))):
            number = graph.constant(factor)
            terms = None if number is None else self._terms(graph, other, shape)
            if number is not None and terms is not None and len(terms) == 1 and terms[0].term.ids:
                (only,) = terms
                return [replace(only, term=replace(only.term, scale=only.term.scale * number))]
        return None


def _merged(terms: list[_Term]) -> Iterator[_Term]:
    """Yield the terms, constant rows added up where the period of one divides the other's."""
    fixed = sorted((t.rows for t in terms if t.rows is not None), key=len, reverse=True)
    yield from (t for t in terms if t.rows is None)
    while fixed:
        total = fixed.pop(0)
        for rows in [r for r in fixed if len(total) % len(r) == 0]:
            total = total + np.tile(rows, (len(total) // len(rows), 1))
        fixed = [r for r in fixed if len(total) % len(r)]
        yield _Term(Rows(len(total)), args=(relax.const(np.ascontiguousarray(total)),))


def _repeated(array: np.ndarray, shape: tuple[int, ...]) -> _Term | None:
    """Return constant rows that a broadcast to ``shape`` repeats, as few as there are."""
    n, lead = shape[-1], shape[:-1]
    if array.dtype != np.float32 or array.ndim > len(shape) or array.shape[-1:] != (n,):
        return None
    sides = (*([1] * (len(shape) - array.ndim)), *array.shape[:-1])
    first = next((i for i, side in enumerate(sides) if side != 1), len(sides))
    if sides[first:] != lead[first:]:
        return None  # repeats inside: rows are not in turns
    rows = array.reshape(-1, n)
    for count in (1, *lead[-1:]):
        if (
            len(rows) % count == 0
            and (rows == np.tile(rows[:count], (len(rows) // count, 1))).all()
        ):
            rows = rows[:count]
            break
    return _Term(Rows(len(rows)), rows=rows)
