"""A memory network: attention over a large memory, several times, then an answer."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import sqrt
from typing import ClassVar

from tvmstruct.models.config import Config, Input
from tvmstruct.models.graph import GraphBuilder
from tvmstruct.models.layers import dense

SPREAD = 4.0  # of scores: few keys take most of the weight, and no exponential underflows


@dataclass(frozen=True, kw_only=True)
class MemoryNetwork(Config):
    """Sizes of a memory network.  Table IV of NLP-Fast has ``keys=100_000_000``: 51 GB.

    Takes ``queries`` (queries, hidden), ``keys`` and ``values`` (memories, hidden), and returns
    ``answers`` (queries, answers), each row a probability.  A hop is eq. 1 of the paper, with
    its result added to the query: ``u <- u + softmax(u keys^T) values``.  Rows of a batch ask
    the same memory: ``batch`` rows are ``batch * queries`` queries.  With ``stored=True`` keys
    and values are weights of the model, not inputs.
    """

    keys: int = 100_000
    hidden: int = 64
    hops: int = 3
    queries: int = 1
    answers: int = 1000
    stored: bool = False

    name: ClassVar[str] = "memory-network"
    title: ClassVar[str] = "attention over a memory, and an answer layer"
    axes: ClassVar[Mapping[str, tuple[str, ...]]] = {"seq": ("keys",), "hidden": ("hidden",)}
    shrink: ClassVar[str] = "take fewer keys=, or pass the memory as inputs with stored=False"

    def specs(self) -> tuple[Input, ...]:
        """Return the queries, and the memory unless it is stored."""
        asked = Input("queries", ("queries", self.hidden))
        shape = ("memories", self.hidden)
        memory = Input("keys", shape, scale=self._key_scale), Input("values", shape)
        return (asked,) if self.stored else (asked, *memory)

    @property
    def _key_scale(self) -> float:
        return SPREAD / sqrt(self.hidden)

    def sizes(self, batch: int) -> dict[str, int]:
        """Return the number of queries and of memories."""
        return {"queries": batch * self.queries, "memories": self.keys}

    def write(self, graph: GraphBuilder) -> None:
        """Write the hops as one head of attention each, then the answer layer."""
        first = graph.constant([0, 1])
        keys, values = (graph.op("Unsqueeze", name, first) for name in self._memory(graph))
        columns = graph.op("Transpose", keys, perm=[0, 1, 3, 2])
        x = graph.op("Unsqueeze", "queries", first)
        for _ in range(self.hops):
            chosen = graph.op("Softmax", graph.op("MatMul", x, columns), axis=-1)
            x = graph.op("Add", x, graph.op("MatMul", chosen, values))
        rows = graph.op("Squeeze", x, first)
        logits = dense(graph, rows, "answer", self.hidden, self.answers, axes=1)
        probabilities = graph.op("Softmax", logits, axis=-1)
        graph.output(probabilities, "answers", ("queries", self.answers))

    def _memory(self, graph: GraphBuilder) -> tuple[str, str]:
        if not self.stored:
            return "keys", "values"
        keys = graph.weight("memory.keys", self.keys, self.hidden, std=self._key_scale)
        return keys, graph.weight("memory.values", self.keys, self.hidden, std=1.0)
