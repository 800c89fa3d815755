"""Structured LSTM and GRU layers of `tvmstruct.training` in exported programs.

While a module is exported, each layer is one operator `tvmstruct::recurrent` (see
`tvmstruct.training.recurrent_op`) instead of a graph as long as the sequence.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import numpy as np
from tvm import relax

from tvmstruct.frontends.recurrent import emit_recurrent
from tvmstruct.op_text import from_json
from tvmstruct.recurrent import Cell, Recurrent

R = relax.op
NAME = "recurrent.default"


def convert_structured(node: Any, importer: Any) -> tuple[relax.Expr, ...]:
    """Return y (s, b, h) and the last state (b, h) each, for TVM's importer."""
    x, state, inputs, hidden, biases, text = node.args
    said = json.loads(text)
    layer = Recurrent(
        Cell(said["kind"]),
        from_json(said["input"], [_shaped(n) for n in inputs]),
        from_json(said["hidden"], [_shaped(n) for n in hidden]),
        *map(_shaped, biases),
    )
    named = dict(zip(("input.bias", "hidden.bias"), biases, strict=False))
    named |= _numbered("input.weight", inputs) | _numbered("hidden.weight", hidden)

    def constant(_: np.ndarray, part: str, side: int) -> relax.Expr:
        del side
        return importer.env[named[part]]

    bb = importer.block_builder
    states = [bb.emit(R.expand_dims(importer.env[s], [0])) for s in state]
    y, *last = emit_recurrent(bb, importer.env[x], [layer], *states, constant=constant)
    return y, *(bb.emit(R.squeeze(s, [0])) for s in last if s is not None)


def _shaped(node: Any) -> np.ndarray:
    """Return zeros of the shape of a parameter, whose values are bound later."""
    return np.zeros(tuple(node.meta["val"].shape), np.float32)


def _numbered(name: str, nodes: Sequence[Any]) -> dict[str, Any]:
    return {f"{name}.{i}" if i else name: node for i, node in enumerate(nodes)}
