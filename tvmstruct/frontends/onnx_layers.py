"""Recurrent layers of an ONNX graph: their weights taken once, their nodes written in Relax."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace

import numpy as np
import tvm
from onnx import NodeProto
from tvm import relax

from tvmstruct import compat
from tvmstruct.frontends.branches import reads, walk, with_branches
from tvmstruct.frontends.onnx_recurrent import KINDS, Layer, column_scales, own_node, read_layer
from tvmstruct.frontends.recurrent import emit_recurrent
from tvmstruct.frontends.source import new_tensor, tensor_view
from tvmstruct.frontends.validate import SMALL, Graph
from tvmstruct.ops import Array, Dense
from tvmstruct.recurrent import Recurrent

R = relax.op
MATRICES = ("input.weight", "hidden.weight")


def take_layers(graph: Graph) -> Graph:
    """Return the graph with ``layers``, whose nodes read only what is computed.

    The tensors hold each weight once, in the layout that the layers have, under its own name;
    where another node reads it too, the layer's has ``.gates`` after it.
    """
    taker = _Taker(graph)
    nodes = tuple(taker.changed(graph.nodes))
    used = {name for node in nodes for name in reads(node)} | {s.name for s in graph.outputs}
    kept = {n: t for n, t in graph.tensors.items() if n in used}
    stored = {n: d for n, d in graph.stored_dtypes.items() if n in used}
    return replace(
        graph,
        nodes=nodes,
        tensors=kept | taker.tensors,
        stored_dtypes=stored | taker.stored,
        layers=taker.layers,
        scales=taker.scales,
    )


class _Taker:
    """Makes the tensors of layers; two nodes of one kind share theirs."""

    def __init__(self, graph: Graph) -> None:
        self.graph = graph
        self.others = {s.name for s in graph.outputs}
        self.others |= {i for n in walk(graph.nodes) for i in _computed(n).input}
        self.layers: dict[str, Layer] = {}
        self.tensors: dict[str, tvm.runtime.Tensor] = {}
        self.stored: dict[str, str] = {}
        self.scales: dict[str, np.ndarray] = {}
        self.arrays: dict[tuple[object, ...], tuple[str, Array]] = {}

    def changed(self, nodes: Iterable[NodeProto]) -> list[NodeProto]:
        """Return nodes without the weights of those whose layers are kept."""
        result = []
        for node in nodes:
            if node.op_type in KINDS:
                rounded = node.input[1] in self.graph.scales
                self.layers[node.name] = self._shared(read_layer(node, self._array), rounded)
            elif node.op_type == "If":
                node = with_branches(node, self.changed)
            result.append(_computed(node))
        return result

    def _array(self, name: str) -> Array | None:
        if name in self.graph.tensors:
            return tensor_view(self.graph.tensors[name])
        return self.graph.constants.get(name)

    def _shared(self, layer: Layer, rounded: bool) -> Layer:
        """Return the layer on arrays that the tensors hold."""
        sides = [
            self._side(i, _added_last(side) if rounded else side, names)
            for i, (side, names) in enumerate(zip(layer.directions, layer.names, strict=True))
        ]
        directions, names = zip(*sides, strict=True)
        return Layer(directions, names, layer.batch_first, rounded)

    def _side(
        self, number: int, side: Recurrent, names: Mapping[str, str]
    ) -> tuple[Recurrent, Mapping[str, str]]:
        found: dict[str, str] = {}

        def take(part: str, array: Array) -> Array:
            cell = side.cell.kind, side.cell.split_reset
            source = _source(names[part])
            scales = self.graph.scales.get(source) if part in MATRICES else None
            found[part], held = self._take(names[part], part, cell, array, scales is not None)
            if scales is not None:
                self.scales[found[part]] = column_scales(scales[number], side.cell.kind, side.h)
            return held

        return _with_arrays(side, take), found

    def _take(
        self, name: str, part: str, cell: object, array: Array, always: bool
    ) -> tuple[str, Array]:
        """Return name and array of the tensor of one part of a layer, small ones if ``always``."""
        key = (name, part, cell)
        if key not in self.arrays:
            own = name
            while own in self.tensors or own in self.others:
                own += ".gates"
            if always or array.size > SMALL:
                self.tensors[own] = new_tensor(array)
                array = tensor_view(self.tensors[own])
                if (stored := self._stored(name)) != "float32":
                    self.stored[own] = stored
            self.arrays[key] = own, array
        return self.arrays[key]

    def _stored(self, name: str) -> str:
        for candidate in (name, _source(name)):
            if candidate in self.graph.stored_dtypes:
                return self.graph.stored_dtypes[candidate]
            if (array := self._array(candidate)) is not None:
                return array.dtype.name
        return "float32"


def _source(name: str) -> str:
    """Return the name in the source of a direction's part."""
    return name.removesuffix(".forward").removesuffix(".reverse").removesuffix(".hidden")


def _added_last(side: Recurrent) -> Recurrent:
    """Return a direction whose bias meets the sum of both products, not that with the input."""
    return replace(side, bias=None, hidden_bias=side.bias)


def _computed(node: NodeProto) -> NodeProto:
    """Return a node without what its layer, if it is one, has of it."""
    return own_node(node) if node.op_type in KINDS else node


def _with_arrays(layer: Recurrent, take: Callable[[str, Array], Array]) -> Recurrent:
    """Return a dense layer whose arrays went through ``take(part, array)``."""

    def vector(part: str, array: Array | None) -> Array | None:
        return None if array is None else take(part, array)

    assert isinstance(layer.input, Dense)
    assert isinstance(layer.hidden, Dense)
    return replace(
        layer,
        input=Dense(take("input.weight", layer.input.w)),
        hidden=Dense(take("hidden.weight", layer.hidden.w)),
        bias=vector("input.bias", layer.bias),
        hidden_bias=vector("hidden.bias", layer.hidden_bias),
        peepholes=vector("peepholes", layer.peepholes),
    )


def emit_layer(
    bb: relax.BlockBuilder,
    layer: Layer,
    tensors: Mapping[str, tvm.runtime.Tensor],
    inputs: Sequence[relax.Expr | None],
) -> relax.Expr:
    """Return Y, Y_h and Y_c of X, sequence_lens, initial_h and initial_c, as ONNX shapes them.

    Lengths are bounded by 0 and the number of steps, whatever the request holds.
    """
    x, lengths, *states = [*inputs, None, None][:4]
    assert x is not None
    dtype, swap = compat.dtype_of(x), layer.batch_first

    def constant(array: np.ndarray, part: str, direction: int) -> relax.Expr:
        tensor = tensors.get(layer.names[direction].get(part, ""))
        return relax.const(array) if tensor is None else relax.const(tensor)

    def turned(value: relax.Expr) -> relax.Expr:
        return bb.emit(R.permute_dims(value, (1, 0, 2))) if swap else value

    def ready(value: relax.Expr | None) -> relax.Expr | None:
        if value is None:
            return None
        return turned(value if dtype == "float32" else bb.emit(R.astype(value, "float32")))

    def back(value: relax.Expr) -> relax.Expr:
        return value if dtype == "float32" else bb.emit(R.astype(value, dtype))

    x, h, c = ready(x), *map(ready, states)
    shape = compat.static_shape(x)
    assert shape is not None
    steps, batch = shape[:2]
    if lengths is not None:
        lengths = bb.emit(R.astype(lengths, "int32"))
        bounds = relax.const(0, "int32"), relax.const(steps, "int32")
        lengths = bb.emit(R.minimum(bb.emit(R.maximum(lengths, bounds[0])), bounds[1]))
        if layer.rounded:
            x = _until(bb, x, steps, lengths)
    y, *last = emit_recurrent(bb, x, layer.directions, h, c, lengths, constant)
    d, size = len(layer.directions), layer.directions[0].h
    y = bb.emit(R.reshape(y, (steps, batch, d, size)))
    y = bb.emit(R.permute_dims(y, (1, 0, 2, 3) if swap else (0, 2, 1, 3)))
    return relax.Tuple([back(y), *(back(turned(s)) for s in last if s is not None)])


def _until(bb: relax.BlockBuilder, x: relax.Expr, steps: int, lengths: relax.Expr) -> relax.Expr:
    """Return x (s, b, n) with zeros after the longest row's end, which no range sees then."""
    number = relax.const(np.arange(steps, dtype=np.int32).reshape(-1, 1, 1))
    inside = bb.emit(R.less(number, bb.emit(R.max(lengths))))
    return bb.emit(R.where(inside, x, relax.const(0, "float32")))


__all__ = ["emit_layer", "take_layers"]
