"""Walk from the product with the values back to the product of queries and keys.

What stands between is peeled off step by step, outermost first, whatever its order: layout
operators, scales, masks that are added or selected, the softmax, and exporters' guards around
it. The steps are the whole of what the other files need to know of a graph's spelling.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from tvm import relax

from tvmstruct import compat
from tvmstruct.passes.attention_guards import guarded
from tvmstruct.passes.constant_values import number
from tvmstruct.passes.views import RESHAPES, scaled_by
from tvmstruct.rewrite import Graph, operands

LAYOUTS = (*RESHAPES, "relax.permute_dims", "relax.broadcast_to")
LOWEST = float(np.finfo(np.float32).min)
STOPS = ("relax.matmul", compat.DPS)
THROUGH = {"relax.add": 0, "relax.subtract": 0, "relax.where": 1, "relax.maximum": 0}
DEPTH = 4  # how far behind an unknown operator a softmax is still worth a word


class Refused(Exception):
    """A condition of the kernel does not hold; the text says which, and with what values."""


@dataclass(frozen=True)
class Layout:
    """Reshape, transpose or broadcast the scores."""

    call: relax.Call


@dataclass(frozen=True)
class Scale:
    """Multiply the scores by a number."""

    factor: float


@dataclass(frozen=True)
class Add:
    """Add a mask or a bias; ``sign`` is -1 where the graph subtracts it."""

    mask: relax.Expr
    sign: float = 1.0


@dataclass(frozen=True)
class Select:
    """Replace the scores by the number ``low`` where ``keep`` is not ``kept``."""

    keep: relax.Expr
    low: float
    kept: bool


@dataclass(frozen=True)
class Floor:
    """Raise what masks have pushed under the lowest finite number."""


@dataclass(frozen=True)
class Softmax:
    """Normalise over one axis."""

    axis: int


Step = Layout | Scale | Add | Select | Floor | Softmax


@dataclass
class Scores:
    """The product, the steps after it from the inside out, and the variables in between."""

    product: relax.Call
    steps: list[Step]
    inside: list[relax.Var]


def take_apart(
    graph: Graph, anchor: relax.Call, expr: relax.Expr, is_product: Callable
) -> Scores | None:
    """Return what leads to ``expr``, which ``anchor`` multiplies, or None where no softmax does."""
    walk = _Walk(graph, is_product)
    while (following := walk.outside(expr)) is not None:
        expr = following
    if walk.softmax is None:
        return None
    while (following := walk.within(expr)) is not None:
        expr = following
    product = graph.value(expr)
    walk.inside.append(expr)
    _check_readers(graph, anchor, walk)
    return Scores(product, walk.steps[::-1], walk.inside)


def _check_readers(graph: Graph, anchor: relax.Call, walk: _Walk) -> None:
    """Refuse scores that something else reads: they would be computed a second time."""
    inside = dict.fromkeys(v for v in walk.inside if isinstance(v, relax.Var))
    reads: Counter[relax.Var] = Counter(operands(anchor))
    for var in inside:
        reads.update(operands(graph.bound[var]))
    escaped = [var for var in inside if graph.uses[var] != reads[var]]
    if escaped:
        order = list(inside)
        outer = order.index(escaped[0]) <= order.index(walk.probabilities)
        raise Refused(f"the {'probabilities' if outer else 'scores'} are read elsewhere too")


class _Walk:
    """Peels one operator at a time; a method returns what to look at next, or None at the end."""

    def __init__(self, graph: Graph, is_product: Callable) -> None:
        self.graph, self.is_product = graph, is_product
        self.steps: list[Step] = []
        self.inside: list = []
        self.softmax: relax.Expr | None = None
        self.probabilities: relax.Expr | None = None

    def outside(self, expr: relax.Expr) -> relax.Expr | None:
        """Peel what stands between the softmax and the values."""
        if self.softmax is not None:
            return None
        call = self.graph.value(expr)
        if compat.op_name(call) == "relax.nn.softmax":
            self.inside.append(expr)
            self.steps.append(Softmax(int(call.attrs.axis)))
            self.softmax, self.probabilities = call.args[0], expr
            return call.args[0]
        if (following := self._plain(expr, call)) is not None:
            return following
        if (following := self._guard(expr, call)) is not None:
            return following
        if _reaches_softmax(self.graph, call):
            raise Refused(f"{compat.op_name(call)} stands between the softmax and the values")
        return None

    def within(self, expr: relax.Expr) -> relax.Expr | None:
        """Peel what stands between the product and the softmax."""
        call = self.graph.value(expr)
        if self.is_product(call):
            return None
        for peel in (self._plain, self._scale, self._sum, self._select, self._floor):
            if (following := peel(expr, call)) is not None:
                return following
        name = compat.op_name(call) or type(call).__name__
        raise Refused(f"{name} stands between the product and the softmax")

    def _next(self, expr: relax.Expr, step: Step | None, following: relax.Expr) -> relax.Expr:
        self.inside.append(expr)
        if step is not None:
            self.steps.append(step)
        return following

    def _plain(self, expr, call) -> relax.Expr | None:
        """Peel operators that only move scores, or do nothing."""
        name = compat.op_name(call)
        if name in LAYOUTS:
            return self._next(expr, Layout(call), call.args[0])
        if name != "relax.astype":
            return None
        source = call.args[0]
        types = compat.dtype_of(source), compat.dtype_of(call)
        if types[0] == types[1]:
            return self._next(expr, None, source)
        if self.softmax is not None or _reaches_softmax(self.graph, call):
            raise Refused(f"the scores are cast from {types[0]} to {types[1]}, want float32 only")
        return None

    def _scale(self, expr, call) -> relax.Expr | None:
        found = scaled_by(self.graph, call)
        return None if found is None else self._next(expr, Scale(found[0]), found[1])

    def _sum(self, expr, call) -> relax.Expr | None:
        name = compat.op_name(call)
        if name == "relax.add":
            scores, mask = self._which(*call.args)
            return self._next(expr, Add(mask), scores)
        if name == "relax.subtract" and self._leads(call.args[0]):
            return self._next(expr, Add(call.args[1], -1.0), call.args[0])
        return None

    def _select(self, expr, call) -> relax.Expr | None:
        if compat.op_name(call) != "relax.where":
            return None
        keep, a, b = call.args
        for scores, other, kept in ((a, b, True), (b, a, False)):
            if (low := number(self.graph, other)) is not None:
                return self._next(expr, Select(keep, low, kept), scores)
        return None

    def _floor(self, expr, call) -> relax.Expr | None:
        if compat.op_name(call) != "relax.maximum":
            return None
        for scores, bound in (call.args, tuple(reversed(call.args))):
            low = number(self.graph, bound)
            if low is not None and low <= LOWEST:
                return self._next(expr, Floor(), scores)
        return None

    def _guard(self, expr, call) -> relax.Expr | None:
        found = guarded(self.graph, call)
        if found is None:
            return None
        self.inside += [e for e in found.reads if e in self.graph.bound]
        return self._next(expr, None, found.kept)

    def _which(self, a, b) -> tuple[relax.Expr, relax.Expr]:
        """Return the operand of a sum that holds the product first; a true product wins."""
        for test in (lambda c: compat.op_name(c) == "relax.matmul", self.is_product):
            for scores, mask in ((a, b), (b, a)):
                if self._leads(scores, test):
                    return scores, mask
        return a, b

    def _leads(self, expr, test: Callable | None = None) -> bool:
        """Return whether peeling ``expr`` ends at a product."""
        test, front, seen = test or self.is_product, [expr], set()
        while front:
            call = self.graph.value(front.pop())
            if test(call):
                return True
            if call not in seen:
                seen.add(call)
                front += _scores_among(self.graph, call)
        return False


def _scores_among(graph: Graph, call) -> list[relax.Expr]:
    """Return the operands of a step that may be the scores."""
    name = compat.op_name(call)
    if name in LAYOUTS or name == "relax.astype":
        return [call.args[0]]
    if (found := scaled_by(graph, call)) is not None:
        return [found[1]]
    return list(call.args[THROUGH[name] :]) if name in THROUGH else []


def _reaches_softmax(graph: Graph, call, depth: int = DEPTH) -> bool:
    """Return whether a softmax is the data that a chain of operators works on."""
    for _ in range(depth):
        if not isinstance(call, relax.Call) or not call.args or compat.op_name(call) in STOPS:
            return False
        if compat.op_name(call) == "relax.nn.softmax":
            return True
        sources = [graph.value(a) for a in call.args if isinstance(a, relax.Var)]
        named = [s for s in sources if compat.op_name(s) == "relax.nn.softmax"]
        call = next(iter(named + sources), None)
    return False
