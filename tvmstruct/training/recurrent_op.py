"""A structured recurrent layer as one operator of exported programs.

`torch.export` would unroll the loop over the steps; `tvmstruct.from_torch` reads this operator as
the layer that it is. Programs run in PyTorch as before.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from tvmstruct.recurrent import GATES
from tvmstruct.training.evaluate import evaluate

if TYPE_CHECKING:
    from tvmstruct.training.recurrent import StructuredCell


def run_exported(
    cell: StructuredCell, x: Tensor, state: tuple[Tensor, ...]
) -> tuple[Tensor, tuple[Tensor, ...]]:
    """Return what ``cell(x, state)`` returns, as a call of the operator."""
    text = {"kind": cell.kind, "input": cell.input.expression, "hidden": cell.hidden.expression}
    biases = [b for b in (cell.bias, cell.hidden_bias) if b is not None]
    arrays = cell.input.arrays(), cell.hidden.arrays()
    y, *last = _recurrent(x, list(state), *map(list, arrays), biases, json.dumps(text))
    return y, tuple(last)


@torch.library.custom_op("tvmstruct::recurrent", mutates_args=())
def _recurrent(
    x: Tensor,
    state: list[Tensor],
    inputs: list[Tensor],
    hidden: list[Tensor],
    biases: list[Tensor],
    text: str,
) -> list[Tensor]:
    said = json.loads(text)
    z = evaluate(said["input"], x, inputs) + biases[0]
    y, last = run_steps(said["kind"], said["hidden"], z, tuple(state), hidden, biases[1:])
    return [y.clone(), *(s.clone() for s in last)]  # results of an operator must not be views


@_recurrent.register_fake
def _(
    x: Tensor,
    state: list[Tensor],
    inputs: list[Tensor],
    hidden: list[Tensor],
    biases: list[Tensor],
    text: str,
) -> list[Tensor]:
    del inputs, hidden, biases, text
    y = x.new_empty(x.shape[0], x.shape[1], state[0].shape[1])
    return [y, *(torch.empty_like(s) for s in state)]


def run_steps(
    kind: str, hidden: Any, z: Tensor, state: tuple[Tensor, ...], arrays: Any, bias: Any
) -> tuple[Tensor, tuple[Tensor, ...]]:
    """Return y (s, b, h) and the last state of z (s, b, gates h), the sums of the inputs.

    ``hidden`` is the expression over ``arrays``; ``bias`` holds the hidden bias of a ``gru``.
    """
    y = []
    for sums in z.unbind(0):
        own = evaluate(hidden, state[0], arrays)
        h, *c = state
        state = _lstm(sums + own, *c) if kind == "lstm" else _gru(sums, own + bias[0], h)
        y.append(state[0])
    return torch.stack(y) if y else z[..., : z.shape[-1] // GATES[kind]], state


def _lstm(sums: Tensor, c: Tensor) -> tuple[Tensor, Tensor]:
    i, f, g, o = sums.chunk(4, -1)
    c = torch.addcmul(f.sigmoid() * c, i.sigmoid(), g.tanh())
    return o.sigmoid() * c.tanh(), c


def _gru(z: Tensor, own: Tensor, h: Tensor) -> tuple[Tensor]:
    sums, parts = z.chunk(3, -1), own.chunk(3, -1)
    r, keep = ((sums[k] + parts[k]).sigmoid() for k in (0, 1))
    return (torch.lerp((sums[2] + r * parts[2]).tanh(), h, keep),)
