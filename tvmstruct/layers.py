"""Layers while a model is being compiled: what a call in the graph stands for.

The passes do not carry weights through the graph. A dense layer becomes one call of an external
symbol, ``tvmstruct.layer.<i>``, and row i of a `LayerTable` says what it is: its operator, its
bias, its activation. `emit` turns the call into a kernel at the end.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
from tvm import relax

from tvmstruct import compat, ops
from tvmstruct.embeddings import TensorTable
from tvmstruct.recurrent import Cell
from tvmstruct.schedules.compute.dense import Epilogue
from tvmstruct.schedules.compute.embedding import EmbeddingSum
from tvmstruct.schedules.compute.hash_tables import Tables
from tvmstruct.schedules.compute.recurrence import Recurrence, Side

PREFIX = "tvmstruct.layer."


@dataclass(frozen=True)
class Layer:
    """``y = norm(residual + activation(x @ op + bias))`` on rows, under its weights' source names.

    Arguments are x, the residual where there is one, and scale and shift of the normalisation.
    """

    names: tuple[str, ...]
    op: ops.Op
    transposed: bool = False  # whether op is the source's array transposed
    bias: np.ndarray | None = None
    activation: str = "none"
    residual: bool = False
    norm: float | None = None  # epsilon of a layer normalisation at the end
    parts: tuple[Layer, ...] = ()  # the layers that a merged one stands for
    precision: str = "f32"
    variant: str = ""  # what was done to the source's operator, apart from its form

    @property
    def n_out(self) -> int:
        """Features that the layer yields."""
        return self.op.n_out

    @property
    def key(self) -> str:
        """What tells this weight from every other of the model, stable over buckets."""
        return "+".join(self.names) + ("^T" if self.transposed else "") + self.variant

    @property
    def epilogue(self) -> Epilogue:
        """What the kernel does after the product."""
        return Epilogue(self.bias is not None, self.activation, self.residual, self.norm)


@dataclass(frozen=True)
class FeedForward:
    """Two dense layers with the activation between them, computed in chunks that stay in cache.

    Arguments are x and those of ``down`` after its input.
    """

    up: Layer
    down: Layer


@dataclass(frozen=True)
class LayerSequence:
    """Layers that one kernel computes for a few rows, which nothing else reads but the last.

    ``reads`` are the numbers of each member's arguments: those of the sequence count first, then
    the results of the members before it.
    """

    members: tuple[Layer, ...]
    reads: tuple[tuple[int, ...], ...]


@dataclass(frozen=True)
class Attention:
    """Fused attention on row buffers; a layout is (width, offset of the first head).

    Query head h reads key and value head ``h // (heads // kv_heads)``; no ``kv_heads`` means as
    many as heads. ``causal`` hides key j from query i < j.
    """

    heads: int
    head_dim: int
    value_dim: int
    query_length: int
    key_length: int
    scale: float
    q_layout: tuple[int, int]
    k_layout: tuple[int, int]
    v_layout: tuple[int, int]
    mask: str = "none"
    mask_dims: tuple[str, ...] = ()
    causal: bool = False  # key j is hidden from query i < j
    kv_heads: int = 0  # heads of k and v, each shared by equally many of q; 0: as many as q has


@dataclass(frozen=True)
class ProjectedAttention:
    """Attention and the dense layer that reads its heads, without the heads in memory.

    Arguments are those of ``attention`` and those of ``projection`` after its input.
    """

    attention: Attention
    projection: Layer


@dataclass(frozen=True)
class MinimalAttention:
    """Attention, its output projection, and the layers that make its queries, keys and values.

    Arguments are the inputs of ``sources`` (q, k, v), the mask of ``attention`` if it has one,
    and those of ``projection`` after its input.
    """

    attention: Attention
    sources: tuple[Layer, Layer, Layer]
    projection: Layer


@dataclass(frozen=True)
class LayerNorm:
    """``(x - mean) / sqrt(variance + epsilon) * gamma + beta`` over the last axis."""

    n: int
    epsilon: float


@dataclass(frozen=True)
class HashTables:
    """``y = norm(residual + sum_k score_k * tables[k, code_k] + bias)``: `tvmstruct.lookup`.

    Arguments are the hashed features z (rows, h * tau), which some `Layer` yields, the residual
    where there is one, and scale and shift of the normalisation.
    """

    names: tuple[str, ...]  # of the tables in the source
    tables: np.ndarray  # (h, 2**tau, n)
    bias: np.ndarray | None = None
    flips: int = 0
    scaled: bool = True
    residual: bool = False
    norm: float | None = None  # epsilon of a layer normalisation at the end
    precision: str = "f32"

    @property
    def n_out(self) -> int:
        """Features that the layer yields."""
        return self.tables.shape[2]

    @property
    def epilogue(self) -> Epilogue:
        """What the kernel adds to the sum of rows."""
        return Epilogue(self.bias is not None, "none", self.residual, self.norm)

    @property
    def static(self) -> Tables:
        """What the kernel depends on."""
        h, rows, n = self.tables.shape
        tau = rows.bit_length() - 1
        return Tables(h, tau, n, self.flips, self.scaled, self.precision, self.epilogue)


@dataclass(frozen=True)
class RecurrentCells:
    """All steps of a recurrent layer but the products with its input: `tvmstruct.recurrent`.

    ``hidden`` are the hidden matrices of one or two directions, whose bias is that of the hidden
    products; arguments and results are those of `frontends.recurrent.Recurrence`, the arrays of
    hidden operators, biases and peepholes apart. Inside, the units of a direction whose number in
    ``orders`` is g > 1 lie group after group: unit i * g + k of the source in place k * h / g + i.
    """

    cells: tuple[Cell, ...]
    hidden: tuple[Layer, ...]
    peepholes: tuple[np.ndarray | None, ...]
    steps: int
    batch: int
    lengths: bool
    orders: tuple[int, ...] = ()

    @property
    def h(self) -> int:
        """Hidden size."""
        return self.hidden[0].op.n_in

    @property
    def states(self) -> int:
        """Number of arguments before those of the directions."""
        return self.lengths + 1 + (self.cells[0].kind == "lstm")

    @property
    def static(self) -> Recurrence:
        """What the kernel depends on, apart from the forms of the hidden matrices."""
        sides = tuple(
            Side(cell, layer.bias is not None, holes is not None, order, layer.precision)
            for cell, layer, holes, order in zip(
                self.cells,
                self.hidden,
                self.peepholes,
                self.orders or [0] * len(self.cells),
                strict=True,
            )
        )
        return Recurrence(sides, self.h, self.batch, self.lengths)


@dataclass(frozen=True)
class Embedding:
    """A sum of rows looked up in tables, normalised where ``total`` says so.

    ``names`` are those of the tables in the source, "" for rows that are none; ``table`` is what
    the one term made of tensor products looks up. Arguments are, term by term, the dense table
    and the ids, as far as it has them, then scale and shift of the normalisation.
    """

    total: EmbeddingSum
    names: tuple[str, ...]
    table: TensorTable | None = None

    @property
    def record(self) -> str:
        """The name of its line in the report."""
        return f"embedding.{next(filter(None, self.names))}"


@dataclass(frozen=True)
class Offloaded:
    """Layers that an accelerator computes, one reading the rows of the other; the argument is x.

    They have a bias and ReLU at most: what else follows is the CPU's.
    """

    layers: tuple[Layer, ...]

    @property
    def n_out(self) -> int:
        """Features that the last layer yields."""
        return self.layers[-1].n_out

    @property
    def key(self) -> str:
        """What tells these layers from all others of the model."""
        return " > ".join(layer.key for layer in self.layers)


@dataclass
class Form:
    """What a weight became, decided once per weight and kept for every bucket."""

    op: ops.Op
    form: str = "dense"
    parameters: Mapping[str, object] = field(default_factory=dict)
    error: float = 0.0
    reason: str = ""
    precision: str = "f32"
    bytes: int | None = None  # of the stored weight, where not those of float32 parameters


@dataclass(frozen=True, eq=False)
class TableForm:
    """What an embedding table of the source became, decided once for every bucket.

    ``dense`` is the table that was fitted: an exported output layer may hold a transposed copy.
    """

    table: TensorTable
    form: str
    parameters: Mapping[str, object] = field(default_factory=dict)
    error: float = 0.0
    reason: str = ""
    dense: np.ndarray | None = None

    @classmethod
    def given(cls, table: TensorTable) -> TableForm:
        """Return the form of a table that came with the source."""
        parameters = {"order": len(table.sides), "r": table.rank}
        return cls(table, table.family, parameters, reason="given with the source")


Node = (
    Layer
    | FeedForward
    | LayerSequence
    | Attention
    | ProjectedAttention
    | MinimalAttention
    | HashTables
    | LayerNorm
    | Embedding
    | RecurrentCells
    | Offloaded
)


def weights_of(node: Node) -> tuple[Layer, ...]:
    """Return the layers of the source whose weights a node multiplies with."""
    if isinstance(node, FeedForward):
        return (node.up, node.down)
    if isinstance(node, LayerSequence):
        return tuple(part for layer in node.members for part in weights_of(layer))
    if isinstance(node, ProjectedAttention):
        return (node.projection,)
    if isinstance(node, MinimalAttention):
        return (*node.sources, node.projection)
    if isinstance(node, RecurrentCells):
        return node.hidden
    if isinstance(node, Layer):
        return node.parts or (node,)
    if isinstance(node, Offloaded):
        return tuple(part for layer in node.layers for part in weights_of(layer))
    return ()


class LayerTable:
    """The nodes that calls of ``tvmstruct.layer.<i>`` stand for."""

    def __init__(self) -> None:
        self.nodes: list[Node] = []

    def call(self, node: Node, args: list[relax.Expr], *shapes: tuple[int, ...]) -> relax.Call:
        """Return a new call of ``node`` with float32 results of ``shapes``: a tuple if many."""
        self.nodes.append(node)
        symbol = f"{PREFIX}{len(self.nodes) - 1}"
        types = [compat.tensor_type(shape, "float32") for shape in shapes]
        return relax.call_dps_packed(symbol, args, types if len(types) > 1 else types[0])

    def node(self, expr: relax.Expr) -> Node | None:
        """Return what a call stands for, or None for any other expression."""
        symbol = compat.external_symbol(expr) or ""
        return self.nodes[int(symbol[len(PREFIX) :])] if symbol.startswith(PREFIX) else None

    def layer(self, expr: relax.Expr) -> Layer | None:
        """Return the dense or structured layer that a call stands for."""
        node = self.node(expr)
        return node if isinstance(node, Layer) else None

    def weights(self, expr: relax.Expr) -> tuple[Layer, ...]:
        """Return the layers of a call whose matrices may change: its own, or hidden ones."""
        node = self.node(expr)
        if isinstance(node, RecurrentCells):
            return node.hidden
        return (node,) if isinstance(node, Layer) else ()

    def replaced(self, call: relax.Call, layers: Sequence[Layer]) -> relax.Call:
        """Return the call with other layers in the places of its `weights`."""
        node = self.node(call)
        if isinstance(node, RecurrentCells):
            node = replace(node, hidden=tuple(layers))
        else:
            (node,) = layers
        return self.call(node, arguments(call), *compat.result_shapes(call))


def arguments(call: relax.Call) -> list[relax.Expr]:
    """Return the tensor arguments of a layer call."""
    return list(call.args[1].fields)
