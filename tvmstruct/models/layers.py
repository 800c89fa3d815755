"""The layers of encoders and decoders as ONNX nodes, normalised after each residual."""

from __future__ import annotations

from dataclasses import dataclass
from math import sqrt

import numpy as np

from tvmstruct.models.graph import GraphBuilder
from tvmstruct.models.matrices import multiply

LOWEST = float(np.finfo(np.float32).min)  # what is added to the score of a hidden key


@dataclass(frozen=True)
class Stream:
    """The sizes that all layers of a model share."""

    hidden: int
    heads: int
    ffn: int
    epsilon: float


@dataclass(frozen=True)
class Names:
    """Where an attention keeps its four dense layers and the norm after it."""

    query: str
    key: str
    value: str
    out: str
    norm: str

    def under(self, prefix: str) -> Names:
        """Return the names below ``prefix``."""
        return Names(*(prefix + n for n in (self.query, self.key, self.value, self.out, self.norm)))


def dense(graph: GraphBuilder, x: str, name: str, n_in: int, n_out: int, *, axes: int = 2) -> str:
    """``x @ weight + bias`` for x of ``axes`` axes and then features."""
    product = multiply(graph, x, name, n_in, n_out, axes=axes)
    return graph.op("Add", product, graph.weight(f"{name}.bias", n_out, std=0.1))


def norm(graph: GraphBuilder, x: str, name: str, stream: Stream) -> str:
    """Layer normalisation over the last axis."""
    gain = graph.weight(f"{name}.weight", stream.hidden, std=0.1, mean=1.0)
    shift = graph.weight(f"{name}.bias", stream.hidden, std=0.1)
    return graph.op("LayerNormalization", x, gain, shift, axis=-1, epsilon=stream.epsilon)


def attend(
    graph: GraphBuilder, x: str, memory: str, mask: str, names: Names, stream: Stream
) -> str:
    """``norm(x + MultiHead(x, memory))``, eq. 2 of NLP-Fast with scores over sqrt(head size).

    ``x`` is (batch, queries, hidden), ``memory`` (batch, keys, hidden), where both are the same
    in self-attention; ``mask`` is added to scores of (batch, heads, queries, keys).
    """
    d, size = stream.hidden, stream.hidden // stream.heads

    def split(source: str, name: str, axes: list[int]) -> str:
        heads = graph.constant([0, 0, stream.heads, size])
        shaped = graph.op("Reshape", dense(graph, source, name, d, d), heads)
        return graph.op("Transpose", shaped, perm=axes)

    query = split(x, names.query, [0, 2, 1, 3])
    key = split(memory, names.key, [0, 2, 3, 1])
    value = split(memory, names.value, [0, 2, 1, 3])
    root = graph.constant(sqrt(size), "float32")
    scores = graph.op("Add", graph.op("Div", graph.op("MatMul", query, key), root), mask)
    mixed = graph.op("MatMul", graph.op("Softmax", scores, axis=-1), value)
    merged = graph.op("Transpose", mixed, perm=[0, 2, 1, 3])
    flat = graph.op("Reshape", merged, graph.constant([0, 0, d]))
    return norm(graph, graph.op("Add", dense(graph, flat, names.out, d, d), x), names.norm, stream)


def feed_forward(
    graph: GraphBuilder, x: str, names: tuple[str, str, str], activation: str, stream: Stream
) -> str:
    """``norm(x + FFN(x))``, eq. 3 of NLP-Fast; ``names`` are those of up, down and norm."""
    up, down, after = names
    wide = graph.op(activation, dense(graph, x, up, stream.hidden, stream.ffn))
    narrow = dense(graph, wide, down, stream.ffn, stream.hidden)
    return norm(graph, graph.op("Add", narrow, x), after, stream)


def length_of(graph: GraphBuilder, x: str) -> str:
    """Return the size of axis 1 of ``x`` as a scalar."""
    return graph.op("Gather", graph.op("Shape", x), graph.constant(1))


def positions(graph: GraphBuilder, x: str) -> str:
    """Return 0, 1, 2, ... along axis 1 of ``x``."""
    return graph.op("Range", graph.constant(0), length_of(graph, x), graph.constant(1))


def padding_mask(graph: GraphBuilder, mask: str) -> str:
    """Return ``(1 - mask) * lowest`` of shape (batch, 1, 1, keys)."""
    return _additive(graph, graph.op("Unsqueeze", mask, graph.constant([1, 2])))


def causal_mask(graph: GraphBuilder, x: str) -> str:
    """Return the mask (1, 1, length, length) that hides every key after its query."""
    here = positions(graph, x)
    keys = graph.op("Unsqueeze", here, graph.constant([0, 1, 2]))
    queries = graph.op("Unsqueeze", here, graph.constant([0, 1, 3]))
    return _additive(graph, graph.op("LessOrEqual", keys, queries))


def _additive(graph: GraphBuilder, keep: str) -> str:
    hide = graph.op("Sub", graph.constant(1.0, "float32"), graph.op("Cast", keep, to=1))
    return graph.op("Mul", hide, graph.constant(LOWEST, "float32"))
