"""ONNX convolutions along one axis as products: what a window holds is a row, a kernel a column.

The direct kernel fills its vectors with positions, of which models of speech have few; a product
fills them with channels, and its weight is packed like that of any dense layer.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import tvm
from onnx import NodeProto, helper
from tvm import relax

from tvmstruct import compat
from tvmstruct.errors import ModelError
from tvmstruct.frontends.nodes import describe, text_attribute
from tvmstruct.ops import Array

R = relax.op
Shape = tuple[int, ...]
Take = Callable[[str, Array], tuple[str, Array]]  # an array's name and itself, as they are held


@dataclass(frozen=True, eq=False)
class Convolution:
    """``y[b, :, i] = bias + sum_j x[b, :, i stride + j] @ matrix[j]`` of padded x (b, c, l).

    ``matrix`` is (k c, out), its rows ordered by place in the window, then channel; ``names`` are
    those of the tensors of matrix and bias.
    """

    names: tuple[str, str]
    matrix: Array
    bias: Array | None
    taps: int
    stride: int
    pads: tuple[int, int]

    @property
    def channels(self) -> int:
        """Channels of the input."""
        return self.matrix.shape[0] // self.taps

    def positions(self, length: int) -> int:
        """Return how many windows an input of this length has."""
        return (length + sum(self.pads) - self.taps) // self.stride + 1

    def infer(
        self, node: NodeProto, shapes: Mapping[str, Shape], dtypes: Mapping[str, np.dtype]
    ) -> dict[str, tuple[Shape, np.dtype]]:
        """Return shape and dtype of the output; ModelError where the input does not fit."""
        x = shapes[node.input[0]]
        if len(x) != 3 or x[1] != self.channels or self.positions(x[2]) < 1:
            raise ModelError(
                f"{describe(node)}: input {node.input[0]!r} has the shape {x}; want (batch, "
                f"{self.channels}, {self.taps - sum(self.pads)} or more)"
            )
        if dtypes[node.input[0]] != np.float32:
            raise ModelError(f"{describe(node)}: input {node.input[0]!r} must be float32")
        shape = (x[0], self.matrix.shape[1], self.positions(x[2]))
        return {node.output[0]: (shape, np.dtype(np.float32))}

    def emit(
        self,
        bb: relax.BlockBuilder,
        tensors: Mapping[str, tvm.runtime.Tensor],
        inputs: Sequence[relax.Expr | None],
    ) -> relax.Expr:
        """Return the convolution of an input (b, c, l) as (b, out, positions)."""
        x, emit = inputs[0], bb.emit
        assert x is not None
        shape = compat.static_shape(x)
        assert shape is not None
        rows = self._windows(bb, emit(R.permute_dims(x, (0, 2, 1))), shape[2])
        batch, positions = shape[0], self.positions(shape[2])
        rows = emit(R.reshape(rows, (batch * positions, self.matrix.shape[0])))
        y = emit(R.matmul(rows, relax.const(tensors.get(self.names[0], self.matrix))))
        if self.bias is not None:
            y = emit(R.add(y, relax.const(tensors.get(self.names[1], self.bias))))
        y = emit(R.reshape(y, (batch, positions, self.matrix.shape[1])))
        return emit(R.permute_dims(y, (0, 2, 1)))

    def _windows(self, bb: relax.BlockBuilder, x: relax.Expr, length: int) -> relax.Expr:
        """Return (b, positions, k c) of x (b, l, c), in pieces of a stride where k is some of them.

        A gather, for slices side by side would be read as one linear operator of all positions.
        """
        emit, positions = bb.emit, self.positions(length)
        if any(self.pads):
            x = emit(R.nn.pad(x, [0, 0, *self.pads, 0, 0]))
        shape = compat.static_shape(x)
        assert shape is not None
        piece = self.stride if self.taps % self.stride == 0 else 1
        count = shape[1] // piece
        if count * piece != shape[1]:
            x = emit(R.strided_slice(x, [1], [0], [count * piece]))
        x = emit(R.reshape(x, (shape[0], count, piece * self.channels)))
        if self.taps == piece and positions == count:
            return x  # windows lie side by side
        starts = np.arange(positions) * (self.stride // piece)
        places = starts[:, None] + np.arange(self.taps // piece)
        return emit(R.take(x, relax.const(places.reshape(-1), "int64"), axis=1, mode="clip"))


def read_convolution(
    node: NodeProto, array: Callable[[str], Array | None], take: Take
) -> Convolution | None:
    """Return the convolution of a Conv node, or None for those that TVM's own kernel serves.

    These have two axes or more, groups, a dilation, automatic padding or weights that are
    computed.
    """
    weight = array(node.input[1])
    bias = array(node.input[2]) if len(node.input) > 2 and node.input[2] else None
    told = {a.name: helper.get_attribute_value(a) for a in node.attribute}
    if weight is None or weight.ndim != 3 or weight.dtype != np.float32 or 0 in weight.shape:
        return None
    if (bias is None) != (len(node.input) < 3 or not node.input[2]):
        return None
    if told.get("group", 1) != 1 or list(told.get("dilations", [1])) != [1]:
        return None
    if text_attribute(node, "auto_pad", "NOTSET") != "NOTSET":
        return None
    stride, pads = told.get("strides", [1]), told.get("pads", [0, 0])
    taps = weight.shape[2]
    if len(stride) != 1 or len(pads) != 2 or stride[0] < 1 or min(pads) < 0:
        return None
    if told.get("kernel_shape", [taps]) != [taps] or (
        bias is not None and bias.shape != weight.shape[:1]
    ):
        return None
    matrix = np.ascontiguousarray(weight.transpose(2, 1, 0).reshape(-1, weight.shape[0]))
    name, matrix = take(node.input[1], matrix)
    other = ""
    if bias is not None:
        other, bias = take(node.input[2], np.ascontiguousarray(bias))
    return Convolution((name, other), matrix, bias, taps, stride[0], (pads[0], pads[1]))
