"""Axes of tensors as products of loops, so that any chain of layout operators is one index map.

A `Factor` is a loop; each tensor that the loop runs over moves by its own stride, and one that
is repeated does not move. An axis is a tuple of factors, outermost first; loops of size one are
left out. Reshapes regroup factors, transposes reorder axes, and two tensors that meet in an
operator share the factors of the axes on which they meet.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from math import gcd, prod


@dataclass(frozen=True)
class Factor:
    """A loop of ``size`` steps and how far each tensor moves in a step."""

    size: int
    strides: Mapping[str, int] = field(default_factory=dict)

    def stride(self, name: str) -> int:
        """Return how far tensor ``name`` moves, 0 where it is repeated."""
        return self.strides.get(name, 0)

    def split(self, inner: int) -> tuple[Factor, Factor]:
        """Return the loop as an outer one and one of ``inner`` steps."""
        outer = {name: stride * inner for name, stride in self.strides.items()}
        return Factor(self.size // inner, outer), Factor(inner, self.strides)


Axis = tuple[Factor, ...]
Axes = list[Axis]


def size_of(axis: Iterable[Factor]) -> int:
    """Return how many positions an axis has."""
    return prod(factor.size for factor in axis)


def shape_of(axes: Axes) -> tuple[int, ...]:
    """Return the shape of a tensor with these axes."""
    return tuple(map(size_of, axes))


def contiguous(name: str, shape: Sequence[int]) -> Axes:
    """Return the axes of tensor ``name`` in row-major order."""
    strides = [prod(shape[i + 1 :]) for i in range(len(shape))]
    return [
        (Factor(n, {name: stride}),) if n > 1 else ()
        for n, stride in zip(shape, strides, strict=True)
    ]


def number(name: str, axes: Axes) -> Axes:
    """Give the tensor with these axes a name, as if it were stored in row-major order."""
    stride, out = 1, []
    for axis in reversed(axes):
        named = []
        for f in reversed(axis):
            named.append(Factor(f.size, {**f.strides, name: stride}))
            stride *= f.size
        out.append(tuple(reversed(named)))
    return out[::-1]


def regroup(axes: Axes, shape: Sequence[int]) -> Axes | None:
    """Return a reshape of ``axes``, or None where no regrouping of loops is that reshape."""
    rest = merge([f for axis in axes for f in axis])
    out: Axes = []
    for need in shape:
        axis: list[Factor] = []
        while need > 1:
            if not rest:
                return None
            first = rest.pop(0)
            if need % first.size == 0:
                axis.append(first)
                need //= first.size
            elif first.size % need == 0:
                outer, inner = first.split(first.size // need)
                axis.append(outer)
                rest.insert(0, inner)
                need = 1
            else:
                return None
        out.append(tuple(axis))
    return None if rest else out


def merge(factors: Iterable[Factor]) -> list[Factor]:
    """Join neighbours that every tensor walks through in one stride."""
    out: list[Factor] = []
    for f in factors:
        if out and out[-1].strides == {n: s * f.size for n, s in f.strides.items()}:
            out[-1] = Factor(out[-1].size * f.size, f.strides)
        else:
            out.append(f)
    return out


def join(a: Axis, b: Axis) -> Axis | None:
    """Return one axis that moves the tensors of both, or None where their loops do not nest.

    An axis of one position is repeated along the other.
    """
    if not a or not b:
        return a or b
    left, right, out = list(a), list(b), []
    while left and right:
        x, y = left.pop(), right.pop()
        size = gcd(x.size, y.size)
        if size == 1:
            return None
        (more, x), (rest, y) = x.split(size), y.split(size)
        left += [more] if more.size > 1 else []
        right += [rest] if rest.size > 1 else []
        out.append(Factor(size, {**x.strides, **y.strides}))
    return None if left or right else tuple(reversed(out))


def join_all(a: Axes, b: Axes) -> Axes | None:
    """Join two lists of axes as operators broadcast shapes: aligned at the end."""
    rank = max(len(a), len(b))
    a, b = [()] * (rank - len(a)) + a, [()] * (rank - len(b)) + b
    joined = [join(x, y) for x, y in zip(a, b, strict=True)]
    return None if None in joined else [axis for axis in joined if axis is not None]
