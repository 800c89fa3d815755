"""One module for dense layers of every family: an operator expression over parameters."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor, nn

from tvmstruct import op_text
from tvmstruct.families import FAMILIES
from tvmstruct.ops import Array, Op, map_arrays
from tvmstruct.training.evaluate import evaluate
from tvmstruct.training.initialise import initialise


def to_array(tensor: Tensor) -> Array:
    """Return a copy of a tensor's values as a numpy array."""
    return tensor.detach().cpu().numpy().copy()


def to_parameter(array: Array) -> nn.Parameter:
    """Return a parameter with the bits of ``array``; half precision becomes float32."""
    dtype = array.dtype if array.dtype.char in "fd" else np.float32
    return nn.Parameter(torch.from_numpy(np.array(array, dtype, order="C")))


class StructuredOperator(nn.Module):
    """``x @ op`` with the arrays of ``op`` as parameters ``weight``, ``weight_1``, ...

    There is one parameter for each distinct array, so their elements are ``op.params``.
    """

    def __init__(self, op: Op) -> None:
        super().__init__()
        # arrays lie in memory as they are named here: views of one array become one parameter
        own = map_arrays(op, lambda a: np.ascontiguousarray(a).copy())
        self.expression, arrays = op_text.to_json(own)
        self.in_features, self.out_features = op.n_in, op.n_out
        self.names = tuple(f"weight_{i}" if i else "weight" for i in range(len(arrays)))
        for name, array in zip(self.names, arrays, strict=True):
            self.register_parameter(name, to_parameter(array))

    def arrays(self) -> list[nn.Parameter]:
        """Return the parameters in the order of the expression's arrays."""
        return [getattr(self, name) for name in self.names]

    def operator(self) -> Op:
        """Return the operator in numpy, with the parameters' very bits."""
        return op_text.from_json(self.expression, [to_array(a) for a in self.arrays()])

    def uses(self) -> Iterator[tuple[nn.Parameter, int]]:
        """Yield each parameter and how often one row of x meets it: 1 unless it is shared."""
        counts = dict.fromkeys(range(len(self.names)), 0)
        _count(self.expression, counts)
        yield from zip(self.arrays(), counts.values(), strict=True)

    def forward(self, x: Tensor) -> Tensor:
        """Return (..., n_out) of x (..., n_in)."""
        return evaluate(self.expression, x, self.arrays())

    def extra_repr(self) -> str:
        """Return the expression."""
        return repr(self.operator())


def _count(text: Any, counts: dict[int, int]) -> None:
    match text:
        case ["Product" | "Sum", parts]:
            for part in parts:
                _count(part, counts)
        case ["SharedBlockDiag", w, blocks]:
            counts[w] += blocks
        case ["Dense" | "BlockDiag" | "Diag", w]:
            counts[w] += 1
        case _:
            pass


class StructuredLinear(StructuredOperator):
    """``y = x @ op + bias``, a dense layer of any family.

    >>> StructuredLinear.of("lgp_shuffle", 400, 1600, g=10)
    """

    def __init__(self, op: Op, bias: Array | bool = True) -> None:
        super().__init__(op)
        if bias is True:
            bias = np.zeros(op.n_out, np.float32)
        self.bias = None if bias is False else to_parameter(bias)

    @classmethod
    def of(
        cls,
        family: str,
        in_features: int,
        out_features: int,
        *,
        bias: bool = True,
        **parameters: Any,
    ) -> Self:
        """Return a layer of a family, initialised like ``nn.Linear``."""
        layer = cls(FAMILIES[family].template(in_features, out_features, **parameters), bias)
        initialise(layer)
        return layer

    @classmethod
    def from_operator(cls, op: Op, bias: Array | None = None) -> Self:
        """Return the layer that computes ``op`` with the same bits."""
        return cls(op, False if bias is None else bias)

    def forward(self, x: Tensor) -> Tensor:
        """Return (..., n_out) of x (..., n_in)."""
        y = super().forward(x)
        return y if self.bias is None else y + self.bias
