"""Make every constant tensor a parameter of ``main``: weights live outside compiled code.

So a weight exists once however many buckets there are, executables stay small, and a saved
model keeps its weights in one place.
"""

from __future__ import annotations

import tvm
from tvm import relax

from tvmstruct import compat
from tvmstruct.rewrite import Graph
from tvmstruct.weights import WeightStore

SCALAR = 1  # constants of so few elements stay in the code


class LiftConstants:
    """Replace constants in the arguments of calls by new variables."""

    name = "lift_constants"

    def __init__(self, store: WeightStore) -> None:
        self.store = store
        self.parameters: dict[str, relax.Var] = {}

    @property
    def names(self) -> list[str]:
        """Return the keys of the weights in the order of the new parameters."""
        return list(self.parameters)

    def rewrite(self, graph: Graph, call: relax.Call) -> relax.Expr | None:
        """Return the call with variables for its constants, or None where it has none."""
        args = [self._lift(arg) for arg in call.args]
        if all(new is old for new, old in zip(args, call.args, strict=True)):
            return None
        return relax.Call(call.op, args, call.attrs, call.ty_args)

    def _lift(self, arg: relax.Expr) -> relax.Expr:
        if isinstance(arg, relax.Tuple):
            fields = [self._lift(item) for item in arg.fields]
            same = all(new is old for new, old in zip(fields, arg.fields, strict=True))
            return arg if same else relax.Tuple(fields)
        if not compat.is_constant(arg) or compat.constant_tensor(arg).numel() <= SCALAR:
            return arg
        key = self.store.name(compat.constant_tensor(arg))
        if key not in self.parameters:
            self.parameters[key] = relax.Var(f"w{len(self.parameters)}", compat.type_of(arg))
        return self.parameters[key]


def with_parameters(mod: tvm.IRModule, lift: LiftConstants) -> tvm.IRModule:
    """Append the lifted weights to the parameters of ``main``."""
    main = mod["main"]
    params = [*main.params, *lift.parameters.values()]
    mod = tvm.IRModule(mod.functions)  # the attributes hold the source's weights: drop them
    mod["main"] = relax.Function(params, main.body, main.ret_ty, main.is_pure, main.attrs)
    return mod
