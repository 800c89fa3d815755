"""Cut an operator into parts of its outputs that share no work: what threads do without waiting.

Outputs are followed back through the factors. A transform within blocks keeps blocks apart, a
permutation only moves them, so the repeats of BH4 are independent from their first factor on,
which reads all inputs.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import singledispatch
from math import prod

import numpy as np

from tvmstruct import ops
from tvmstruct.ops import Array, Op, product
from tvmstruct.stages import MatMul, Program, lower

LEAST_PRODUCTS = 3  # matrix products in a row from which on waiting after each costs too much
Narrowed = tuple[
    Op, "Cut | None"
]  # what is left of an operator, and the inputs it reads (None: all)


@dataclass(frozen=True)
class Cut:
    """The features (outer, size, inner) from ``start`` to ``stop`` along the middle axis."""

    outer: int
    size: int
    inner: int
    start: int
    stop: int

    @property
    def count(self) -> int:
        """Steps along the middle axis that are left."""
        return self.stop - self.start

    def take(self, array: Array, axis: int) -> Array:
        """Return what is left of an axis of features."""
        axis %= array.ndim
        before, after = array.shape[:axis], array.shape[axis + 1 :]
        apart = array.reshape(*before, self.outer, self.size, self.inner, *after)
        kept = apart.take(range(self.start, self.stop), axis + 1)
        return np.ascontiguousarray(kept.reshape(*before, -1, *after))

    def over(self, inner: int) -> Cut:
        """Return the same cut of groups, where each is ``inner`` features and now is one."""
        return replace(self, inner=self.inner // inner)

    def read(self, n: int) -> Op:
        """Return the operator that reads these of ``n`` features."""
        start, stop = self.start * self.inner, self.stop * self.inner
        if self.outer == 1:
            return ops.Slice(n, stop, start)
        ahead = ops.Permute((self.outer, self.size, self.inner), (1, 0, 2))
        kept = ops.Slice(n, stop * self.outer, start * self.outer)
        return product(ahead, kept, ops.Permute((self.count, self.outer, self.inner), (1, 0, 2)))


def output_parts(op: Op, count: int) -> list[Op] | None:
    """Return ``count`` operators whose outputs side by side are those of ``op``.

    All read the same inputs. None where equal parts would share multiply-adds, or where a part
    cannot be followed.
    """
    if count < 2 or op.n_out % count:
        return None
    parts = []
    for i in range(count):
        found = narrow(op, Cut(1, count, op.n_out // count, i, i + 1))
        if found is None:
            return None
        parts.append(_reading_all(found, op.n_in))
    return parts


def lower_parts(op: Op, lanes: int, count: int, *, form: str = "float") -> Program:
    """Return the program of ``op``, in ``count`` parts where threads would else wait often."""
    whole = lower(op, lanes, form=form)
    if sum(isinstance(stage, MatMul) for stage in whole.stages) < LEAST_PRODUCTS:
        return whole
    parts = [lower(part, lanes, form=form) for part in output_parts(op, count) or ()]
    if not parts or any(part.key != parts[0].key for part in parts):
        return whole
    weights = [np.concatenate(same) for same in zip(*(p.weights for p in parts), strict=True)]
    return replace(parts[0], weights=weights, parts=count)


def _reading_all(found: Narrowed, n_in: int) -> Op:
    op, cut = found
    return op if cut is None else product(cut.read(n_in), op)


@singledispatch
def narrow(op: Op, cut: Cut) -> Narrowed | None:
    """Return ``op`` for a cut of its outputs only, and which inputs that reads."""
    return None


@narrow.register
def _(op: ops.Product, cut: Cut) -> Narrowed | None:
    factors: list[Op] = []
    wanted: Cut | None = cut
    for factor in reversed(op.factors):
        if wanted is None:
            if factor.macs:  # every part would do it again
                return None
            factors.append(factor)
            continue
        found = narrow(factor, wanted)
        if found is None:
            return None
        factors.append(found[0])
        wanted = found[1]
    return product(*reversed(factors)), wanted


@narrow.register
def _(op: ops.Sum, cut: Cut) -> Narrowed | None:
    terms = []
    for term in op.terms:
        if _is_empty(term, cut):
            continue
        found = narrow(term, cut)
        if found is None:
            return None
        terms.append(found)
    if not terms:
        return None
    wanted = {found[1] for found in terms}
    if len(wanted) == 1:
        return ops.add(*(term for term, _ in terms)), wanted.pop()
    return ops.add(*(_reading_all(found, op.n_in) for found in terms)), None


def _is_empty(op: Op, cut: Cut) -> bool:
    """Return whether a padding leaves only zeros."""
    last = op.factors[-1] if isinstance(op, ops.Product) else op
    if not isinstance(last, ops.Pad) or cut.outer > 1:
        return False
    start, stop = cut.start * cut.inner, cut.stop * cut.inner
    return stop <= last.start or start >= last.start + last.n_in


@narrow.register
def _(op: ops.Pad, cut: Cut) -> Narrowed | None:
    start, stop = cut.start * cut.inner - op.start, cut.stop * cut.inner - op.start
    if cut.outer > 1 or start < 0 or stop > op.n_in:
        return None
    return _identity(stop - start), Cut(1, op.n_in, 1, start, stop)


@narrow.register
def _(op: ops.Slice, cut: Cut) -> Narrowed | None:
    if cut.outer > 1:
        return None
    start, stop = (op.start + end * cut.inner for end in (cut.start, cut.stop))
    return _identity(stop - start), Cut(1, op.n_in, 1, start, stop)


@narrow.register
def _(op: ops.Permute, cut: Cut) -> Narrowed | None:
    sizes = [op.dims[axis] for axis in op.axes]
    for k, (axis, size) in enumerate(zip(op.axes, sizes, strict=True)):
        if prod(sizes[:k]) == cut.outer and size % cut.size == 0:
            each = size // cut.size
            if prod(sizes[k + 1 :]) * each == cut.inner:
                outer, inner = prod(op.dims[:axis]), prod(op.dims[axis + 1 :]) * each
                dims = (*op.dims[:axis], each * cut.count, *op.dims[axis + 1 :])
                return ops.Permute(dims, op.axes), replace(cut, outer=outer, inner=inner)
    return None


@narrow.register
def _(op: ops.Dense, cut: Cut) -> Narrowed:
    return ops.Dense(cut.take(op.w, 1)), None


@narrow.register
def _(op: ops.BlockDiag, cut: Cut) -> Narrowed | None:
    groups, p, q = op.w.shape
    if cut.inner % q == 0:
        some = cut.over(q)
        return ops.BlockDiag(some.take(op.w, 0)), replace(some, inner=some.inner * p)
    if q % (cut.size * cut.inner) == 0:
        within = replace(cut, outer=cut.outer // groups)
        return ops.BlockDiag(within.take(op.w, 2)), None
    return None


@narrow.register
def _(op: ops.SharedBlockDiag, cut: Cut) -> Narrowed | None:
    p, q = op.w.shape
    if cut.inner % q == 0:
        blocks = op.blocks // cut.size * cut.count
        return ops.SharedBlockDiag(op.w, blocks), replace(cut, inner=cut.inner // q * p)
    if q % (cut.size * cut.inner) == 0:
        within = replace(cut, outer=cut.outer // op.blocks)
        return ops.SharedBlockDiag(within.take(op.w, 1), op.blocks), None
    return None


@narrow.register
def _(op: ops.Diag, cut: Cut) -> Narrowed:
    return ops.Diag(cut.take(op.d, 0)), cut


@narrow.register
def _(op: ops.WalshHadamard, cut: Cut) -> Narrowed | None:
    if cut.inner % (op.n * op.inner) == 0:
        return replace(op, blocks=op.blocks // cut.size * cut.count), cut
    if op.inner % (cut.size * cut.inner) == 0:
        return replace(op, inner=op.inner // cut.size * cut.count), cut
    return None


def _identity(n: int) -> Op:
    return ops.Permute((n,), (0,))
