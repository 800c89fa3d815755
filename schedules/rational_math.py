"""The sigmoid and tanh of ONNX Runtime: the same rational functions, in the same order.

They are Eigen's, ``x p(x^2) / q(x^2)`` with coefficients fitted for float32. A model whose states
ONNX Runtime rounds to bytes in every step has to compute them alike: a last bit that differs
rounds to another byte about once in 20,000 values, and grows from there. Errors: 2e-7 absolute.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from tvm import tirx

from tvmstruct.schedules.vector_math import fma

Value = Any  # a float32 TIR expression
Keep = Callable[[Value], Value]  # holds an expression that is used twice
Splat = Callable[[float], Value]

# Highest power first.
SIGMOID_P = (
    4.37031012579801e-11, 1.15627324459942e-07, 6.08574864600143e-05, 8.51377133304701e-03,
    2.48287947061529e-01,
)  # fmt: skip
SIGMOID_Q = (
    6.10247389755681e-13, 5.76102136993427e-09, 6.29106785017040e-06, 1.70198817374094e-03,
    1.16817656904453e-01, 9.93151921023180e-01,
)  # fmt: skip
TANH_P = (
    -2.76076847742355e-16, 2.00018790482477e-13, -8.60467152213735e-11, 5.12229709037114e-08,
    1.48572235717979e-05, 6.37261928875436e-04, 4.89352455891786e-03,
)  # fmt: skip
TANH_Q = (1.19825839466702e-06, 1.18534705686654e-04, 2.26843463243900e-03, 4.89352518554385e-03)
SIGMOID_END, TANH_END = 18.0, 9.0


def sigmoid(x: Value, splat: Splat, keep: Keep) -> Value:
    """Return the sigmoid of x cut to [-18, 18]."""
    ratio = _odd_rational(x, SIGMOID_P, SIGMOID_Q, SIGMOID_END, splat, keep)
    return _clip(keep(ratio + splat(0.5)), 0.0, 1.0, splat)


def tanh(x: Value, splat: Splat, keep: Keep) -> Value:
    """Return the hyperbolic tangent of x cut to [-9, 9]."""
    return _odd_rational(x, TANH_P, TANH_Q, TANH_END, splat, keep)


def _odd_rational(
    x: Value, p: Sequence[float], q: Sequence[float], end: float, splat: Splat, keep: Keep
) -> Value:
    x = keep(_clip(x, -end, end, splat))
    square = keep(x * x)
    return _horner(p, square, splat) * x / _horner(q, square, splat)


def _horner(coefficients: Sequence[float], x: Value, splat: Splat) -> Value:
    value = splat(coefficients[0])
    for c in coefficients[1:]:
        value = fma(value, x, splat(c))
    return value


def _clip(x: Value, low: float, high: float, splat: Splat) -> Value:
    """Cut x; NaN passes, see `vector_math`."""
    return tirx.Min(splat(high), tirx.Max(splat(low), x))
