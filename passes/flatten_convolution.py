"""Write a convolution over time as a dense layer: windows side by side, then one product.

Speech and character models have a few short convolutions before their recurrent layers. As dense
layers they get packed weights, register tiles and forms; left to TVM they would be plain loops.
A constant after the convolution and a ReLU go with it, so that they end up in the epilogue.
"""

from __future__ import annotations

import math

import numpy as np
from tvm import relax

from tvmstruct import compat
from tvmstruct.rewrite import Graph

R = relax.op
CONVOLUTION = "relax.nn.conv1d"
MOST_BYTES = 64 << 20  # of windows: what lies in several is copied as often


class FlattenConvolution:
    """Replace a one-dimensional convolution with a constant kernel by a matmul."""

    name = "flatten_convolution"

    def rewrite(self, graph: Graph, call: relax.Call) -> relax.Expr | None:
        """Return the channels (b, o, steps) that a call is the last step of, or None."""
        rows = self._rows(graph, call)
        out = compat.static_shape(call)
        if rows is None or out is None:
            return None
        batch, channels, steps = out
        return R.permute_dims(R.reshape(rows, (batch, steps, channels)), (0, 2, 1))

    def _rows(self, graph: Graph, call: relax.Call) -> relax.Expr | None:
        """Return the rows (b * steps, o) of a convolution, with a constant added, through ReLU."""
        name = compat.op_name(call)
        if name == CONVOLUTION:
            return _product(graph, call)
        if name not in ("relax.add", "relax.nn.relu"):
            return None
        inner = graph.value(call.args[0])
        if not isinstance(inner, relax.Call) or not graph.single(call.args[0]):
            return None
        if name == "relax.nn.relu":
            rows = self._rows(graph, inner)
            return None if rows is None else R.nn.relu(rows)
        bias, out = graph.value(call.args[1]), compat.static_shape(call)
        if compat.op_name(inner) != CONVOLUTION or not compat.is_constant(bias) or out is None:
            return None
        array = compat.constant_array(bias)
        if array.shape not in ((1, out[1], 1), (out[1], 1)) or array.dtype != np.float32:
            return None
        rows = _product(graph, inner)
        return None if rows is None else R.add(rows, relax.const(array.reshape(-1)))


def _product(graph: Graph, call: relax.Call) -> relax.Expr | None:
    """Return the rows (b * steps, o) of a convolution, or None where it stays one."""
    x, w, attrs = call.args[0], graph.value(call.args[1]), call.attrs
    shape, kernel, out = (compat.static_shape(e) for e in (x, w, call))
    if shape is None or kernel is None or out is None or not compat.is_constant(w):
        return None
    layouts = {str(attrs.data_layout), str(attrs.kernel_layout)}
    floats = {compat.dtype_of(x), compat.dtype_of(w), compat.dtype_of(call)} == {"float32"}
    if int(attrs.groups) != 1 or layouts != {"NCW", "OIW"} or not floats:
        return None
    (batch, channels, _), (outputs, _, width), steps = shape, kernel, out[2]
    if 4 * batch * steps * channels * width > MOST_BYTES:
        return None
    before, after = (int(p) for p in attrs.padding)
    if before or after:
        x = R.nn.pad(x, [0, 0, 0, 0, before, after])
    (stride,), (apart,) = ([int(v) for v in values] for values in (attrs.strides, attrs.dilation))
    places = np.arange(steps)[:, None] * stride + np.arange(width) * apart
    windows = R.take(x, relax.const(places.reshape(-1), "int64"), axis=2)
    windows = R.reshape(windows, (batch, channels, steps, width))
    rows = R.reshape(R.permute_dims(windows, (0, 2, 1, 3)), (batch * steps, channels * width))
    flat = R.reshape(call.args[1], (outputs, math.prod(kernel[1:])))
    return R.matmul(rows, R.permute_dims(flat))
