"""Integer programs: what a quantised layer computes, exactly, in numpy.

A program is a chain of steps on int8 rows. A linear step is one launch on VTA (int32 sums, a
bias, ReLU, a right shift for each output channel, clipping to int8); a `Reorder` only moves
bytes. Every kernel, simulator and board must agree with ``run`` bit for bit.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from tvmstruct import ops
from tvmstruct.ops import Array

LOWEST, LARGEST = -128, 127
MOST_SHIFT = 22  # so that 127 << shift and half a step beside it stay far from 2^31


@dataclass(frozen=True, eq=False)
class IntLinear:
    """``y = clip(relu(x @ op + bias) >> shift)``: int8 in and out, sums in int32.

    ``shift`` is an arithmetic right shift (floor), one for each output channel; half a step is
    part of ``bias``, so that the result is rounded to nearest.
    """

    op: ops.Op  # arrays of int8
    bias: Array  # (n_out,) int32
    shift: Array  # (n_out,) int32, 0 to MOST_SHIFT
    relu: bool = False

    @property
    def n_out(self) -> int:
        """Features that the step yields."""
        return self.op.n_out

    @cached_property
    def _wide(self) -> ops.Op:
        return ops.cast(self.op, np.float64)  # products of int8 are exact in float64

    def run(self, x: Array) -> Array:
        """Return int8 rows for int8 rows ``x`` (rows, n_in)."""
        total = self._wide.apply(x.astype(np.float64)).astype(np.int64) + self.bias
        if self.relu:
            total = np.maximum(total, 0)
        return (total >> self.shift).clip(LOWEST, LARGEST).astype(np.int8)


@dataclass(frozen=True, eq=False)
class Reorder:
    """``y[j] = x[index[j]]``, zero where the index is -1: permutations, slices and pads."""

    index: Array  # (n_out,) int64

    @property
    def n_out(self) -> int:
        """Features that the step yields."""
        return self.index.size

    def run(self, x: Array) -> Array:
        """Return ``x`` (rows, n_in) with its features moved."""
        return np.where(self.index < 0, x.dtype.type(0), x[:, self.index])


Step = IntLinear | Reorder


@dataclass(frozen=True, eq=False)
class Program:
    """A chain of steps with the scales of its int8 input and output.

    Real numbers are ``x_scale[i] * x[i]`` and ``y_scale[j] * y[j]``.
    """

    x_scale: Array  # (1,) or (n_in,)
    steps: tuple[Step, ...]
    y_scale: Array  # (n_out,) float32

    @cached_property
    def _inverse(self) -> Array:
        return (1 / self.x_scale).astype(np.float32)

    def quantise(self, x: Array) -> Array:
        """Return the int8 rows nearest to float rows ``x``, at most 127 away from zero."""
        return np.rint(x * self._inverse).clip(-LARGEST, LARGEST).astype(np.int8)

    def run(self, x: Array) -> Array:
        """Return int8 rows for int8 rows."""
        for step in self.steps:
            x = step.run(x)
        return x

    def dequantise(self, y: Array) -> Array:
        """Return float32 rows for int8 rows."""
        return y * self.y_scale

    def __call__(self, x: Array) -> Array:
        """Return float32 rows for float32 rows."""
        return self.dequantise(self.run(self.quantise(x)))

    @property
    def linear(self) -> tuple[IntLinear, ...]:
        """The steps that are launches."""
        return tuple(step for step in self.steps if isinstance(step, IntLinear))


def terms(op: ops.Op) -> tuple[ops.Op, ...]:
    """Return what is added up; a sum between moved features is a sum of products with them."""
    match op:
        case ops.Sum(found):
            return tuple(t for term in found for t in terms(term))
        case ops.Product(many):
            sums = [i for i, f in enumerate(many) if isinstance(f, ops.Sum)]
            others = [f for f in many if not isinstance(f, ops.Sum)]
            if len(sums) != 1 or any(f.macs + f.adds for f in others):
                return (op,)
            i = sums[0]
            return tuple(
                t
                for term in terms(many[i])
                for t in terms(ops.product(*many[:i], term, *many[i + 1 :]))
            )
        case _:
            return (op,)


def factors(op: ops.Op) -> list[ops.Op | Reorder]:
    """Return a product as block factors and reorderings between them, neighbours merged.

    A Walsh-Hadamard transform becomes its blocks of +1 and -1, a diagonal small diagonal blocks.

    Raises ValueError for a sum inside a product, which int8 steps cannot add exactly.
    """
    parts: list[ops.Op | Reorder] = []
    for part in _parts(op):
        if isinstance(part, Reorder) and parts and isinstance(parts[-1], Reorder):
            parts[-1] = Reorder(np.where(part.index < 0, -1, parts[-1].index[part.index]))
        else:
            parts.append(part)
    identity = (p for p in parts if not (isinstance(p, Reorder) and _keeps(p, op, parts)))
    return list(identity)


def _keeps(part: Reorder, op: ops.Op, parts: list[ops.Op | Reorder]) -> bool:
    """Return whether a reordering moves nothing."""
    i = next(k for k, p in enumerate(parts) if p is part)
    n_in = parts[i - 1].n_out if i else op.n_in
    return part.n_out == n_in and bool((part.index == np.arange(n_in)).all())


def _parts(op: ops.Op) -> Iterator[ops.Op | Reorder]:
    match op:
        case ops.Product(many):
            for factor in many:
                yield from _parts(factor)
        case ops.Permute() | ops.Slice() | ops.Pad():
            yield Reorder(op.apply(np.arange(1, op.n_in + 1)[None])[0] - 1)
        case ops.WalshHadamard(n, scale, blocks, inner):
            h = ops.WalshHadamard(n).to_dense() * scale
            yield from _parts(ops.Permute((blocks, n, inner), (0, 2, 1)))
            yield ops.SharedBlockDiag(h, blocks * inner)
            yield from _parts(ops.Permute((blocks, inner, n), (0, 2, 1)))
        case ops.Diag(d):
            side = next(s for s in range(min(16, d.size), 0, -1) if d.size % s == 0)
            yield ops.BlockDiag(d.reshape(-1, 1, side) * np.eye(side))
        case ops.Sum():
            raise ValueError("a sum of operators inside a product has no exact int8 form")
        case _:
            yield op
