"""Turn every layer call into the call of a scheduled kernel with its packed weights."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache, singledispatchmethod

import numpy as np
from tvm import relax

from tvmstruct import compat, ops
from tvmstruct.layers import (
    Attention,
    Embedding,
    FeedForward,
    HashTables,
    Layer,
    LayerNorm,
    LayerSequence,
    LayerTable,
    MinimalAttention,
    Node,
    ProjectedAttention,
    RecurrentCells,
    arguments,
    weights_of,
)
from tvmstruct.passes.sequence_arguments import SequenceArguments
from tvmstruct.rewrite import Graph
from tvmstruct.schedules import Kernels, Precision
from tvmstruct.schedules.compute.dense import pack, pack_heads, pad_heads
from tvmstruct.schedules.compute.embedding import Rows, Tensors, pack_table
from tvmstruct.schedules.compute.low_precision import DYNAMIC, pack_product
from tvmstruct.schedules.compute.recurrence import (
    Layout,
    hidden_parts,
    pack_bytes,
    pack_integers,
    pack_units,
)
from tvmstruct.schedules.registry import Kernel
from tvmstruct.stages import Program
from tvmstruct.weights import WeightStore

Shapes = tuple[tuple[int, ...], ...]
Dtypes = tuple[str, ...]
Select = Callable[[Kernel, Shapes, Dtypes], Kernel]
BYTES = {  # how hidden matrices are packed in a precision, and the tensors in order
    "int8": (pack_bytes, ("words", "start", "scale")),
    DYNAMIC: (pack_integers, ("words", "sums", "shift", "scale")),
}


def keep_default(kernel: Kernel, shapes: Shapes, dtypes: Dtypes) -> Kernel:
    """Select no tuned kernel."""
    return kernel


@dataclass(frozen=True)
class KernelCall:
    """A kernel as one node calls it: shapes and dtypes of its arguments, outputs last."""

    node: Node
    symbol: str
    shapes: Shapes
    dtypes: Dtypes


class EmitKernels:
    """Choose the kernel of each node for the rows at hand, and collect the kernels used."""

    name = "emit_kernels"

    def __init__(
        self,
        table: LayerTable,
        kernels: Kernels,
        store: WeightStore,
        select: Select = keep_default,
        scales: Mapping[str, np.ndarray] | None = None,
    ) -> None:
        self.table, self.kernels, self.store, self.select = table, kernels, store, select
        self.scales = scales or {}  # of weights that came as integers, by their names
        self.used: dict[str, Kernel] = {}
        self.calls: list[KernelCall] = []
        self.tuned: dict[str, int] = {}  # layers with a tuned schedule, and for how many rows

    def rewrite(self, graph: Graph, call: relax.Call) -> relax.Expr | None:
        """Return the kernel call of a node."""
        node = self.table.node(call)
        if node is None:
            return None
        results = compat.result_shapes(call)
        shape = results[0]
        kernel, args = self._kernel(node, arguments(call), shape)
        shapes = (*(s for a in args if (s := compat.static_shape(a)) is not None), *results)
        dtypes = (*(compat.dtype_of(a) for a in args), *["float32"] * len(results))
        default, kernel = kernel, self.select(kernel, shapes, dtypes)
        if kernel is not default:
            self.tuned |= {layer.names[0]: shape[0] for layer in weights_of(node)}
        self.used[kernel.symbol] = kernel
        self.calls.append(KernelCall(node, kernel.symbol, shapes, dtypes))
        types = [compat.tensor_type(s, "float32") for s in results]
        return relax.call_dps_packed(kernel.symbol, args, types if len(types) > 1 else types[0])

    def kernel_of(self, node: Node, args: list[relax.Expr], shape: tuple[int, ...]) -> Kernel:
        """Return the default kernel of a node with a result of ``shape``."""
        return self._kernel(node, args, shape)[0]

    @singledispatchmethod
    def _kernel(
        self, node: Node, args: list[relax.Expr], shape: tuple[int, ...]
    ) -> tuple[Kernel, list[relax.Expr]]:
        raise TypeError(f"no kernel for {type(node).__name__}")

    @_kernel.register
    def _(self, node: Layer, args, shape):
        x, *residual = args
        if isinstance(node.op, ops.Dense):
            n_in, n_out = node.op.w.shape
            if node.precision != "f32":
                precision = self.kernels.precision(node.precision)
                kernel = precision.kernel(n_out, n_in, node.epilogue, shape[0])
                words = self._low_precision(node, precision)
                return kernel, [x, *words, *self._bias(node), *residual]
            kernel = self.kernels.packed_dense(n_out, n_in, node.epilogue, shape[0])
            return kernel, [x, *self._packed(node), *residual]
        program, weights = self._staged(node)
        kernel = self.kernels.chain(program, node.epilogue, shape[0], node.op.macs)
        return kernel, [x, *weights, *self._bias(node), *residual]

    def _staged(self, layer: Layer) -> tuple[Program, list[relax.Expr]]:
        """Return the stages of a layer and their weights."""
        form = self.kernels.product_form(layer.precision)
        program = self.store.program(
            layer.key, layer.op, self.kernels.lanes, form, parts=self.kernels.threads
        )
        return program, [
            relax.const(
                self.store.tensor(
                    f"{layer.key}#stage{i}", lambda i=i: program.stored(i, pack_product)
                )
            )
            for i in range(len(program.weights))
        ]

    @_kernel.register
    def _(self, node: LayerSequence, args, shape):
        found = SequenceArguments(args)
        for layer, reads in zip(node.members, node.reads, strict=True):
            program, weights = self._staged(layer)
            found.add(layer.epilogue, program, reads, [*weights, *self._bias(layer)])
        kernel = self.kernels.sequence(found.members, found.inputs, shape[0])
        return kernel, found.tensors

    @_kernel.register
    def _(self, node: FeedForward, args, shape):
        x, *residual = args
        up, down = node.up, node.down
        sizes = (up.op.n_in, up.op.n_out, down.op.n_out)
        kernel = self.kernels.feed_forward(sizes, up.epilogue, down.epilogue, shape[0])
        return kernel, [x, *self._packed(up), *self._packed(down), *residual]

    @_kernel.register
    def _(self, node: MinimalAttention, args, shape):
        inputs = 3 + (node.attention.mask != "none")
        kernel = self.kernels.minimal_attention(
            node.attention, node.sources, node.projection.epilogue, shape
        )
        counts = self.kernels.source_heads(node.attention)
        made = [
            tensor
            for layer, count in zip(node.sources, counts, strict=True)
            for tensor in self._packed_heads(layer, count)
        ]
        weights = self._packed(node.projection)
        return kernel, [*args[:3], *made, *args[3:inputs], *weights, *args[inputs:]]

    def _packed_heads(self, layer: Layer, heads: int) -> list[relax.Expr]:
        """Return a weight and its bias packed head by head."""
        assert isinstance(layer.op, ops.Dense)
        width, w = self.kernels.panel_width, layer.op.w
        key = f"{layer.key}#heads{heads}x{width}"
        made = [relax.const(self.store.tensor(key, lambda: pack_heads(w, heads, width)))]
        if layer.bias is not None:
            bias = np.asarray(layer.bias, np.float32)
            made.append(relax.const(self.store.small("bias", pad_heads(bias, heads, width))))
        return made

    def _packed(self, layer: Layer) -> list[relax.Expr]:
        """Return the packed weight of a dense layer and its bias."""
        assert isinstance(layer.op, ops.Dense)
        width, w = self.kernels.panel_width, layer.op.w
        tensor = self.store.tensor(f"{layer.key}#packed{width}", lambda: pack(w, width))
        return [relax.const(tensor), *self._bias(layer)]

    def _low_precision(self, layer: Layer, precision: Precision) -> list[relax.Expr]:
        """Return the tensors of a weight in the layer's precision."""
        assert isinstance(layer.op, ops.Dense)
        scale = self.scales[layer.names[0]] if layer.precision == DYNAMIC else None
        tensors = cache(lambda: precision.tensors(layer.op.w, scale))
        key = f"{layer.key}#{layer.precision}"
        return [
            relax.const(self.store.tensor(f"{key}.{name}", lambda name=name: tensors()[name]))
            for name in precision.names
        ]

    def _bias(self, layer: Layer | HashTables) -> list[relax.Expr]:
        if layer.bias is None:
            return []
        return [relax.const(self.store.small("bias", np.asarray(layer.bias, np.float32)))]

    @_kernel.register
    def _(self, node: Attention, args, shape):
        return self.kernels.attention(node, shape[0]), args

    @_kernel.register
    def _(self, node: ProjectedAttention, args, shape):
        count = 3 if node.attention.mask == "none" else 4
        inputs, more = args[:count], args[count:]
        layer = node.projection
        kernel = self.kernels.projected_attention(
            node.attention, layer.op.n_out, layer.epilogue, shape[0]
        )
        return kernel, [*inputs, *self._packed(layer), *more]

    @_kernel.register
    def _(self, node: HashTables, args, shape):
        z, *more = args
        tables = node.static
        packed = cache(lambda: tables.pack(node.tables, self.kernels.lanes))
        names = ("tables", "scales") if node.precision == "int8" else ("tables",)
        key = f"{node.names[0]}#{node.precision}{self.kernels.lanes}"
        held = [
            relax.const(self.store.tensor(f"{key}.{name}", lambda name=name: packed()[name]))
            for name in names
        ]
        return self.kernels.hash_tables(tables, shape[0]), [z, *held, *self._bias(node), *more]

    @_kernel.register
    def _(self, node: RecurrentCells, args, shape):
        states = node.states
        given, programs = list(args[:states]), []
        for k, layer in enumerate(node.hidden):
            given.append(args[states + k])
            groups = node.static.sides[k].groups or 1
            layout = Layout(groups, node.h // groups, self.kernels.lanes)
            made = [self._hidden(layer, part, layout) for part in hidden_parts(node.cells[k])]
            programs.append(tuple(program for program, _ in made))
            given += [relax.const(tensor) for _, tensors in made for tensor in tensors]
            for name, vector in (("bias", layer.bias), ("peepholes", node.peepholes[k])):
                if vector is not None:
                    rows = np.asarray(vector, np.float32).reshape(-1, node.h)
                    padded = layout.pad(rows).reshape(-1)
                    given.append(relax.const(self.store.small(name, padded)))
        return self.kernels.recurrence(node.static, tuple(programs)), given

    def _hidden(self, layer: Layer, part: tuple[int, int], layout: Layout):
        """Return the program of some gates' hidden products, None for blocks, and its weights."""
        (first, gates), op, groups = part, layer.op, layout.groups
        some = f"{layer.key}#gates{first}+{gates}"
        width = self.kernels.unit_width(layer.precision)
        if layer.precision != "f32":
            given = (op.w,) if layer.precision == "int8" else (op.w, self.scales[layer.names[0]])
            pack, names = BYTES[layer.precision]
            made = cache(lambda: pack(*given, gates, layout, width))
            key = f"{some}#{layer.precision}{width}x{layout.lanes}"
            return None, [self.store.tensor(f"{key}.{n}", lambda n=n: made()[n]) for n in names]
        if groups > 1 or isinstance(op, ops.Dense):
            w = np.asarray(next(op.arrays()), np.float32)
            apart = w.reshape(groups, layout.each, -1, layout.each)[:, :, first : first + gates]
            blocks = apart.reshape(groups, layout.each, -1)
            key = f"{some}#units{width}x{layout.lanes}"
            blocked = lambda: pack_units(blocks, gates, layout, width)  # noqa: E731
            return None, [self.store.tensor(key, blocked)]
        if part != (0, op.n_out // layout.each):
            stop = (first + gates) * layout.each
            op = ops.product(op, ops.Slice(op.n_out, stop, first * layout.each))
        program = self.store.program(some, op, layout.lanes)
        return program, [
            self.store.tensor(f"{some}#stage{i}", lambda i=i: program.stored(i, pack_product))
            for i in range(len(program.weights))
        ]

    @_kernel.register
    def _(self, node: LayerNorm, args, shape):
        return self.kernels.layer_norm(node.n, node.epsilon), args

    @_kernel.register
    def _(self, node: Embedding, args, shape):
        given, found = iter(args), list[relax.Expr]()
        for name, term in zip(node.names, node.total.terms, strict=True):
            found += [next(given)] if isinstance(term, Rows) else self._packed_table(name, node)
            found += [next(given)] if term.ids else []
        return self.kernels.embedding_rows(node.total), [*found, *given]

    def _packed_table(self, name: str, node: Embedding) -> list[relax.Expr]:
        """Return the factors or the leaves of a table."""
        table = node.table
        assert table is not None
        packed = cache(lambda: pack_table(table))
        count = next(len(t.steps) for t in node.total.terms if isinstance(t, Tensors))
        return [
            relax.const(self.store.tensor(f"{name}#table{i}", lambda i=i: packed()[i]))
            for i in range(count)
        ]
