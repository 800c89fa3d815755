"""The arguments of a sequence's kernel: its inputs, then every constant once."""

from __future__ import annotations

from tvm import relax

from tvmstruct import compat
from tvmstruct.schedules.compute.dense import Epilogue
from tvmstruct.schedules.compute.sequence import Member
from tvmstruct.stages import Program


class SequenceArguments:
    """Collects the members of a `LayerSequence`, given the arguments of its call."""

    def __init__(self, given: list[relax.Expr]) -> None:
        self._given = given
        self._inputs: dict[int, relax.Expr] = {}  # by number among the given
        self._constants: dict[object, relax.Expr] = {}
        self._members: list[tuple] = []

    def add(
        self, epilogue: Epilogue, program: Program, reads: tuple[int, ...], own: list[relax.Expr]
    ) -> None:
        """Take the next member: which values it reads, and its weights and bias."""
        rows, norm = reads[: 1 + epilogue.residual], reads[1 + epilogue.residual :]
        self._inputs |= {n: self._given[n] for n in rows if n < len(self._given)}
        constants = tuple(map(self._constant, [*own, *(self._given[n] for n in norm)]))
        self._members.append((epilogue, program, rows, constants))

    def _constant(self, tensor: relax.Expr) -> int:
        key = (
            compat.address(compat.constant_tensor(tensor)) if compat.is_constant(tensor) else tensor
        )
        self._constants.setdefault(key, tensor)
        return list(self._constants).index(key)

    @property
    def members(self) -> list[Member]:
        """The members on renumbered values."""
        order, count = list(self._inputs), len(self._given)
        found = []
        for epilogue, program, rows, constants in self._members:
            x, *more = (order.index(n) if n < count else len(order) + n - count for n in rows)
            found.append(Member(program, epilogue, x, next(iter(more), None), constants))
        return found

    @property
    def inputs(self) -> list[int]:
        """Features of each input."""
        shapes = [compat.static_shape(tensor) for tensor in self._inputs.values()]
        return [shape[1] for shape in shapes if shape is not None]

    @property
    def tensors(self) -> list[relax.Expr]:
        """What the kernel takes before its result."""
        return [*self._inputs.values(), *self._constants.values()]
