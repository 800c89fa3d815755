"""What a model file asks of hardware: its products, softmax and activations, from the graph."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod

from tvm import relax

from tvmstruct.compat import is_constant, op_name, static_shape
from tvmstruct.errors import InputError
from tvmstruct.frontends import Source
from tvmstruct.vta.operations import (
    DOT,
    FLOAT_BYTES,
    GELU,
    RELU,
    SOFT,
    SUM,
    Step,
    Workload,
    count_gemms,
)

CURVES = ("gelu", "gelu_tanh", "silu")
FORMULAS = ("erf", "tanh", "sigmoid")
ELEMENTS = {
    "relax.nn.softmax": SOFT,
    "relax.nn.relu": RELU,
    **{f"relax.nn.{name}": GELU for name in CURVES},
    **{f"relax.{name}": GELU for name in FORMULAS},
}


def source_workload(name: str, source: Source, length: int) -> Workload:
    """Return what one row of ``length`` tokens asks for.

    Matrices of one shape are one operation class; the roles that NLP-Fast names are those of the
    built-in models.
    """
    sizes: dict[str, int] = {}
    for spec in source.inputs:
        for axis, dim in enumerate(spec.shape):
            if isinstance(dim, str):
                sizes.setdefault(dim, 1 if axis == 0 else length)
    shapes = {
        spec.name: tuple(sizes[dim] if isinstance(dim, str) else dim for dim in spec.shape)
        for spec in source.inputs
    }
    reader = _Reader()
    for block in source.at(shapes)["main"].body.blocks:
        for binding in block.bindings:
            reader.read(binding)
    if not reader.gemms:
        raise InputError(f"explore: {name} multiplies with no constant matrix")
    return Workload(name, tuple(reader.steps), count_gemms(reader.gemms))


class _Reader:
    """Collects the steps of a function, binding by binding."""

    def __init__(self) -> None:
        self.steps: list[Step] = []
        self.gemms: list[tuple[int, int, int]] = []
        self.probable: set[relax.Var] = set()  # what a softmax gave, up to the next product

    def read(self, binding: relax.Binding) -> None:
        """Note what a binding computes."""
        value = binding.value
        if not isinstance(value, relax.Call):
            return
        name, shape = op_name(value), static_shape(value)
        if name == "relax.matmul":
            self._product(value.args, shape or ())
            return
        if name in ELEMENTS and shape is not None:
            self.steps.append(Step(ELEMENTS[name], prod(shape)))
        if name == "relax.nn.softmax" or self._is_probable(value.args):
            self.probable.add(binding.var)

    def _is_probable(self, args: Sequence[relax.Expr]) -> bool:
        return any(isinstance(arg, relax.Var) and arg in self.probable for arg in args)

    def _product(self, args: Sequence[relax.Expr], shape: Sequence[int]) -> None:
        rows, inputs, outputs = prod(shape[:-1]), (static_shape(args[0]) or (0,))[-1], shape[-1]
        if is_constant(args[1]):
            weights = prod(static_shape(args[1]) or ())
            self.steps.append(
                Step(f"dense {inputs}x{outputs}", rows * inputs * outputs, weights * FLOAT_BYTES)
            )
            self.gemms.append((rows, inputs, outputs))
        else:
            role = SUM if self._is_probable(args) else DOT
            self.steps.append(Step(role, rows * inputs * outputs))
