"""LSTM and GRU layers whose input and hidden matrices are operators of any family."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar, Self

import numpy as np
import torch
from torch import Tensor, nn

from tvmstruct.errors import ModelError
from tvmstruct.recurrent import Cell, Recurrent
from tvmstruct.recurrent_forms import Forms, zero_layer
from tvmstruct.training.initialise import initialise
from tvmstruct.training.linear import StructuredOperator, to_array, to_parameter
from tvmstruct.training.recurrent_op import run_exported, run_steps


class StructuredCell(nn.Module):
    """One layer: ``input`` and ``hidden`` operators, ``bias`` and, for a GRU, ``hidden_bias``."""

    def __init__(self, layer: Recurrent) -> None:
        super().__init__()
        self.kind, self.h = layer.cell.kind, layer.h
        if layer.cell != Cell(self.kind) or layer.peepholes is not None:
            raise ModelError(f"training: {layer.cell} is not the {self.kind} of PyTorch")
        self.input, self.hidden = StructuredOperator(layer.input), StructuredOperator(layer.hidden)
        zero = np.zeros(layer.cell.gates * layer.h, np.float32)
        biases = [zero if b is None else b for b in (layer.bias, layer.hidden_bias)]
        if self.kind == "lstm":  # both are added to the same sums: one parameter
            biases = [biases[0] + biases[1], None]
        self.bias, self.hidden_bias = (None if b is None else to_parameter(b) for b in biases)

    def recurrent(self) -> Recurrent:
        """Return the layer in numpy, with the parameters' very bits."""
        bias, hidden_bias = (
            None if b is None else to_array(b) for b in (self.bias, self.hidden_bias)
        )
        operators = self.input.operator(), self.hidden.operator()
        return Recurrent(Cell(self.kind), *operators, bias, hidden_bias)

    def initialise(self) -> None:
        """Draw weights with the variances of PyTorch's layer: U(-a, a) with a = 1 / sqrt(h)."""
        initialise(self.input, self.input.in_features / (3 * self.h))
        initialise(self.hidden)
        with torch.no_grad():
            for bias in (self.bias, self.hidden_bias):
                if bias is not None:
                    bias.uniform_(-(self.h**-0.5), self.h**-0.5)

    def forward(self, x: Tensor, state: tuple[Tensor, ...]) -> tuple[Tensor, tuple[Tensor, ...]]:
        """Return y (s, b, h) and the last state of x (s, b, n_in) and state (b, h) each."""
        if torch.compiler.is_exporting():
            return run_exported(self, x, state)
        z = self.input(x) + self.bias
        bias = [] if self.hidden_bias is None else [self.hidden_bias]
        hidden = self.hidden
        return run_steps(self.kind, hidden.expression, z, state, hidden.arrays(), bias)


class StructuredRecurrent(nn.Module):
    """Layers one upon the other, with dropout between them while training.

    Takes x (s, b, n_in), (b, s, n_in) with ``batch_first``, and a state (layers, b, h), two of
    them for an LSTM, zeros where it is left out; returns y and the last state, as ``nn.LSTM``.
    """

    kind: ClassVar[str]

    def __init__(
        self, layers: Sequence[Recurrent], *, dropout: float = 0.0, batch_first: bool = False
    ) -> None:
        super().__init__()
        for below, layer in zip([None, *layers], layers, strict=False):
            if layer.cell.kind != self.kind:
                raise ModelError(f"training: an {layer.cell.kind} layer in a {self.kind}")
            if below is not None and (layer.n_in, layer.h) != (below.h, below.h):
                raise ModelError(
                    f"training: layer {below.n_in} -> {below.h} below {layer.n_in} -> {layer.h}; "
                    "want one hidden size"
                )
        self.layers = nn.ModuleList(map(StructuredCell, layers))
        self.dropout, self.batch_first = nn.Dropout(dropout), batch_first
        self.input_size, self.hidden_size = layers[0].n_in, layers[0].h
        self.num_layers = len(layers)

    @classmethod
    def of(
        cls,
        input_size: int,
        hidden_size: int,
        num_layers: int = 1,
        *,
        forms: Forms = (None, None),
        dropout: float = 0.0,
        batch_first: bool = False,
    ) -> Self:
        """Return initialised layers; forms are of their input and hidden matrices, None is dense.

        >>> StructuredLSTM.of(400, 400, 2, forms=antman("lgp_shuffle", g_im=10, g_hm=10))
        """
        sizes = [input_size] + [hidden_size] * (num_layers - 1)
        layers = [zero_layer(cls.kind, n, hidden_size, *forms) for n in sizes]
        module = cls(layers, dropout=dropout, batch_first=batch_first)
        for layer in module.layers:
            layer.initialise()
        return module

    def recurrent(self) -> list[Recurrent]:
        """Return the layers in numpy, with the parameters' very bits."""
        return [layer.recurrent() for layer in self.layers]

    def forward(self, x: Tensor, state: Any = None) -> tuple[Tensor, Any]:
        """Return y (s, b, h) and the last state (layers, b, h), see the class."""
        if x.dim() != 3 or x.shape[-1] != self.input_size:
            raise ModelError(f"training: x {tuple(x.shape)}; want (s, b, {self.input_size})")
        x = x.transpose(0, 1) if self.batch_first else x
        given = self._states(x, state)
        last = []
        for k, layer in enumerate(self.layers):
            x = x if k == 0 else self.dropout(x)
            x, own = layer(x, tuple(s[k] for s in given))
            last.append(own)
        found = tuple(map(torch.stack, zip(*last, strict=True)))
        y = x.transpose(0, 1) if self.batch_first else x
        return y, found if self.kind == "lstm" else found[0]

    def _states(self, x: Tensor, state: Any) -> tuple[Tensor, ...]:
        want = (self.num_layers, x.shape[1], self.hidden_size)
        number = 2 if self.kind == "lstm" else 1
        if state is None:
            return (x.new_zeros(want),) * number
        given = tuple(state) if self.kind == "lstm" else (state,)
        shapes = [tuple(s.shape) for s in given]
        if shapes != [want] * number:
            raise ModelError(f"training: a state of shapes {shapes}; want {number} of {want}")
        return given


class StructuredLSTM(StructuredRecurrent):
    """An LSTM with structured matrices, gates i, f, g, o stacked: ``n_in`` and h by 4 h."""

    kind = "lstm"


class StructuredGRU(StructuredRecurrent):
    """A GRU with structured matrices, gates r, z, n stacked; the reset gate after the product."""

    kind = "gru"
