"""ONNX Runtime's ``DynamicQuantizeLSTM`` as an LSTM with the weights that its integers stand for.

The contrib operator keeps W (d, n, 4 h) and R (d, h, 4 h) as 8-bit integers with a scale and a
zero point for each direction, or for each of its columns, and rounds x once for each call and h
once for each step to bytes: ``round(v / s) + z`` of one scale and one zero point for all rows.
The weights become float32, which plans may replace, and keep their scales, from which those that
stay dense are integers again (`choose_precision`): then all sums are exact.

ONNX Runtime deals the rows of a batch out to its threads and rounds each share by itself. Here
all rows of a step are rounded together, as with one thread there.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import numpy as np
from onnx import NodeProto, helper

from tvmstruct.errors import ModelError, UnsupportedOperatorError
from tvmstruct.frontends.branches import walk, with_branches

NAME, DOMAIN = "DynamicQuantizeLSTM", "com.microsoft"
INPUTS = 12  # X, W, R, B, lengths, h, c, P, then scale and zero point of W and of R


def is_quantized(node: NodeProto) -> bool:
    """Return whether a node is a ``DynamicQuantizeLSTM``."""
    return node.op_type == NAME and node.domain == DOMAIN


def dequantize_layers(
    nodes: Sequence[NodeProto], arrays: Mapping[str, np.ndarray]
) -> tuple[tuple[NodeProto, ...], dict[str, np.ndarray], dict[str, str], dict[str, np.ndarray]]:
    """Return the nodes as LSTMs, the arrays with their weights, what is known of these.

    That is the dtypes that they were stored in and their scales, (d,) or (d, 4 h). A weight keeps
    the name of its integers where nothing else needs these.
    """
    taken = {i for n in walk(nodes) if n.op_type not in (NAME, "If") for i in n.input}
    weights = _Weights(arrays, taken)

    def change(some: Iterable[NodeProto]) -> list[NodeProto]:
        return [
            weights.lstm(n)
            if n.op_type == NAME
            else with_branches(n, change)
            if n.op_type == "If"
            else n
            for n in some
        ]

    return tuple(change(nodes)), {**arrays, **weights.made}, weights.stored, weights.scales


class _Weights:
    """Dequantises each weight once."""

    def __init__(self, arrays: Mapping[str, np.ndarray], taken: set[str]) -> None:
        self.arrays, self.taken = arrays, taken
        self.names: dict[tuple[str, str, str], str] = {}
        self.made: dict[str, np.ndarray] = {}
        self.stored: dict[str, str] = {}
        self.scales: dict[str, np.ndarray] = {}

    def lstm(self, node: NodeProto) -> NodeProto:
        """Return a ``DynamicQuantizeLSTM`` as an LSTM."""
        inputs = [*node.input, *[""] * INPUTS][:INPUTS]
        inputs[1] = self.weight(node, inputs[1], *inputs[8:10])
        inputs[2] = self.weight(node, inputs[2], *inputs[10:12])
        copy = helper.make_node("LSTM", inputs[:8], list(node.output), name=node.name)
        copy.attribute.extend(node.attribute)
        return copy

    def weight(self, node: NodeProto, name: str, scale: str, zero: str) -> str:
        """Return the name of the float weight that integers, scale and zero point make."""
        key = (name, scale, zero)
        if key not in self.names:
            missing = [part for part in key if part not in self.arrays]
            if missing:
                raise UnsupportedOperatorError(
                    f"{NAME} {node.name!r}: {missing} are no constants; only constant weights, "
                    "scales and zero points can be compiled"
                )
            own = name
            while own in self.taken:
                own += ".float32"
            self.taken.add(own)
            self.names[key] = own
            self.made[own] = _dequantized(node, name, *(self.arrays[part] for part in key))
            self.stored[own] = self.arrays[name].dtype.name
            self.scales[own] = self.arrays[scale].astype(np.float32)
        return self.names[key]


def _dequantized(
    node: NodeProto, name: str, w: np.ndarray, scale: np.ndarray, zero: np.ndarray
) -> np.ndarray:
    """Return integers (d, n, 4 h) as ONNX's LSTM wants them: float32 of (d, 4 h, n)."""
    per_side, per_column = w.shape[:1], (w.shape[0], w.shape[-1])
    if w.dtype.name not in ("int8", "uint8") or w.ndim != 3 or zero.dtype != w.dtype:
        raise ModelError(
            f"{NAME} {node.name!r}: {name!r} is {w.dtype}{list(w.shape)} with zero points in "
            f"{zero.dtype}; want int8 or uint8 of three axes, both of one type"
        )
    if scale.shape not in (per_side, per_column) or zero.shape != scale.shape:
        raise ModelError(
            f"{NAME} {node.name!r}: scale {scale.shape} and zero point {zero.shape} of {name!r} "
            f"must both have the shape {per_side} or {per_column}"
        )
    sides = (w.shape[0], 1, -1)
    values = (w.astype(np.float32) - zero.reshape(sides)) * scale.astype(np.float32).reshape(sides)
    return np.ascontiguousarray(values.transpose(0, 2, 1))
