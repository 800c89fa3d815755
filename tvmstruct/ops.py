"""The operator algebra: ten frozen node types, numpy only, row vectors.

Every node is a linear map ``y = x @ op.to_dense()``, so reading order is execution
order: ``a @ b`` applies ``a`` first.  ``@`` and ``+`` flatten and do nothing else.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import reduce
from typing import Any

import numpy as np
from numpy.typing import DTypeLike, NDArray

Array = NDArray[Any]


class Op:
    """A linear map ``x -> x @ op.to_dense()`` from ``n_in`` to ``n_out`` features."""

    @property
    def n_in(self) -> int:
        """Features that the operator takes."""
        raise NotImplementedError

    @property
    def n_out(self) -> int:
        """Features that the operator yields."""
        raise NotImplementedError

    @property
    def macs(self) -> int:
        """Multiply-accumulates with stored parameters for one row of ``x``."""
        return 0

    @property
    def adds(self) -> int:
        """Additions without a stored parameter for one row: Hadamard butterflies and sums."""
        return 0

    @property
    def params(self) -> int:
        """Stored parameters; an array that is used twice counts once."""
        return sum(a.size for a in self.arrays())

    def apply(self, x: Array) -> Array:
        """Return ``x @ self.to_dense()`` for ``x`` of shape ``(..., n_in)``."""
        raise NotImplementedError

    def arrays(self) -> Iterator[Array]:
        """Yield each distinct parameter array once, in order of first use."""
        yield from {identity(a): a for a in self.leaf_arrays()}.values()

    def to_dense(self) -> Array:
        """Return the ``(n_in, n_out)`` matrix in float64; for fitting and tests only."""
        if self.n_in <= self.n_out:
            return self.apply(np.eye(self.n_in))
        return transpose(self).apply(np.eye(self.n_out)).T

    def __repr__(self) -> str:
        return describe(self)

    def __matmul__(self, other: Op) -> Op:
        return product(self, other)

    def __add__(self, other: Op) -> Op:
        return add(self, other)

    def leaf_arrays(self) -> Iterator[Array]:
        """Yield the parameter array of every leaf, shared ones as often as they are used."""
        yield from ()


@dataclass(frozen=True, eq=False, repr=False)
class Dense(Op):
    """An unstructured matrix: ``y = x @ w``."""

    w: Array  # (n_in, n_out)

    def __post_init__(self) -> None:
        _check_array("Dense", "w", self.w, "n_in n_out")

    @property
    def n_in(self) -> int:
        return self.w.shape[0]

    @property
    def n_out(self) -> int:
        return self.w.shape[1]

    @property
    def macs(self) -> int:
        return self.w.size

    def apply(self, x: Array) -> Array:
        """Return ``x @ w``."""
        _check_input(self, x)
        return x @ self.w

    def leaf_arrays(self) -> Iterator[Array]:
        yield self.w


@dataclass(frozen=True, eq=False, repr=False)
class BlockDiag(Op):
    """``g`` independent ``p x q`` blocks on the diagonal: ``y[g] = x[g] @ w[g]``."""

    w: Array  # (g, p, q)

    def __post_init__(self) -> None:
        _check_array("BlockDiag", "w", self.w, "g p q")

    @property
    def n_in(self) -> int:
        return self.w.shape[0] * self.w.shape[1]

    @property
    def n_out(self) -> int:
        return self.w.shape[0] * self.w.shape[2]

    @property
    def macs(self) -> int:
        return self.w.size

    def apply(self, x: Array) -> Array:
        """Return the blocks' products side by side."""
        _check_input(self, x)
        g, p, _ = self.w.shape
        rows = x.reshape(_row_count(x), g, p).swapaxes(0, 1)  # (g, rows, p)
        return (rows @ self.w).swapaxes(0, 1).reshape(*x.shape[:-1], self.n_out)

    def leaf_arrays(self) -> Iterator[Array]:
        yield self.w


@dataclass(frozen=True, eq=False, repr=False)
class SharedBlockDiag(Op):
    """The same ``p x q`` block, ``blocks`` times on the diagonal: ``I (x) w``."""

    w: Array  # (p, q)
    blocks: int

    def __post_init__(self) -> None:
        _check_array("SharedBlockDiag", "w", self.w, "p q")
        _check_sizes("SharedBlockDiag", blocks=self.blocks)

    @property
    def n_in(self) -> int:
        return self.blocks * self.w.shape[0]

    @property
    def n_out(self) -> int:
        return self.blocks * self.w.shape[1]

    @property
    def macs(self) -> int:
        return self.blocks * self.w.size

    def apply(self, x: Array) -> Array:
        """Return ``x[block] @ w`` for every block."""
        _check_input(self, x)
        y = x.reshape(_row_count(x) * self.blocks, self.w.shape[0]) @ self.w
        return y.reshape(*x.shape[:-1], self.n_out)

    def leaf_arrays(self) -> Iterator[Array]:
        yield self.w


@dataclass(frozen=True, eq=False, repr=False)
class Permute(Op):
    """Reorder features: reshape to ``dims``, transpose by ``axes``, flatten."""

    dims: tuple[int, ...]
    axes: tuple[int, ...]

    def __post_init__(self) -> None:
        if not self.dims or min(self.dims) < 1 or sorted(self.axes) != list(range(len(self.dims))):
            raise ValueError(
                f"Permute: dims={self.dims} and axes={self.axes}; want positive dims and axes "
                f"that are a permutation of 0..{len(self.dims) - 1}"
            )

    @property
    def n_in(self) -> int:
        return math.prod(self.dims)

    @property
    def n_out(self) -> int:
        return math.prod(self.dims)

    def apply(self, x: Array) -> Array:
        """Return ``x`` with its features reordered."""
        _check_input(self, x)
        axes = (0, *(a + 1 for a in self.axes))
        return x.reshape(_row_count(x), *self.dims).transpose(axes).reshape(x.shape)


@dataclass(frozen=True, eq=False, repr=False)
class Diag(Op):
    """An elementwise product: ``y = x * d``."""

    d: Array  # (n,)

    def __post_init__(self) -> None:
        _check_array("Diag", "d", self.d, "n")

    @property
    def n_in(self) -> int:
        return self.d.size

    @property
    def n_out(self) -> int:
        return self.d.size

    @property
    def macs(self) -> int:
        return self.d.size

    def apply(self, x: Array) -> Array:
        """Return ``x * d``."""
        _check_input(self, x)
        return x * self.d

    def leaf_arrays(self) -> Iterator[Array]:
        yield self.d


@dataclass(frozen=True, eq=False, repr=False)
class WalshHadamard(Op):
    """``I_blocks (x) scale H_n (x) I_inner``; Sylvester's ``H_2n = [[H, H], [H, -H]]``, H_1 = 1.

    It stores nothing and costs ``n_in * log2(n)`` ``adds`` and no ``macs``; the scale is a
    constant that folds into a neighbour.  ``n = 1`` is multiplication by ``scale``.
    """

    n: int
    scale: float = 1.0
    blocks: int = 1
    inner: int = 1

    def __post_init__(self) -> None:
        _check_sizes("WalshHadamard", n=self.n, blocks=self.blocks, inner=self.inner)
        if self.n & (self.n - 1):
            raise ValueError(
                f"WalshHadamard: n={self.n} is not a power of two; "
                f"pad the features to {next_power_of_two(self.n)} with Pad"
            )
        if not math.isfinite(self.scale):
            raise ValueError(f"WalshHadamard: scale={self.scale}; want a finite number")

    @property
    def n_in(self) -> int:
        return self.n * self.blocks * self.inner

    @property
    def n_out(self) -> int:
        return self.n_in

    @property
    def adds(self) -> int:
        return self.n_in * (self.n.bit_length() - 1)

    def apply(self, x: Array) -> Array:
        """Return the scaled transform over the middle axis of ``blocks x n x inner`` features."""
        _check_input(self, x)
        y = x * float(self.scale)
        for level in range(self.n.bit_length() - 1):
            half = self.inner << level
            pairs = y.reshape(y.size // (2 * half), 2, half)
            a, b = pairs[:, 0], pairs[:, 1]
            y = np.stack((a + b, a - b), axis=1)
        return y.reshape(x.shape)


@dataclass(frozen=True, eq=False, repr=False)
class Slice(Op):
    """Keep the features ``start .. stop - 1`` of ``width``: ``y = x[..., start:stop]``."""

    width: int
    stop: int
    start: int = 0

    def __post_init__(self) -> None:
        _check_sizes("Slice", width=self.width)
        if not 0 <= self.start < self.stop <= self.width:
            raise ValueError(
                f"Slice: start={self.start}, stop={self.stop} of width={self.width} features; "
                "want 0 <= start < stop <= width"
            )

    @property
    def n_in(self) -> int:
        return self.width

    @property
    def n_out(self) -> int:
        return self.stop - self.start

    def apply(self, x: Array) -> Array:
        """Return ``x[..., start:stop]``."""
        _check_input(self, x)
        return x[..., self.start : self.stop]


@dataclass(frozen=True, eq=False, repr=False)
class Pad(Op):
    """Put ``size`` features at ``start`` of ``width`` zeros."""

    size: int
    width: int
    start: int = 0

    def __post_init__(self) -> None:
        _check_sizes("Pad", size=self.size, width=self.width)
        if not 0 <= self.start <= self.width - self.size:
            raise ValueError(
                f"Pad: size={self.size} at start={self.start} does not fit width={self.width}; "
                "want 0 <= start and start + size <= width"
            )

    @property
    def n_in(self) -> int:
        return self.size

    @property
    def n_out(self) -> int:
        return self.width

    def apply(self, x: Array) -> Array:
        """Return ``x`` with zeros before and after."""
        _check_input(self, x)
        y = np.zeros((*x.shape[:-1], self.width), x.dtype)
        y[..., self.start : self.start + self.size] = x
        return y


@dataclass(frozen=True, eq=False, repr=False)
class Sum(Op):
    """``y = sum_t x @ terms[t]``; build it with ``+`` or ``add``."""

    terms: tuple[Op, ...]

    def __post_init__(self) -> None:
        if not self.terms:
            raise ValueError("Sum: no terms; want at least one operator")
        for i, term in enumerate(self.terms):
            if (term.n_in, term.n_out) != (self.n_in, self.n_out):
                raise ValueError(
                    f"Sum: term 0 ({_name(self.terms[0])}) is {self.n_in}x{self.n_out} but "
                    f"term {i} ({_name(term)}) is {term.n_in}x{term.n_out}; "
                    "terms must agree, is Pad or Slice missing?"
                )

    @property
    def n_in(self) -> int:
        return self.terms[0].n_in

    @property
    def n_out(self) -> int:
        return self.terms[0].n_out

    @property
    def macs(self) -> int:
        return sum(t.macs for t in self.terms)

    @property
    def adds(self) -> int:
        """Additions inside the terms and between them."""
        return sum(t.adds for t in self.terms) + (len(self.terms) - 1) * self.n_out

    def apply(self, x: Array) -> Array:
        """Return the sum of the terms' results."""
        _check_input(self, x)
        return reduce(lambda y, t: y + t.apply(x), self.terms[1:], self.terms[0].apply(x))

    def leaf_arrays(self) -> Iterator[Array]:
        for term in self.terms:
            yield from term.leaf_arrays()


@dataclass(frozen=True, eq=False, repr=False)
class Product(Op):
    """``y = x @ factors[0] @ factors[1] @ ...``; build it with ``@`` or ``product``."""

    factors: tuple[Op, ...]

    def __post_init__(self) -> None:
        if not self.factors:
            raise ValueError("Product: no factors; want at least one operator")
        for i, (a, b) in enumerate(zip(self.factors, self.factors[1:], strict=False)):
            if a.n_out != b.n_in:
                raise ValueError(
                    f"product: factor {i} ({_name(a)}) yields {a.n_out} features but "
                    f"factor {i + 1} ({_name(b)}) takes {b.n_in}; "
                    "operators apply left to right, is the order reversed?"
                )

    @property
    def n_in(self) -> int:
        return self.factors[0].n_in

    @property
    def n_out(self) -> int:
        return self.factors[-1].n_out

    @property
    def macs(self) -> int:
        return sum(f.macs for f in self.factors)

    @property
    def adds(self) -> int:
        return sum(f.adds for f in self.factors)

    def apply(self, x: Array) -> Array:
        """Apply the factors from left to right."""
        return reduce(lambda y, f: f.apply(y), self.factors, x)

    def leaf_arrays(self) -> Iterator[Array]:
        for factor in self.factors:
            yield from factor.leaf_arrays()


def product(*ops: Op) -> Op:
    """Chain operators left to right; nested products are flattened, nothing else."""
    flat = tuple(f for op in ops for f in (op.factors if isinstance(op, Product) else (op,)))
    return flat[0] if len(flat) == 1 else Product(flat)


def add(*ops: Op) -> Op:
    """Add operators of one shape; nested sums are flattened, nothing else."""
    flat = tuple(t for op in ops for t in (op.terms if isinstance(op, Sum) else (op,)))
    return flat[0] if len(flat) == 1 else Sum(flat)


def swap(a: int, b: int) -> Permute:
    """Transpose an ``a x b`` grid of features to ``b x a``."""
    return Permute((a, b), (1, 0))


def scaling(n: int, value: float) -> WalshHadamard:
    """Multiply ``n`` features by the constant ``value``: ``value I``, nothing stored."""
    return WalshHadamard(1, scale=value, blocks=n)


def transpose(op: Op) -> Op:
    """Return the operator whose matrix is ``op.to_dense().T``, with the arrays viewed."""
    match op:
        case Dense(w) | SharedBlockDiag(w):
            return replace(op, w=w.T)
        case BlockDiag(w):
            return BlockDiag(w.swapaxes(1, 2))
        case Permute(dims, axes):
            inverse = tuple(axes.index(i) for i in range(len(axes)))
            return Permute(tuple(dims[a] for a in axes), inverse)
        case Slice(width, stop, start):
            return Pad(stop - start, width, start)
        case Pad(size, width, start):
            return Slice(width, start + size, start)
        case Sum(terms):
            return Sum(tuple(transpose(t) for t in terms))
        case Product(factors):
            return Product(tuple(transpose(f) for f in reversed(factors)))
        case _:
            return op  # Diag and WalshHadamard are symmetric


def map_arrays(op: Op, f: Callable[[Array], Array]) -> Op:
    """Rebuild ``op`` with every parameter array ``a`` replaced by ``f(a)``, sharing kept."""
    done: dict[tuple[object, ...], Array] = {}

    def once(array: Array) -> Array:
        key = identity(array)
        if key not in done:
            done[key] = f(array)
        return done[key]

    return _map_arrays(op, once)


def _map_arrays(op: Op, f: Callable[[Array], Array]) -> Op:
    match op:
        case Dense(w) | BlockDiag(w) | SharedBlockDiag(w):
            return replace(op, w=f(w))
        case Diag(d):
            return Diag(f(d))
        case Sum(terms):
            return Sum(tuple(_map_arrays(t, f) for t in terms))
        case Product(factors):
            return Product(tuple(_map_arrays(t, f) for t in factors))
        case _:
            return op


def cast(op: Op, dtype: DTypeLike) -> Op:
    """Rebuild ``op`` with contiguous arrays of ``dtype``."""
    return map_arrays(op, lambda a: np.ascontiguousarray(a, dtype))


def pad(n: int, width: int) -> tuple[Op, ...]:
    """Return ``(Pad,)`` where ``width`` is more than ``n``, else nothing to chain."""
    return () if n == width else (Pad(n, width),)


def crop(width: int, n: int) -> tuple[Op, ...]:
    """Return ``(Slice,)`` where ``width`` is more than ``n``, else nothing to chain."""
    return () if n == width else (Slice(width, n),)


def zeros(*shape: int) -> Array:
    """Return an array of its own of float32 zeros: a parameter that has no value yet."""
    return np.zeros(shape, np.float32)


def next_power_of_two(n: int) -> int:
    """Return the least power of two that is at least ``n``."""
    return 1 << (n - 1).bit_length()


def describe(op: Op) -> str:
    """Return the expression on one line, such as ``Dense(8x2) @ Dense(2x6)``."""
    match op:
        case Sum(terms):
            return " + ".join(describe(t) for t in terms)
        case Product(factors):
            return " @ ".join(_parenthesise(f) for f in factors)
        case Permute(dims, axes):
            return f"Permute({_by(dims)} by {','.join(map(str, axes))})"
        case SharedBlockDiag(w, blocks):
            return f"SharedBlockDiag({blocks} of {_by(w.shape)})"
        case BlockDiag(w):
            return f"BlockDiag({w.shape[0]} blocks {_by(w.shape[1:])})"
        case Slice(width, stop, start):
            return f"Slice({start}:{stop} of {width})"
        case Pad(size, width, start):
            return f"Pad({size} at {start} of {width})"
        case WalshHadamard(n, scale, blocks, inner):
            within = f" of {inner}" if inner > 1 else ""
            return f"WalshHadamard({n}{within} x{blocks}, scale {scale:g})"
        case _:
            return f"{_name(op)}({op.n_in}x{op.n_out})"


def identity(a: Array) -> tuple[object, ...]:
    """Return a key that two views share exactly when they show the same memory alike."""
    return a.__array_interface__["data"], a.shape, a.strides


def _row_count(x: Array) -> int:
    return math.prod(x.shape[:-1])  # explicit, because reshape(-1) fails on an empty batch


def _parenthesise(op: Op) -> str:
    return f"({describe(op)})" if isinstance(op, Sum) else describe(op)


def _by(shape: tuple[int, ...]) -> str:
    return "x".join(map(str, shape))


def _name(op: Op) -> str:
    return type(op).__name__


def _check_array(node: str, field: str, array: Array, sides: str) -> None:
    want = f"({', '.join(sides.split())})"
    if not isinstance(array, np.ndarray):  # pyright: ignore[reportUnnecessaryIsInstance]
        raise ValueError(
            f"{node}: {field} is a {type(array).__name__}; want a numpy array {want}, "
            "wrap it in np.asarray"
        )
    if array.ndim != len(sides.split()) or array.size == 0:
        raise ValueError(
            f"{node}: {field} has shape {array.shape}; want {want} with no side of length 0"
        )


def _check_sizes(node: str, **sizes: int) -> None:
    for name, value in sizes.items():
        if value < 1:
            raise ValueError(f"{node}: {name}={value}; want {name} >= 1")


def _check_input(op: Op, x: Array) -> None:
    if x.shape[-1:] != (op.n_in,):
        raise ValueError(
            f"{_name(op)}: x has shape {x.shape}; want (..., {op.n_in}), the last axis is features"
        )
