"""Linear maps of rows while they are read off a graph: an operator, and where its features lie.

A tensor of a chain is ``root`` times a product of operators. Each loop of its axes
(`tvmstruct.passes.factors`) walks rows of the root, features of the product, or neither, which
repeats a value. Reshapes and transposes move loops and cost nothing; only where an operator needs
its features in a certain order is a `Permute` written.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import prod

import numpy as np
from tvm import relax

from tvmstruct import compat, ops
from tvmstruct.passes.factors import Axes, Axis, Factor, contiguous, merge, size_of
from tvmstruct.simplify import chain, split_prefix

ROW, FEATURE = "row", "feature"


@dataclass(frozen=True)
class Linear:
    """``root`` times ``factors``; ``inside`` are the variables computed on the way."""

    root: relax.Var
    n_in: int
    factors: tuple[ops.Op, ...]
    axes: Axes
    inside: frozenset[relax.Var] = frozenset()
    names: tuple[str, ...] = ()

    @property
    def width(self) -> int:
        """Features of the product."""
        return self.factors[-1].n_out if self.factors else self.n_in

    def then(self, *factors: ops.Op, axes: Axes, names: Sequence[str] = ()) -> Linear:
        """Return the chain with more factors, and its new axes."""
        new = tuple(n for n in dict.fromkeys(names) if n not in self.names)
        return replace(
            self, factors=(*self.factors, *factors), axes=axes, names=(*self.names, *new)
        )


def start(var: relax.Var, made: Linear | None = None) -> Linear | None:
    """Return a tensor as the root of chains: its last axis are features, the others rows.

    Where a chain has ``made`` the tensor, rows and features are those of the chain.
    """
    shape = compat.static_shape(var)
    if not shape or not prod(shape) or compat.dtype_of(var) != "float32":
        return None
    if made is not None and (done := settled(made, prod(shape) // made.width)) is not None:
        return Linear(var, done.width, (), done.axes)
    features: Axis = (Factor(shape[-1], {FEATURE: 1}),) if shape[-1] > 1 else ()
    return Linear(var, shape[-1], (), [*contiguous(ROW, shape[:-1]), features])


def ordered(x: Linear, first: int | None = None) -> Linear:
    """Return the chain with features in the order of the axes, repeated where loops stand still.

    The loops of axis ``first`` come before all others.
    """
    count = len(x.axes)
    order = list(range(count))
    if first is not None:
        order.insert(0, order.pop(first))
    still = [f for axis in x.axes for f in axis if not f.strides]
    copies, width = prod(f.size for f in still), x.width
    if copies > 1:
        x = x.then(_repeat(width, copies), axes=_set_still_in_motion(x.axes, width))
    loops = merge(f for i in order for f in x.axes[i] if FEATURE in f.strides)
    stored = sorted(loops, key=lambda f: -f.stride(FEATURE))
    at = [next(i for i, f in enumerate(stored) if f is g) for g in loops]
    permute = [] if at == sorted(at) else [ops.Permute(tuple(f.size for f in stored), tuple(at))]
    return x.then(*permute, axes=restride(x.axes, order))


def restride(axes: Axes, order: Sequence[int], inner: int = 1) -> Axes:
    """Return axes whose features lie one after the other, axes in ``order``, outermost first."""
    out, stride = list(axes), inner
    for i in reversed(order):
        axis = []
        for f in reversed(axes[i]):
            if ROW not in f.strides:
                f = Factor(f.size, {FEATURE: stride})
                stride *= f.size
            axis.insert(0, f)
        out[i] = tuple(axis)
    return out


def _set_still_in_motion(axes: Axes, width: int) -> Axes:
    """Give loops that stand still the strides of copies, one after the other."""
    out, stride = [], width
    for axis in reversed(axes):
        moved = []
        for f in reversed(axis):
            if not f.strides:
                f = Factor(f.size, {FEATURE: stride})
                stride *= f.size
            moved.insert(0, f)
        out.insert(0, tuple(moved))
    return out


def _repeat(width: int, copies: int) -> ops.Op:
    """Return ``copies`` of all features, one after the other."""
    return ops.add(*(ops.Pad(width, copies * width, i * width) for i in range(copies)))


def has_rows(axis: Axis) -> bool:
    """Return whether an axis walks rows of the root."""
    return any(ROW in f.strides for f in axis)


def settled(x: Linear, rows: int) -> Linear | None:
    """Return the chain with features in order, if its rows are those of the root in order."""
    loops = merge(f for axis in x.axes for f in axis if f.size > 1)
    walked = [f for f in loops if ROW in f.strides]
    if walked != loops[: len(walked)] or len(walked) > 1:
        return None
    if size_of(walked) != rows or (walked and walked[0].stride(ROW) != 1):
        return None
    return ordered(x)


def total(terms: Sequence[Linear]) -> Linear | str:
    """Return the sum of chains on one root; where one is repeated, the others' loops say how."""
    count = len(terms[0].axes)
    spread = [_spread(t, [u.axes for u in terms], count) for t in terms]
    done = [ordered(t) for t in spread]
    if any(_loops(t.axes) != _loops(done[0].axes) for t in done):
        return "adds tensors whose rows lie differently"
    return _join(done, [t.factors for t in done], done[0].axes)


def _spread(x: Linear, others: Sequence[Axes], count: int) -> Linear:
    axes = [x.axes[i] or max((o[i] for o in others), key=size_of, default=()) for i in range(count)]
    still = [axis if x.axes[i] else tuple(Factor(f.size) for f in axis if ROW not in f.strides)
             for i, axis in enumerate(axes)]  # fmt: skip
    return replace(x, axes=still)


def side_by_side(terms: Sequence[Linear | int], axis: int) -> Linear | str:
    """Return tensors joined along an axis; a number stands for so many zeros."""
    given = [t for t in terms if isinstance(t, Linear)]
    if any(has_rows(t.axes[axis]) for t in given):
        return "joins rows"
    done = [ordered(t, axis) for t in given]
    rest = [[a for i, a in enumerate(_loops(t.axes)) if i != axis] for t in done]
    if any(r != rest[0] for r in rest[1:]):
        return "joins tensors whose rows lie differently"
    unit = done[0].width // size_of(done[0].axes[axis])
    sizes = [t if isinstance(t, int) else size_of(t.axes[axis]) for t in terms]
    width, offset, left = sum(sizes) * unit, 0, list(done)
    chains = []
    for term, size in zip(terms, sizes, strict=True):
        if isinstance(term, Linear):
            chains.append((*left.pop(0).factors, ops.Pad(size * unit, width, offset * unit)))
        offset += size
    axes = list(done[0].axes)
    axes[axis] = (Factor(sum(sizes), {FEATURE: unit}),)
    return _join(done, chains, axes)


def _join(terms: Sequence[Linear], chains: Sequence[tuple[ops.Op, ...]], axes: Axes) -> Linear:
    """Return the sum of chains of factors, with what they share in front."""
    before, rest = split_prefix(chains)
    width = before[-1].n_out if before else terms[0].n_in
    if len(chains) > 1:
        before = (*before, ops.add(*(chain(width, r) for r in rest)))
    names = dict.fromkeys(n for t in terms for n in t.names)
    inside = frozenset().union(*(t.inside for t in terms))
    return replace(terms[0], factors=before, axes=axes, names=tuple(names), inside=inside)


def _loops(axes: Axes) -> list[list[Factor]]:
    return [merge(axis) for axis in axes]


def cut(x: Linear, axis: int, begin: int, step: int, size: int) -> Linear | str:
    """Return every ``step``-th of the positions of an axis from ``begin`` on, ``size`` of them."""
    extent = size_of(x.axes[axis])
    if has_rows(x.axes[axis]):
        return "takes some rows"
    if step == 1 and size == extent:
        return x
    x = ordered(x, axis)
    unit, axes = x.width // extent, list(x.axes)
    axes[axis] = (Factor(size, {FEATURE: unit}),) if size > 1 else ()
    if step == 1:
        return x.then(ops.Slice(x.width, (begin + size) * unit, begin * unit), axes=axes)
    if extent % step or begin >= step or size != extent // step:
        return f"takes {size} of {extent} features, each {step} apart"
    sort = ops.Permute((size, step, unit), (1, 0, 2))
    part = ops.Slice(x.width, (begin + 1) * size * unit, begin * size * unit)
    return x.then(sort, part, axes=axes)


def scale(x: Linear, by: np.ndarray, names: Sequence[str]) -> Linear | str:
    """Return the chain times an array that is the same for all rows."""
    x = ordered(x)
    sizes = [1 if has_rows(axis) else size_of(axis) for axis in x.axes]
    by = by.reshape((1,) * (len(sizes) - by.ndim) + by.shape)
    if any(a not in (1, b) for a, b in zip(by.shape, sizes, strict=True)):
        return "multiplies rows by different numbers"
    if (by == by.flat[0]).all():
        return x.then(ops.scaling(x.width, float(by.flat[0])), axes=x.axes)
    vector = np.ascontiguousarray(np.broadcast_to(by, sizes)).reshape(-1)
    return x.then(ops.Diag(vector), axes=x.axes, names=names)


def multiply(x: Linear, w: np.ndarray, names: Sequence[str]) -> Linear | str:
    """Return ``x @ w`` of the last two axes of both, w (..., p, q) broadcast as matmul does it.

    Where the batch of w goes along features there are blocks, where x is repeated for it the
    blocks grow in q, and features that w does not know repeat it.
    """
    batch = max(len(x.axes), w.ndim) - 2
    axes: Axes = [()] * (batch + 2 - len(x.axes)) + list(x.axes)
    w = w.reshape((1,) * (batch + 2 - w.ndim) + w.shape)
    for i, size in enumerate(w.shape[:batch]):
        axes[i] = axes[i] or ((Factor(size),) if size > 1 else ())
        if size > 1 and has_rows(axes[i]):
            return "there is a matrix for each of some rows, not of some features"
    if has_rows(axes[-1]):
        return "the sum runs over rows"
    x = replace(x, axes=axes)
    mixed = [any(not f.strides for f in a) and any(f.strides for f in a) for a in axes[:batch]]
    if any(mixed) or any(not f.strides for a in axes[batch:] for f in a):
        x = ordered(x)
    copied = [bool(a) and not any(f.strides for f in a) for a in x.axes[:batch]]
    kept = [() if i < batch and copied[i] else a for i, a in enumerate(x.axes)]
    x = ordered(replace(x, axes=kept))
    fans = [axes[i] if copied[i] else () for i in range(batch)]
    return _blocks(x, w, fans, names)


def _blocks(x: Linear, w: np.ndarray, fans: Axes, names: Sequence[str]) -> Linear:
    batch, (p, q) = len(fans), w.shape[-2:]
    sizes = [1 if has_rows(a) else size_of(a) for a in x.axes]
    features = prod(sizes[:-1])
    fan = prod(w.shape[i] for i in range(batch) if fans[i])
    moved = [i for i in range(batch) if fans[i]]
    stay = [i for i in range(batch) if not fans[i]]
    rows = w.transpose([*stay, batch, *moved, batch + 1])
    rows = rows.reshape([*(w.shape[i] for i in stay), 1, p, fan * q])
    if features == 1:
        node: ops.Op = ops.Dense(rows.reshape(p, fan * q))
    elif rows.size == p * fan * q:
        node = ops.SharedBlockDiag(rows.reshape(p, fan * q), features)
    else:
        wide = np.broadcast_to(rows, [*(sizes[i] for i in stay), sizes[batch], p, fan * q])
        node = ops.BlockDiag(wide.reshape(features, p, fan * q))
    axes = restride([*x.axes[:-1], ()], range(batch + 2), fan * q)
    stride = q
    for i in reversed(moved):
        axes[i] = (Factor(w.shape[i], {FEATURE: stride}),)
        stride *= w.shape[i]
    axes[-1] = (Factor(q, {FEATURE: 1}),) if q > 1 else ()
    return x.then(node, axes=axes, names=names)
