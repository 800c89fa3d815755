"""Random weights of products: the variance of what comes out equals a dense layer's.

A dense layer of PyTorch draws from U(-a, a) with ``a = 1 / sqrt(n_in)``, so unit variance in is
1/3 out. A product of factors drawn so would give 1/3 for each of them: activations and gradients
fade. Here every factor keeps the variance, and all are then scaled alike until the whole product
has what is wanted. Variances are followed feature by feature through the expression, which is
exact for independent weights of mean 0.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import reduce
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from tvmstruct.ops import Array

if TYPE_CHECKING:
    from tvmstruct.training.linear import StructuredOperator

DENSE_GAIN = 1 / 3  # variance that nn.Linear makes of unit variance
STEPS = 60  # of bisection
Shapes = list[tuple[int, ...]]
Spread = Callable[[int, float], float]  # array, the variance's growth at unit weights -> std


def initialise(module: StructuredOperator, gain: float = DENSE_GAIN) -> None:
    """Draw every array so that unit variance comes out as ``gain``, averaged over features.

    Uniform numbers from torch's generator; a bias is drawn like that of ``nn.Linear``.
    """
    arrays = module.arrays()
    stds = deviations(module.expression, [tuple(a.shape) for a in arrays], module.in_features, gain)
    with torch.no_grad():
        for array, std in zip(arrays, stds, strict=True):
            array.uniform_(-math.sqrt(3) * std, math.sqrt(3) * std)
        bias = getattr(module, "bias", None)
        if bias is not None:
            bound = 1 / math.sqrt(module.in_features)
            bias.uniform_(-bound, bound)


def deviations(expression: Any, shapes: Shapes, n_in: int, gain: float) -> list[float]:
    """Return a standard deviation for each array, see `initialise`.

    Where parts without weights (the residual of BH4) bring more than ``gain`` by themselves,
    ``gain`` is what the weights add.
    """
    stds = [1.0] * len(shapes)

    def keep(array: int, growth: float) -> float:
        stds[array] = 1 / math.sqrt(growth) if growth > 0 else 1.0
        return stds[array]

    ones = np.ones(n_in)
    _variances(expression, ones, shapes, keep)

    def total(factor: float) -> float:
        return float(_variances(expression, ones, shapes, lambda i, _: factor * stds[i]).mean())

    fixed = total(0.0)
    wanted = gain if gain > fixed else gain + fixed
    low, high = 1e-6, 1.0
    while total(high) < wanted and high < 1e6:
        high *= 2
    for _ in range(STEPS):
        middle = math.sqrt(low * high)
        low, high = (middle, high) if total(middle) < wanted else (low, middle)
    return [high * std for std in stds]


def _variances(text: Any, v: Array, shapes: Shapes, spread: Spread) -> Array:
    """Return the variances (n_out,) of features whose inputs have the variances v (n_in,)."""
    match text:
        case ["Product", factors]:
            return reduce(lambda u, f: _variances(f, u, shapes, spread), factors, v)
        case ["Sum", terms]:
            return reduce(np.add, (_variances(t, v, shapes, spread) for t in terms))
        case ["Dense", w]:
            return _blocks(v, 1, *shapes[w], w, spread)
        case ["BlockDiag", w]:
            return _blocks(v, *shapes[w], w, spread)
        case ["SharedBlockDiag", w, blocks]:
            return _blocks(v, blocks, *shapes[w], w, spread)
        case ["Diag", d]:
            return v * spread(d, float(v.mean())) ** 2
        case _:
            return _fixed_variances(text, v)


def _fixed_variances(text: Any, v: Array) -> Array:
    """Do the same for a node without arrays."""
    match text:
        case ["Permute", dims, axes]:
            return v.reshape(dims).transpose(axes).reshape(-1)
        case ["WalshHadamard", n, scale, blocks, inner]:
            sums = v.reshape(blocks, n, inner).sum(1, keepdims=True)
            return np.broadcast_to(scale**2 * sums, (blocks, n, inner)).reshape(-1)
        case ["Slice", _, stop, start]:
            return v[start:stop]
        case ["Pad", size, width, start]:
            return np.pad(v, (start, width - size - start))
        case _:
            raise TypeError(f"initialise: {str(text)[:200]} is not an operator")


def _blocks(v: Array, g: int, p: int, q: int, w: int, spread: Spread) -> Array:
    sums = v.reshape(g, p).sum(1)
    return np.repeat(sums * spread(w, float(sums.mean())) ** 2, q)
