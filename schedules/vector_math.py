"""Elementary functions as polynomials in TIR: no libm call, any lane count.

TVM turns ``T.exp`` and its like into one libm call per element. The builders here take a
float32 expression of any number of lanes (a scalar one may be vectorised later) and return
an expression of the same type made of adds, multiplies, ``fma``, min, max and at most one
division. ``fma`` fuses only where the CPU can, so no ISA needs a special case.

========== ================================================================= ==============
function   error bound                                                       outside
========== ================================================================= ==============
exp        3e-7 relative on [-87.3, 88.7]; 1.2e-38 absolute below (flushes)  0, inf
erf, tanh  1e-6 absolute and 5e-7 relative, odd, never outside [-1, 1]       -1, 1
sigmoid    1e-6 absolute                                                     0, 1
gelu       1e-6 max(1, abs x) absolute (both forms)                          0, x
========== ================================================================= ==============

NaN gives NaN everywhere.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import tvm_ffi
from tvm import tirx
from tvm.ir import Call, IRModule, Var
from tvm.ir.transform import PassContext

Value = Any  # a float32 TIR expression; TVM declares no operators for it

LN2_HIGH, LN2_LOW = 0.693359375, -2.12194440e-4  # their sum is ln 2; n * LN2_HIGH is exact
LOG2_E = 1.44269504
ALMOST_HALF = 0.49999997  # keeps exp(0) at n = 0, where the result is exactly 1
BIASED_ROUNDER = 12582912.0 + 127.0  # 1.5 * 2**23 rounds to integers; 127 biases the exponent

# Minimax fits of this project, lowest power first.
EXP = (1.0, 0.999999821, 0.500005841, 0.166609794, 0.0419161394, 0.00779055664, 0.00194971298)
TANH_P = (1.0, 0.133797109, 3.49402521e-3, 2.05833294e-5, 1.33188651e-8)
TANH_Q = (1.0, 0.467130244, 2.58710384e-2, 3.28307768e-4, 7.76193360e-7)
ERF_P = (1.12837911, 0.193545207, 5.31017482e-2, 3.88334505e-3, 2.84565118e-4, 1.98677139e-6)
ERF_Q = (1.0, 0.504857540, 0.115350045, 1.52072553e-2, 1.18556980e-3, 3.74200208e-5)
TANH_END, ERF_END = 9.7, 4.2  # the fits pass 1 by 5e-7 here, so cutting at 1 saturates exactly


def fma(a: Value, b: Value, c: Value) -> Value:
    """Return ``a * b + c``, with one rounding where the CPU has FMA and two where it has not."""
    return tirx.op.fma(a, b, c)


def exp(x: Value) -> Value:
    """Return ``e**x = 2**n * e**r`` with ``n = floor(x / ln 2)`` and ``0 <= r < ln 2``."""
    steps = Steps()
    return steps.close(_exp(steps, steps.bind(x)))


def tanh(x: Value) -> Value:
    """Return the hyperbolic tangent, ``x P(x^2) / Q(x^2)`` cut at -1 and 1."""
    steps = Steps()
    return steps.close(_odd_rational(steps, steps.bind(x), TANH_P, TANH_Q, TANH_END))


def erf(x: Value) -> Value:
    """Return the error function, ``x P(x^2) / Q(x^2)`` cut at -1 and 1."""
    steps = Steps()
    return steps.close(_odd_rational(steps, steps.bind(x), ERF_P, ERF_Q, ERF_END))


def tanh_fraction(x: Value) -> tuple[Value, Value]:
    """Return numerator and denominator of the hyperbolic tangent, each a tree with ``x`` in it."""
    low, high = _const(-TANH_END, x), _const(TANH_END, x)
    v = tirx.Min(high, tirx.Max(low, x))
    return v * _polynomial(TANH_P, v * v), _polynomial(TANH_Q, v * v)


def sigmoid(x: Value) -> Value:
    """Return ``1 / (1 + e**-x)``."""
    steps = Steps()
    v = steps.bind(x)
    one = _const(1.0, v)
    return steps.close(one / (one + _exp(steps, steps.bind(_const(-1.0, v) * v))))


def gelu(x: Value) -> Value:
    """Return ``x / 2 * (1 + erf(x / sqrt 2))``, the exact form."""
    steps = Steps()
    v = steps.bind(x)
    half = steps.bind(v * _const(0.5, v))
    scaled = steps.bind(v * _const(0.5**0.5, v))
    return steps.close(fma(half, _odd_rational(steps, scaled, ERF_P, ERF_Q, ERF_END), half))


def gelu_tanh(x: Value) -> Value:
    """Return ``x / 2 * (1 + tanh(u))``, u = sqrt(2 / pi) (x + 0.044715 x^3), as x sigmoid(2 u)."""
    steps = Steps()
    v = steps.bind(x)
    scale = -2 * (2 / math.pi) ** 0.5  # the sign is that of the exponent in sigmoid(2 u)
    slope = fma(v * v, _const(scale * 0.044715, v), _const(scale, v))
    return steps.close(v / (_const(1.0, v) + _exp(steps, steps.bind(v * slope))))


REPLACEMENTS: dict[str, Callable[[Value], Value]] = {
    "tirx.exp": exp,
    "tirx.erf": erf,
    "tirx.tanh": tanh,
    "tirx.sigmoid": sigmoid,
}


def replace_math(func: tirx.PrimFunc) -> tirx.PrimFunc:
    """Return ``func`` with its float32 exp, erf, tanh and sigmoid calls written out.

    Works before and after scheduling, on scalar and vector calls. Run it after the schedule
    where inlining matters: the written-out form hides the call from pattern matchers.
    ``max(x, 0)`` becomes ``max(0, x)``, as x86 returns the second operand for NaN, and a relu
    has to let NaN pass.
    """

    def replace(call: Call) -> Value:
        build = REPLACEMENTS.get(getattr(call.op, "name", ""))
        if build is None or not _is_float32(call):
            return call
        return build(call.args[0])

    def constant_first(value: tirx.Max) -> Value:
        swap = isinstance(value.b, tirx.FloatImm) and not isinstance(value.a, tirx.FloatImm)
        return tirx.Max(value.b, value.a) if swap else value

    rules = (Call, replace), (tirx.Max, constant_first)
    return tvm_ffi.structural_map(func, rules, order="post")


@tirx.transform.prim_func_pass(opt_level=0, name="LowerVectorMath")
def LowerVectorMath(func: tirx.PrimFunc, _mod: IRModule, _context: PassContext) -> tirx.PrimFunc:
    """Apply ``replace_math`` to every PrimFunc of a module."""
    return replace_math(func)


class Steps:
    """A flat chain of ``let`` bindings, without which the tree would grow exponentially."""

    def __init__(self) -> None:
        self.bindings: list[tuple[Value, Value]] = []

    def bind(self, value: Value) -> Value:
        """Return a variable that stands for ``value`` (an element of a te tensor also serves)."""
        value = tirx.convert(value)
        var = Var("t", value.ty)
        self.bindings.append((var, value))
        return var

    def close(self, result: Value) -> Value:
        """Return ``result`` inside all bindings."""
        for var, value in reversed(self.bindings):
            result = tirx.Let(var, value, result)
        return result


def _exp(steps: Steps, x: Value) -> Value:
    """Return exp; after the cut, n = -127 gives the factor 0 and n = 128 gives inf."""
    x = _clamp(steps, x, -88.0, 89.0)
    rounder = _const(BIASED_ROUNDER, x)
    shifted = steps.bind(fma(x, _const(LOG2_E, x), _const(-ALMOST_HALF, x)) + rounder)
    n = steps.bind(shifted - rounder)
    r = steps.bind(fma(n, _const(-LN2_LOW, x), fma(n, _const(-LN2_HIGH, x), x)))
    exponent = tirx.reinterpret(_dtype("uint32", x), shifted)  # its low bits are n + 127
    power = exponent << tirx.const(23, _dtype("uint32", x))
    return _polynomial(EXP, r) * tirx.reinterpret(_dtype("float32", x), power)


def _odd_rational(
    steps: Steps, x: Value, p: Sequence[float], q: Sequence[float], end: float
) -> Value:
    """Return ``v p(v^2) / q(v^2)`` cut to [-1, 1], where v is x cut to [-end, end]."""
    v = _clamp(steps, x, -end, end)
    square = steps.bind(v * v)
    ratio = steps.bind(v * _polynomial(p, square) / _polynomial(q, square))
    return _clamp(steps, ratio, -1.0, 1.0)


def _polynomial(coefficients: Sequence[float], x: Value) -> Value:
    """Evaluate a polynomial, lowest power first, by Horner's rule."""
    *rest, value = (_const(c, x) for c in coefficients)
    for c in reversed(rest):
        value = fma(value, x, c)
    return value


def _clamp(steps: Steps, x: Value, low: float, high: float) -> Value:
    """Cut ``x`` to [low, high]; NaN passes because ``max(a, b)`` is ``a > b ? a : b``.

    Selects would do the same, but a chain of them costs TVM's simplifier exponential time.
    """
    raised = tirx.Max(_const(low, x), x)
    return steps.bind(tirx.Min(_const(high, x), raised))


def _const(value: float, like: Value) -> Value:
    return tirx.const(value, like.ty.dtype)


def _dtype(scalar: str, like: Value) -> str:
    """Return ``scalar`` with the lane count of ``like``."""
    lanes = like.ty.dtype.lanes
    return scalar if lanes == 1 else f"{scalar}x{lanes}"


def _is_float32(value: Value) -> bool:
    return str(value.ty.dtype).split("x")[0] == "float32"
