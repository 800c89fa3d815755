"""Gathers of single elements whose positions a model computes: never outside the data."""

from __future__ import annotations

from collections.abc import Callable

from tvm import relax

from tvmstruct import compat

R = relax.op


def gather_elements(
    emit: Callable[[relax.Expr], relax.Expr], data: relax.Expr, index: relax.Expr, axis: int
) -> relax.Expr:
    """Return ``data`` at positions along ``axis``; negative ones count from the end."""
    shape = compat.static_shape(data)
    assert shape is not None
    dtype, size = compat.dtype_of(index), shape[axis]
    zero, last, extent = (relax.const(n, dtype) for n in (0, size - 1, size))
    wrapped = emit(R.where(emit(R.less(index, zero)), emit(R.add(index, extent)), index))
    inside = emit(R.minimum(emit(R.maximum(wrapped, zero)), last))
    return emit(R.gather_elements(data, inside, axis % len(shape)))
