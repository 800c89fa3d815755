"""Recognise activations however a graph spells them.

GELU comes as ``0.5 * x * (1 + erf(x / sqrt 2))`` with the factors in any order and grouping, so
the product is flattened first: constants multiply up, and two factors must remain.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from tvm import relax

from tvmstruct import compat
from tvmstruct.rewrite import Graph

PLAIN = {
    "relax.nn.relu": "relu",
    "relax.tanh": "tanh",
    "relax.sigmoid": "sigmoid",
    "relax.nn.silu": "silu",
    "relax.nn.gelu": "gelu",
    "relax.nn.gelu_tanh": "gelu_tanh",
}
TOLERANCE = 1e-5  # of the constants 1/2, sqrt(1/2), 0.044715 and sqrt(2/pi) as exporters round them


@dataclass(frozen=True)
class Activation:
    """An activation of ``x``, which the matched expression reads ``uses`` times."""

    name: str
    x: relax.Expr
    uses: int


def find_activation(graph: Graph, call: relax.Call) -> Activation | None:
    """Return the activation that ``call`` is the last step of, or None."""
    name = compat.op_name(call)
    if name in PLAIN:
        return Activation(PLAIN[name], call.args[0], 1)
    if name not in ("relax.multiply", "relax.divide"):
        return None
    scale, factors = _factors(graph, call)
    if len(factors) == 2 and scale == 1.0:
        return _gated(graph, *factors) or _gated(graph, *factors[::-1])
    if len(factors) != 2 or not _near(scale, 0.5):
        return None
    for x, other in (factors, factors[::-1]):
        if (found := _gelu(graph, x, other)) is not None:
            return found
    return None


def _gated(graph: Graph, x: relax.Expr, other: relax.Expr) -> Activation | None:
    """Match ``x sigmoid(x)`` and ``x sigmoid(1.702 x)``."""
    sigmoid = graph.call(other, "relax.sigmoid")
    if sigmoid is None or not graph.single(other):
        return None
    scale, factors = _factors(graph, sigmoid.args[0])
    names = [n for n, s in (("silu", 1.0), ("gelu_sigmoid", 1.702)) if _near(scale, s)]
    if len(factors) == 1 and factors[0].same_as(x) and names:
        return Activation(names[0], x, 2)
    return None


def _gelu(graph: Graph, x: relax.Expr, other: relax.Expr) -> Activation | None:
    inner = _one_plus(graph, other)
    if inner is None or not graph.single(inner):
        return None
    if (erf := graph.call(inner, "relax.erf")) is not None:
        scale, factors = _factors(graph, erf.args[0])
        if len(factors) == 1 and factors[0].same_as(x) and _near(scale, math.sqrt(0.5)):
            return Activation("gelu", x, 2)
    if (tanh := graph.call(inner, "relax.tanh")) is not None:
        return _gelu_tanh(graph, x, tanh.args[0])
    return None


def _gelu_tanh(graph: Graph, x: relax.Expr, argument: relax.Expr) -> Activation | None:
    """Match ``sqrt(2 / pi) (x + 0.044715 x^3)``."""
    scale, factors = _factors(graph, argument)
    if len(factors) != 1 or not _near(scale, math.sqrt(2 / math.pi)):
        return None
    total = graph.call(factors[0], "relax.add")
    if total is None:
        return None
    for a, b in (total.args, tuple(reversed(total.args))):
        cubic, parts = _factors(graph, b)
        uses = _cube(graph, x, parts)
        if a.same_as(x) and _near(cubic, 0.044715) and uses:
            return Activation("gelu_tanh", x, 2 + uses)
    return None


def _cube(graph: Graph, x: relax.Expr, parts: list[relax.Expr]) -> int:
    """Return how often ``x * x * x`` or ``power(x, 3)`` reads x, or 0 where it is none."""
    if len(parts) == 3 and all(part.same_as(x) for part in parts):
        return 3
    power = graph.call(parts[0], "relax.power") if len(parts) == 1 else None
    cube = power is not None and power.args[0].same_as(x) and graph.constant(power.args[1]) == 3
    return int(cube)


def _one_plus(graph: Graph, expr: relax.Expr) -> relax.Expr | None:
    total = graph.call(expr, "relax.add")
    if total is None or not graph.single(expr):
        return None
    a, b = total.args
    if graph.constant(b) == 1.0:
        return a
    return b if graph.constant(a) == 1.0 else None


def _factors(graph: Graph, expr: relax.Expr) -> tuple[float, list[relax.Expr]]:
    """Flatten a product: the constant factor, and the expressions that are none."""
    if (value := graph.constant(expr)) is not None:
        return value, []
    call = expr if isinstance(expr, relax.Call) else None
    if call is None and graph.single(expr):
        call = graph.call(expr, "relax.multiply", "relax.divide")
    name = compat.op_name(call) if call is not None else ""
    if name == "relax.multiply":
        (s, a), (t, b) = (_factors(graph, arg) for arg in call.args)
        return s * t, a + b
    if name == "relax.divide" and (divisor := graph.constant(call.args[1])):
        s, a = _factors(graph, call.args[0])
        return s / divisor, a
    return 1.0, [expr]


def _near(value: float, want: float) -> bool:
    return abs(value - want) <= TOLERANCE * abs(want)
