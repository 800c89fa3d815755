"""Operators and LookupFFN layers in plain Relax: what a saved or exported module is made of.

The passes `recognize_operator` and `recognize_lookup` read these graphs back as structured layers
and hash tables, so a module means the same to TVM and to tvmstruct.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import singledispatch
from math import prod

import numpy as np
from tvm import relax

from tvmstruct import compat, ops
from tvmstruct.folding import hadamard
from tvmstruct.lookup import Lookup, flipped

R = relax.op
Constant = Callable[[np.ndarray, str], relax.Expr]
SYLVESTER = 64  # largest order of a Hadamard matrix that is written out


def plain_constant(array: np.ndarray, name: str) -> relax.Expr:
    """Return an array as a constant without a name."""
    del name
    return relax.const(np.ascontiguousarray(array))


def emit_lookup(
    bb: relax.BlockBuilder,
    x: relax.Expr,
    lookup: Lookup,
    constant: Constant = plain_constant,
) -> relax.Expr:
    """Return ``lookup(x)`` of x (..., n_in) as (..., n_out) in plain operators.

    ``constant(array, name)`` makes the weights; names are "projection.weight",
    "projection.bias", "tables" and "bias".
    """
    shape = compat.static_shape(x)
    assert shape is not None
    rows, emit = prod(shape[:-1]), bb.emit
    z = emit_operator(bb, x, lookup.projection, constant, "projection.weight")
    if lookup.projection_bias is not None:
        z = emit(R.add(z, constant(_f32(lookup.projection_bias), "projection.bias")))
    z = emit(R.reshape(z, (rows, lookup.h, lookup.tau)))
    table = constant(_f32(lookup.tables).reshape(-1, lookup.n_out), "tables")
    y = None
    for turned in flipped(lookup.tau, lookup.flips):
        codes, scores = _hash(bb, z, lookup, list(turned))
        gathered = emit(R.take(table, codes, axis=0, mode="clip"))
        term = emit(R.multiply(gathered, emit(R.expand_dims(scores, [2]))))
        term = emit(R.sum(term, [1]))
        y = term if y is None else emit(R.add(y, term))
    assert y is not None
    if lookup.bias is not None:
        y = emit(R.add(y, constant(_f32(lookup.bias), "bias")))
    return emit(R.reshape(y, (*shape[:-1], lookup.n_out)))


def _hash(
    bb: relax.BlockBuilder, z: relax.Expr, lookup: Lookup, turned: list[int]
) -> tuple[relax.Expr, relax.Expr]:
    """Return rows of the flat table (rows, h) and their scores, some bits turned over."""
    emit, tau = bb.emit, lookup.tau
    places = 1 << np.arange(tau - 1, -1, -1)
    signs = np.ones(tau, np.int64)
    signs[turned] = -1
    bits = emit(R.astype(emit(R.greater(z, relax.const(0.0, "float32"))), "int64"))
    codes = emit(R.sum(emit(R.multiply(bits, relax.const(places * signs, "int64"))), [2]))
    offset = (np.arange(lookup.h) << tau) + places[turned].sum()
    codes = emit(R.add(codes, relax.const(offset, "int64")))
    size = emit(R.abs(z))
    total = emit(
        R.sum(emit(R.multiply(size, relax.const(signs.astype(np.float32), "float32"))), [2])
    )
    decay = emit(R.exp(emit(R.multiply(size, relax.const(-2.0, "float32")))))
    product = emit(R.prod(emit(R.add(decay, relax.const(1.0, "float32"))), [2]))
    scores = emit(R.divide(relax.const(1.0, "float32"), product))
    if turned:
        lost = (1 - signs).astype(np.float32)  # 2 for each bit that is turned over
        lost = emit(R.sum(emit(R.multiply(size, relax.const(lost, "float32"))), [2]))
        scores = emit(R.multiply(scores, emit(R.exp(emit(R.negative(lost))))))
    return codes, emit(R.multiply(total, scores)) if lookup.scaled else scores


def emit_operator(
    bb: relax.BlockBuilder,
    x: relax.Expr,
    op: ops.Op,
    constant: Constant = plain_constant,
    name: str = "weight",
) -> relax.Expr:
    """Return ``x @ op`` of x (..., n_in) as (..., n_out) in plain operators.

    The first array is called ``name``, the others ``name.1``, ``name.2``, ...
    """
    shape = compat.static_shape(x)
    assert shape is not None
    made: dict[int, relax.Expr] = {}

    def weight(array: np.ndarray) -> relax.Expr:
        if id(array) not in made:
            own = f"{name}.{len(made)}" if made else name
            made[id(array)] = constant(_f32(array), own)
        return made[id(array)]

    rows = bb.emit(R.reshape(x, (prod(shape[:-1]), shape[-1])))
    y = _emit(op, rows, _Writer(bb, weight, prod(shape[:-1])))
    return bb.emit(R.reshape(y, (*shape[:-1], op.n_out)))


class _Writer:
    """What the operators need to be written: a builder, their weights, the number of rows."""

    def __init__(
        self, bb: relax.BlockBuilder, weight: Callable[[np.ndarray], relax.Expr], rows: int
    ) -> None:
        self.emit, self.weight, self.rows = bb.emit, weight, rows

    def shaped(self, x: relax.Expr, *features: int) -> relax.Expr:
        """Return rows with their features in axes."""
        return self.emit(R.reshape(x, (self.rows, *features)))


@singledispatch
def _emit(op: ops.Op, x: relax.Expr, to: _Writer) -> relax.Expr:
    raise TypeError(f"emit_operator: {type(op).__name__} is not known in plain operators")


@_emit.register
def _(op: ops.Product, x, to):
    for factor in op.factors:
        x = _emit(factor, x, to)
    return x


@_emit.register
def _(op: ops.Sum, x, to):
    first, *rest = (_emit(term, x, to) for term in op.terms)
    for term in rest:
        first = to.emit(R.add(first, term))
    return first


@_emit.register
def _(op: ops.Dense, x, to):
    return to.emit(R.matmul(x, to.weight(op.w)))


@_emit.register
def _(op: ops.BlockDiag, x, to):
    g, p, _ = op.w.shape
    x = to.emit(R.permute_dims(to.shaped(x, g, p), (1, 0, 2)))
    y = to.emit(R.matmul(x, to.weight(op.w)))
    return to.shaped(to.emit(R.permute_dims(y, (1, 0, 2))), op.n_out)


@_emit.register
def _(op: ops.SharedBlockDiag, x, to):
    y = to.emit(R.matmul(to.shaped(x, op.blocks, op.w.shape[0]), to.weight(op.w)))
    return to.shaped(y, op.n_out)


@_emit.register
def _(op: ops.Permute, x, to):
    axes = (0, *(a + 1 for a in op.axes))
    return to.shaped(to.emit(R.permute_dims(to.shaped(x, *op.dims), axes)), op.n_out)


@_emit.register
def _(op: ops.Diag, x, to):
    return to.emit(R.multiply(x, to.weight(op.d)))


@_emit.register
def _(op: ops.Slice, x, to):
    return to.emit(R.strided_slice(x, [1], [op.start], [op.stop]))


@_emit.register
def _(op: ops.Pad, x, to):
    after = op.width - op.start - op.size
    parts = [to.emit(R.zeros((to.rows, n), "float32")) if n else None for n in (op.start, after)]
    return to.emit(R.concat([p for p in (parts[0], x, parts[1]) if p is not None], 1))


@_emit.register
def _(op: ops.WalshHadamard, x, to):
    """``H_n = H_a (x) H_b``: small matrices on as many axes as it takes."""
    if op.n > 1:
        left, inner = op.n, op.inner
        while left > 1:
            order = min(left, SYLVESTER)
            left //= order
            x = to.shaped(x, op.n_in // (order * inner), order, inner)
            x = to.emit(R.matmul(relax.const(hadamard(order).astype(np.float32), "float32"), x))
            inner *= order
        x = to.shaped(x, op.n_in)
    if op.scale != 1:
        x = to.emit(R.multiply(x, relax.const(op.scale, "float32")))
    return x


def _f32(array: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(array, np.float32)
