"""One driver for every graph rewrite; a rule only says what and why.

A rule is one class in ``passes/``. It looks at one call at a time through a `Graph` and returns
a new expression, a `Reject` with the reason, or None where the call is none of its business.
Rules match with plain Python instead of a pattern language because the interesting question is
not whether a pattern matched but which of its conditions failed.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Protocol

import tvm
from tvm import relax
from tvm.relax.analysis import get_var2val, post_order_visit
from tvm.relax.expr_functor import PyExprMutator, mutator

from tvmstruct import compat
from tvmstruct.errors import TvmstructError


@dataclass(frozen=True)
class Reject:
    """The rule recognised the layer but declines; ``why`` reaches the user's report."""

    layer: str
    why: str


@dataclass
class Log:
    """What the rules did: (rule, layer) applied and (rule, layer, reason) declined."""

    applied: list[tuple[str, str]] = field(default_factory=list)
    rejected: list[tuple[str, str, str]] = field(default_factory=list)


class Graph:
    """A function as a graph: the value of a variable, and how often it is used.

    ``closed`` are the variables whose values read no parameter.
    """

    def __init__(self, func: relax.Function) -> None:
        self.bound = get_var2val(func)
        self.uses: Counter[relax.Var] = Counter()
        self.closed: set[relax.Var] = set()
        for var, value in self.bound.items():
            read = list(operands(value))
            self.uses.update(read)
            if all(v in self.closed for v in read):
                self.closed.add(var)
        self.uses.update(operands(func.body.body))

    def value(self, expr: relax.Expr) -> relax.Expr:
        """Follow a variable to the expression bound to it."""
        while isinstance(expr, relax.Var) and expr in self.bound:
            expr = self.bound[expr]
        return expr

    def call(self, expr: relax.Expr, *names: str) -> relax.Call | None:
        """Return the call of one of the named operators that ``expr`` stands for, or None."""
        value = self.value(expr)
        return value if compat.op_name(value) in names else None

    def single(self, expr: relax.Expr) -> bool:
        """Return whether nothing but one reader uses the value of ``expr``."""
        return not isinstance(expr, relax.Var) or self.uses[expr] == 1

    def constant(self, expr: relax.Expr) -> float | None:
        """Return the value of a constant of one element, or None."""
        value = self.value(expr)
        if compat.is_constant(value) and compat.constant_array(value).size == 1:
            return float(compat.constant_array(value).reshape(-1)[0])
        return None


def operands(value: relax.Expr) -> Iterator[relax.Var]:
    """Yield the variables that one bound value reads, as often as it reads them."""
    if isinstance(value, relax.Call):
        for arg in value.args:
            yield from operands(arg)
    elif isinstance(value, relax.Tuple):
        for item in value.fields:
            yield from operands(item)
    elif isinstance(value, relax.TupleGetItem):
        yield from operands(value.tuple_value)
    elif isinstance(value, relax.Var):
        yield value
    elif isinstance(value, (relax.SeqExpr, relax.If, relax.Function)):
        found: list[relax.Var] = []
        post_order_visit(value, lambda e: found.append(e) if isinstance(e, relax.Var) else None)
        yield from found


class Rule(Protocol):
    """One rewrite: a name and what becomes of a call."""

    name: str

    def rewrite(self, graph: Graph, call: relax.Call) -> relax.Expr | Reject | None:
        """Return the new expression, in terms of the graph's variables."""
        ...


def apply_rule(mod: tvm.IRModule, rule: Rule, log: Log) -> tvm.IRModule:
    """Run one rule over every Relax function, drop what it leaves unused, and renormalise."""
    driver = _Driver(mod, rule, log)
    for gvar, func in mod.functions_items():
        if isinstance(func, relax.Function):
            try:
                driver.rewrite_function(gvar, func)
            except RuntimeError:
                if driver.error is not None:
                    raise driver.error from None
                raise
    mod = relax.transform.CanonicalizeBindings()(driver.builder_.get())
    return relax.transform.DeadCodeElimination()(mod)


Seen = dict[relax.Expr, relax.Expr]


@mutator
class _Driver(PyExprMutator):
    """The project's one mutator."""

    def __init__(self, mod: tvm.IRModule, rule: Rule, log: Log) -> None:
        super().__init__(mod)
        self.rule, self.log = rule, log
        self.error: TvmstructError | None = None

    def rewrite_function(self, gvar: tvm.ir.GlobalVar, func: relax.Function) -> None:
        self.graph = Graph(func)
        self.builder_.update_func(gvar, self.visit_expr(func))

    def visit_call_(self, call: relax.Call) -> relax.Expr:
        try:
            out = self.rule.rewrite(self.graph, call)
        except TvmstructError as error:
            self.error = error  # on its way through TVM it would become a RuntimeError
            raise
        if isinstance(out, Reject):
            self.log.rejected.append((self.rule.name, out.layer, out.why))
        elif out is not None:
            self.log.applied.append((self.rule.name, compat.op_name(call)))
            return self.adopt(out)
        return super().visit_call_(call)

    def adopt(self, expr: relax.Expr, seen: Seen | None = None) -> relax.Expr:
        """Rebuild a rule's expression on the new graph's variables, inner calls first.

        A call that the rule uses several times is emitted once.
        """
        seen = {} if seen is None else seen
        if expr not in seen:
            seen[expr] = self._adopt(expr, seen)
        return seen[expr]

    def _adopt(self, expr: relax.Expr, seen: Seen) -> relax.Expr:
        if isinstance(expr, relax.Var):
            return self.visit_expr(expr)
        if isinstance(expr, relax.Tuple):
            return relax.Tuple([self.adopt(item, seen) for item in expr.fields])
        if isinstance(expr, relax.TupleGetItem):
            inner = self.adopt(expr.tuple_value, seen)
            return self.builder_.emit(relax.TupleGetItem(inner, expr.index))
        if isinstance(expr, relax.Call):
            args = [self.adopt(arg, seen) for arg in expr.args]
            return self.builder_.emit(relax.Call(expr.op, args, expr.attrs, expr.ty_args))
        return expr
