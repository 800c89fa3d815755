"""Trained modules as sources for the compiler, every parameter with its bits and its name."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import singledispatchmethod
from math import prod
from typing import Any

import numpy as np
import tvm
from torch import nn
from tvm import relax

from tvmstruct.errors import ModelError
from tvmstruct.frontends.lookup import emit_operator
from tvmstruct.frontends.recurrent import emit_recurrent
from tvmstruct.frontends.source import Shape, Source, TensorSpec, new_tensor
from tvmstruct.training.embedding import StructuredEmbedding
from tvmstruct.training.language_model import LanguageModel
from tvmstruct.training.linear import StructuredLinear, StructuredOperator, to_array
from tvmstruct.training.recurrent import StructuredCell, StructuredRecurrent

R = relax.op


def export(model: nn.Module) -> Source:
    """Return the ``Source`` of a trained module; its weights are the parameters bit for bit.

    A `LanguageModel` takes ids (steps, batch) and the state h and, for an LSTM, c (layers, batch,
    h); it returns logits (steps, batch, vocabulary) and the last state: to go on, feed it again.
    Layers alone are exported too: `StructuredLSTM` and `StructuredGRU` of x (steps, batch, n_in)
    and the state, `StructuredLinear` of x (rows, n_in), `StructuredEmbedding` of ids (steps,
    batch). Other modules, without recurrent layers, go through ``tvmstruct.from_torch``.
    Raises ModelError for a module in training mode or of another kind.
    """
    if model.training:
        raise ModelError("export: the module is in training mode; call model.eval() first")
    graph = _graph_of(model)
    writer = _Writer(model)

    def build(shapes: dict[str, Shape]) -> tvm.IRModule:
        bb = relax.BlockBuilder()
        params = [
            relax.Var(s.name, relax.TensorType(shapes[s.name], s.dtype)) for s in graph.inputs
        ]
        with bb.function("main", params):
            with bb.dataflow():
                out = graph.write(writer, bb, *params)
                out = out[0] if len(out) == 1 else relax.Tuple(list(out))
                result = bb.emit_output(out)
            bb.emit_func_output(result)
        return bb.get()

    return Source(
        inputs=tuple(graph.inputs),
        outputs=tuple(graph.outputs),
        tensors=writer.tensors,
        build=build,
        token_inputs=graph.tokens,
        name=type(model).__name__,
    )


@dataclass(frozen=True)
class _Graph:
    """Inputs, outputs and ``write(writer, builder, *inputs)``, which returns the outputs."""

    inputs: Sequence[TensorSpec]
    outputs: Sequence[TensorSpec]
    write: Callable[..., Sequence[relax.Expr]]
    tokens: dict[str, int] = field(default_factory=dict)


def _graph_of(model: nn.Module) -> _Graph:
    match model:
        case StructuredLinear():
            return _linear(model)
        case StructuredEmbedding():
            ids = TensorSpec("ids", "int64", ("steps", "batch"))
            rows = TensorSpec("rows", "float32", ("steps", "batch", model.embedding_dim))
            tokens = {"ids": model.num_embeddings}
            return _Graph([ids], [rows], lambda w, bb, x: [w.rows(model, bb, x, "")], tokens)
        case StructuredRecurrent():
            x = TensorSpec("x", "float32", ("steps", "batch", model.input_size))
            y = TensorSpec("y", "float32", ("steps", "batch", model.hidden_size))
            state = _states(model)

            def write(w: _Writer, bb: relax.BlockBuilder, *args: relax.Expr) -> list[relax.Expr]:
                return w.recurrent(model, bb, args[0], args[1:], "")

            return _Graph([x, *state], [y, *state], write)
        case LanguageModel():
            return _language_model(model)
        case _:
            raise ModelError(
                f"export: {type(model).__name__} is not a LanguageModel nor one of its layers; "
                "tvmstruct.from_torch takes any module without recurrent layers"
            )


def _linear(model: StructuredLinear) -> _Graph:
    x = TensorSpec("x", "float32", ("rows", model.in_features))
    y = TensorSpec("y", "float32", ("rows", model.out_features))
    return _Graph([x], [y], lambda w, bb, v: [w.dense(model, bb, v, "")])


def _language_model(model: LanguageModel) -> _Graph:
    ids = TensorSpec("ids", "int64", ("steps", "batch"))
    width = model.output.out_features
    logits = TensorSpec("logits", "float32", ("steps", "batch", width))
    state = _states(model.recurrent)

    def write(w: _Writer, bb: relax.BlockBuilder, *args: relax.Expr) -> list[relax.Expr]:
        x = w.rows(model.embedding, bb, args[0], "embedding.")
        y, *last = w.recurrent(model.recurrent, bb, x, args[1:], "recurrent.")
        return [w.dense(model.output, bb, y, "output."), *last]

    tokens = {"ids": model.embedding.num_embeddings}
    return _Graph([ids, *state], [logits, *state], write, tokens)


def _states(model: StructuredRecurrent) -> list[TensorSpec]:
    if model.batch_first:
        raise ModelError("export: batch_first=True; sources take steps first, then the batch")
    shape = (model.num_layers, "batch", model.hidden_size)
    return [TensorSpec(n, "float32", shape) for n in ("h", "c")[: 2 if model.kind == "lstm" else 1]]


class _Writer:
    """Writes layers as Relax; ``tensors`` are the parameters by their names in the state dict."""

    def __init__(self, model: nn.Module) -> None:
        self.tensors: dict[str, tvm.runtime.Tensor] = {}
        made: dict[int, tvm.runtime.Tensor] = {}
        for name, parameter in model.named_parameters(remove_duplicate=False):
            array = to_array(parameter)
            if array.dtype != np.float32:
                raise ModelError(f"export: {name} is {array.dtype}; call model.float() first")
            if id(parameter) not in made:
                made[id(parameter)] = new_tensor(array)
            self.tensors[name] = made[id(parameter)]

    def constant(self, name: str) -> relax.Expr:
        """Return a parameter as a constant that holds one tensor for all shapes."""
        return relax.const(self.tensors[name])

    def operator(
        self, layer: StructuredOperator, bb: relax.BlockBuilder, x: relax.Expr, at: str
    ) -> relax.Expr:
        """Return ``x @ op``."""

        def weight(_: np.ndarray, name: str) -> relax.Expr:
            return self.constant(at + name.replace(".", "_"))

        return emit_operator(bb, x, layer.operator(), weight)

    @singledispatchmethod
    def dense(self, layer: Any, bb: relax.BlockBuilder, x: relax.Expr, at: str) -> relax.Expr:
        """Return ``x @ weight.T + bias`` of an ``nn.Linear``."""
        weight = bb.emit(R.permute_dims(self.constant(at + "weight"), (1, 0)))
        y = bb.emit(R.matmul(x, weight))
        return y if layer.bias is None else bb.emit(R.add(y, self.constant(at + "bias")))

    @dense.register
    def _(
        self, layer: StructuredLinear, bb: relax.BlockBuilder, x: relax.Expr, at: str
    ) -> relax.Expr:
        y = self.operator(layer, bb, x, at)
        return y if layer.bias is None else bb.emit(R.add(y, self.constant(at + "bias")))

    @singledispatchmethod
    def rows(self, layer: Any, bb: relax.BlockBuilder, ids: relax.Expr, at: str) -> relax.Expr:
        """Return the rows of an ``nn.Embedding``."""
        del layer
        return bb.emit(R.take(self.constant(at + "weight"), ids, axis=0))

    @rows.register
    def _(
        self, layer: StructuredEmbedding, bb: relax.BlockBuilder, ids: relax.Expr, at: str
    ) -> relax.Expr:
        """Return the rows in the spelling that `recognize_word2ket` reads."""
        emit, table = bb.emit, layer.table()
        steps, batch = (int(d) for d in ids.ty.shape)
        unit, digits = 1, list[relax.Expr]()
        for place, factor in reversed(list(enumerate(table.factors))):
            digit = emit(R.divide(ids, relax.const(unit, "int64"))) if unit > 1 else ids
            base = relax.const(factor.shape[1], "int64")
            digits.insert(0, emit(R.floor_mod(digit, base)) if place else digit)
            unit *= factor.shape[1]
        left, width = None, 1
        *firsts, last = layer.names
        for name, digit in zip(firsts, digits, strict=False):
            rank, _, q = self.tensors[at + name].shape
            turned = emit(R.permute_dims(self.constant(at + name), (1, 2, 0)))  # (t, q, r)
            found = emit(R.take(turned, digit, axis=0, mode="clip"))
            if left is None:
                left, width = found, q
                continue
            left = emit(R.reshape(left, (steps, batch, width, 1, rank)))
            found = emit(R.reshape(found, (steps, batch, 1, q, rank)))
            width *= q
            left = emit(R.reshape(emit(R.multiply(left, found)), (steps, batch, width, rank)))
        turned = emit(R.permute_dims(self.constant(at + last), (1, 0, 2)))  # (t, r, q)
        found = emit(R.take(turned, digits[-1], axis=0, mode="clip"))
        features = prod(table.sides)
        y = emit(R.reshape(emit(R.matmul(left, found)), (steps, batch, features)))
        if features == table.dimension:
            return y
        return emit(R.strided_slice(y, [2], [0], [table.dimension]))

    def recurrent(
        self,
        model: StructuredRecurrent,
        bb: relax.BlockBuilder,
        x: relax.Expr,
        state: Sequence[relax.Expr],
        at: str,
    ) -> list[relax.Expr]:
        """Return y and the last state (layers, batch, h), one or two tensors."""
        last: list[list[relax.Expr]] = []
        for k, layer in enumerate(model.layers):
            own = [bb.emit(R.strided_slice(s, [0], [k], [k + 1])) for s in state]
            x, *found = self.cell(layer, bb, x, own, f"{at}layers.{k}.")
            last.append(found)
        states = zip(*last, strict=True)
        return [x, *(s[0] if len(s) == 1 else bb.emit(R.concat(list(s), 0)) for s in states)]

    def cell(
        self,
        layer: StructuredCell,
        bb: relax.BlockBuilder,
        x: relax.Expr,
        state: Sequence[relax.Expr],
        at: str,
    ) -> list[relax.Expr]:
        """Return y and the last state (1, batch, h) of one layer."""
        biases = {"input.bias": "bias", "hidden.bias": "hidden_bias"}

        def constant(_: np.ndarray, part: str, direction: int) -> relax.Expr:
            del direction
            known = biases.get(part)
            head, _, tail = part.partition(".")
            return self.constant(at + (known or f"{head}.{tail.replace('.', '_')}"))

        found = emit_recurrent(bb, x, [layer.recurrent()], *state, constant=constant)
        return [v for v in found if v is not None]
