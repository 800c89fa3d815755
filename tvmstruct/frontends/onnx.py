"""ONNX models: read, check, fold at fixed shapes and import into Relax."""

from __future__ import annotations

import contextlib
import io
import threading
from collections.abc import Mapping, Sequence
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import tvm
from onnx import ModelProto, NodeProto, helper
from tvm import relax
from tvm.relax.frontend.onnx import onnx_frontend

from tvmstruct.errors import ModelError, TvmstructError, UnsupportedOperatorError
from tvmstruct.frontends.analyse import (
    describe_outputs,
    find_length_inputs,
    find_limits,
    find_token_inputs,
    fold_at_probes,
)
from tvmstruct.frontends.einsum import einsum
from tvmstruct.frontends.elements import gather_elements
from tvmstruct.frontends.fold import Folded, fold
from tvmstruct.frontends.fold_static import fold_static
from tvmstruct.frontends.inputs import with_constants, with_shapes
from tvmstruct.frontends.nodes import attribute, describe, text_attribute
from tvmstruct.frontends.onnx_layers import emit_layer, take_layers
from tvmstruct.frontends.source import Shape, Source
from tvmstruct.frontends.validate import Graph, check_model, read_model

_IMPORT_LOCK = threading.Lock()  # TVM's importer prints and keeps global state


def from_onnx(
    model: str | Path | bytes | ModelProto,
    *,
    constants: Mapping[str, Any] | None = None,
    shapes: Mapping[str, Sequence[int | str]] | None = None,
) -> Source:
    """Return the ``Source`` of an ONNX model (path, bytes or message; opset 9 to 21).

    ``constants`` fixes inputs to a value, as ``{"sr": 16000}``: what they decide is decided once,
    ``If`` nodes above all, and they are inputs no longer. ``shapes`` fixes or names dimensions of
    inputs that the model leaves open, as ``{"input": ("batch", 576)}``.
    """
    proto, folder = read_model(model)
    try:
        graph = check_model(proto, folder)
        del proto
        graph = with_constants(with_shapes(graph, shapes or {}), constants or {})
        return source_from_graph(graph)
    except TvmstructError:
        raise
    except (ValueError, TypeError, LookupError, RuntimeError, ArithmeticError) as error:
        raise ModelError(f"the ONNX model is damaged: {error}") from error


def source_from_graph(graph: Graph, limits: Mapping[str, int] | None = None) -> Source:
    """Return the ``Source`` of a checked graph; ``limits`` replaces the search for bounds."""
    graph = take_layers(fold_static(graph))
    tokens = find_token_inputs(graph)
    probed = fold_at_probes(graph, tokens)

    def build(shapes: dict[str, Shape]) -> tvm.IRModule:
        return import_folded(graph, fold(graph, shapes, tokens))

    return Source(
        inputs=graph.inputs,
        outputs=describe_outputs(graph, probed),
        tensors=graph.tensors,
        build=build,
        token_inputs=tokens,
        length_inputs=find_length_inputs(graph, probed),
        find_limits=lambda: dict(limits) if limits else find_limits(graph, tokens),
        stored_dtypes=graph.stored_dtypes,
        scales=graph.scales,
        name=graph.name,
    )


class _Importer(onnx_frontend.ONNXGraphImporter):
    """TVM's importer with safe lookups and errors that name the node."""

    def __init__(self, graph: Graph, folded: Folded) -> None:
        super().__init__({}, None, sanitize=False)
        self.folded = folded
        self.failed: NodeProto | None = None
        self.by_output = {n.output[0]: n for n in folded.nodes}
        self.names = {n.name: n for n in folded.nodes}
        self.graph = graph

    def _check_for_unsupported_ops(self, graph: onnx.GraphProto) -> None:
        """Leave it to `SUPPORTED`: recurrent operators are written here, not by TVM."""

    def _convert_operator(
        self, op_name: str, inputs: list[Any], attrs: dict[str, Any], opset: int
    ) -> relax.Expr:
        node = self.names[attrs["tvm_custom"]["name"]]
        self.failed = node
        if (layer := self.graph.layers.get(node.name)) is not None:
            return emit_layer(self.bb, layer, self.graph.tensors, list(inputs))
        if op_name == "Gather" and isinstance(inputs[1], relax.Expr):
            return self.bb.normalize(self._gather(node, inputs[0], inputs[1]))
        if op_name == "GatherND" and isinstance(inputs[1], relax.Expr):
            return self._gather_nd(node, inputs[0], inputs[1])
        if op_name == "GatherElements" and isinstance(inputs[1], relax.Expr):
            axis = attribute(node, "axis", 0)
            return gather_elements(self.bb.normalize, inputs[0], inputs[1], axis)
        if op_name in ("Max", "Min", "Clip"):
            return self._bound(op_name, list(inputs))
        if op_name == "Pad" and (padded := self._pad(node, inputs[0])) is not None:
            return padded
        if op_name == "Einsum":
            equation = attrs["equation"].decode()
            if (found := einsum(self.bb.normalize, equation, list(inputs))) is not None:
                return found
        if op_name == "Tile" and (counts := self.folded.constants.get(node.input[1])) is not None:
            return relax.op.tile(inputs[0], [int(n) for n in counts])
        return super()._convert_operator(op_name, inputs, attrs, opset)

    def _gather(self, node: NodeProto, data: relax.Expr, index: relax.Expr) -> relax.Expr:
        """Look rows up without reading outside the table."""
        shape = self.folded.shapes[node.input[0]]
        axis = attribute(node, "axis", 0)
        rows = shape[axis]
        constant = self.folded.constants.get(node.input[1])
        if constant is not None:
            index = relax.const(np.where(constant < 0, constant + rows, constant), constant.dtype)
            return relax.op.take(data, index, axis)
        if node.output[0] in self.folded.safe_gathers:
            return relax.op.take(data, index, axis)
        dtype = self.folded.dtypes[node.input[1]].name
        zero, extent = relax.const(0, dtype), relax.const(rows, dtype)
        wrapped = relax.op.where(relax.op.less(index, zero), relax.op.add(index, extent), index)
        return relax.op.take(data, self.bb.normalize(wrapped), axis, mode="clip")

    def _pad(self, node: NodeProto, x: relax.Expr) -> relax.Expr | None:
        """Write zeros around a float array as an operator that passes can read, not a kernel."""
        more = [name for name in node.input[2:] if name]
        pads = self.folded.constants.get(node.input[1]) if len(node.input) > 1 else None
        plain = text_attribute(node, "mode", "constant") == "constant"
        if pads is None or more or not plain or (pads < 0).any():
            return None
        if self.folded.dtypes[node.input[0]].kind != "f":
            return None
        widths = pads.reshape(2, -1).T.reshape(-1)
        return self.bb.normalize(relax.op.nn.pad(x, [int(n) for n in widths]))

    def _gather_nd(self, node: NodeProto, data: relax.Expr, index: relax.Expr) -> relax.Expr:
        """Look parts up under several indices as under one, without reading outside the data."""
        shape, at = (self.folded.shapes[i] for i in node.input[:2])
        dtype, depth = self.folded.dtypes[node.input[1]].name, at[-1]
        total = None
        for i in range(depth):
            part = self.bb.normalize(relax.op.take(index, relax.const(i, "int64"), len(at) - 1))
            negative = self.bb.normalize(relax.op.less(part, relax.const(0, dtype)))
            wrapped = self.bb.normalize(relax.op.add(part, relax.const(shape[i], dtype)))
            part = self.bb.normalize(relax.op.where(negative, wrapped, part))
            step = relax.const(prod(shape[i + 1 : depth]), dtype)
            part = self.bb.normalize(relax.op.multiply(part, step))
            total = part if total is None else self.bb.normalize(relax.op.add(total, part))
        flat = relax.op.reshape(data, (prod(shape[:depth]), *shape[depth:]))
        return relax.op.take(self.bb.normalize(flat), total, 0, mode="clip")

    def _bound(self, op_name: str, inputs: list[Any]) -> relax.Expr:
        """Write Max, Min and Clip as elementwise operators (TVM stacks or emits a raw kernel)."""
        ops = {"Max": [relax.op.maximum] * len(inputs), "Min": [relax.op.minimum] * len(inputs)}
        ops["Clip"] = [relax.op.maximum, relax.op.maximum, relax.op.minimum][: len(inputs)]
        value = inputs[0]
        for op, bound in list(zip(ops[op_name], inputs, strict=True))[1:]:
            if bound is not None:
                value = self.bb.normalize(op(value, bound))
        return value


def import_folded(graph: Graph, folded: Folded) -> tvm.IRModule:
    """Import a folded graph into Relax and bind the shared weights as constants."""
    importer = _Importer(graph, folded)
    try:
        model, weights = _to_message(graph, folded)
        with _IMPORT_LOCK, contextlib.redirect_stdout(io.StringIO()):
            mod = importer.from_onnx(model, graph.opset)
        mod = _bind_weights(mod, {n: graph.tensors[n] for n in weights}, len(graph.inputs))
    except TvmstructError:
        raise
    except (NotImplementedError, tvm.error.OpNotImplemented) as error:
        raise UnsupportedOperatorError(f"{_where(importer)} cannot be compiled: {error}") from error
    except Exception as error:
        raise ModelError(f"{_where(importer)} cannot be imported: {error}") from error
    _check_result(mod, graph, folded)
    return mod


def _where(importer: _Importer) -> str:
    return describe(importer.failed) if importer.failed is not None else "the model"


def _to_message(graph: Graph, folded: Folded) -> tuple[onnx.GraphProto, list[str]]:
    """Write the folded graph with weights as extra inputs and unique node names."""

    def info(name: str, shape: Shape, dtype: np.dtype) -> onnx.ValueInfoProto:
        return helper.make_tensor_value_info(name, helper.np_dtype_to_tensor_dtype(dtype), shape)

    used = {i for n in folded.nodes for i in n.input} | set(folded.aliases.values())
    weights = [n for n in graph.tensors if n in used]
    names = [s.name for s in graph.inputs] + weights
    outputs = [folded.aliases[s.name] for s in graph.outputs]
    message = helper.make_graph(
        folded.nodes,
        graph.name,
        [info(n, folded.shapes[n], folded.dtypes[n]) for n in names],
        [info(n, folded.shapes[n], folded.dtypes[n]) for n in outputs],
        [onnx.numpy_helper.from_array(np.asarray(a), n) for n, a in folded.constants.items()],
    )
    return message, weights


def _bind_weights(
    mod: tvm.IRModule, tensors: Mapping[str, tvm.runtime.Tensor], inputs: int
) -> tvm.IRModule:
    """Turn the parameters after the inputs into constants that hold these very tensors."""
    params = list(mod["main"].params)[inputs:]
    if params:
        binding = dict(zip(params, tensors.values(), strict=True))
        mod = relax.transform.BindParams("main", binding)(mod)
    main = mod["main"].without_attr("num_input").with_attr("num_input", inputs)
    mod.update_func(mod.get_global_var("main"), main)
    return relax.transform.DeadCodeElimination(["main"])(mod)


def _check_result(mod: tvm.IRModule, graph: Graph, folded: Folded) -> None:
    """Compare the imported outputs with the shapes and dtypes that ONNX infers."""
    ty = mod["main"].ret_ty
    fields = list(ty.fields) if isinstance(ty, relax.TupleType) else [ty]
    for spec, field in zip(graph.outputs, fields, strict=True):
        name = folded.aliases[spec.name]
        found = tuple(int(d) for d in field.shape)
        if found != folded.shapes[name] or str(field.dtype) != folded.dtypes[name].name:
            raise ModelError(
                f"output {spec.name!r} was imported as {field.dtype}{list(found)} but ONNX infers "
                f"{folded.dtypes[name]}{list(folded.shapes[name])}; please report this model"
            )
