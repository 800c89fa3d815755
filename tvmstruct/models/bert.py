"""BERT: a stack of Transformer encoder layers with GELU."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from tvmstruct.models.config import MASK, Config, Input, check_heads
from tvmstruct.models.graph import GraphBuilder
from tvmstruct.models.layers import (
    Names,
    Stream,
    attend,
    feed_forward,
    norm,
    padding_mask,
    positions,
)
from tvmstruct.models.matrices import look_up

ATTENTION = Names(
    "attention.self.query",
    "attention.self.key",
    "attention.self.value",
    "attention.output.dense",
    "attention.output.LayerNorm",
)
FEED_FORWARD = ("intermediate.dense", "output.dense", "output.LayerNorm")
LEAST_POSITIONS = 512


@dataclass(frozen=True, kw_only=True)
class Bert(Config):
    """Sizes of BERT: Table IV of NLP-Fast and, where it is silent, those of BERT-large.

    Takes ``input_ids``, ``attention_mask`` and ``token_type_ids``, all (batch, sequence), and
    returns ``last_hidden_state`` (batch, sequence, hidden).  With ``embeddings=False`` it takes
    ``hidden`` (batch, sequence, hidden) and ``attention_mask``: the layers alone.
    """

    seq: int = 256
    hidden: int = 1024
    ffn: int = 4096
    heads: int = 16
    layers: int = 24
    embeddings: bool = True
    vocabulary: int = 30522
    types: int = 2

    name: ClassVar[str] = "bert"
    title: ClassVar[str] = "encoder layers with GELU"
    axes: ClassVar[Mapping[str, tuple[str, ...]]] = {
        "seq": ("seq",),
        "hidden": ("hidden", "heads"),
        "ffn": ("ffn",),
    }
    variant: ClassVar[Mapping[str, int]] = {"layers": 2}
    shrink: ClassVar[str] = "take fewer layers, such as layers=2"

    def __post_init__(self) -> None:
        """Check the sizes and that heads divide them."""
        super().__post_init__()
        check_heads(self, self.hidden, self.heads)

    def specs(self) -> tuple[Input, ...]:
        """Return ids, mask and types; or hidden states and mask."""
        shape = ("batch", "sequence")
        mask = Input(MASK, shape, below=2)
        if not self.embeddings:
            return Input("hidden", (*shape, self.hidden)), mask
        ids = Input("input_ids", shape, below=self.vocabulary)
        return ids, mask, Input("token_type_ids", shape, below=self.types)

    def sizes(self, batch: int) -> dict[str, int]:
        """Return the configured length."""
        return {"batch": batch, "sequence": self.seq}

    def write(self, graph: GraphBuilder) -> None:
        """Write embeddings and layers; there is no pooler, as in the paper's breakdown."""
        stream = Stream(self.hidden, self.heads, self.ffn, epsilon=1e-12)
        x = self._embed(graph, stream) if self.embeddings else "hidden"
        mask = padding_mask(graph, MASK)
        for index in range(self.layers):
            at = f"encoder.layer.{index}."
            up, down, after = FEED_FORWARD
            x = attend(graph, x, x, mask, ATTENTION.under(at), stream)
            x = feed_forward(graph, x, (at + up, at + down, at + after), "Gelu", stream)
        graph.output(x, "last_hidden_state", ("batch", "sequence", self.hidden))

    def _embed(self, graph: GraphBuilder, stream: Stream) -> str:
        def rows_of(table: str, rows: int, index: str) -> str:
            name = f"embeddings.{table}_embeddings.weight"
            return graph.op("Gather", graph.weight(name, rows, self.hidden, std=1.0), index)

        words = "embeddings.word_embeddings.weight"
        x = look_up(graph, "input_ids", words, self.vocabulary, self.hidden)
        places = max(LEAST_POSITIONS, self.seq)
        x = graph.op("Add", x, rows_of("token_type", self.types, "token_type_ids"))
        x = graph.op("Add", x, rows_of("position", places, positions(graph, "input_ids")))
        return norm(graph, x, "embeddings.LayerNorm", stream)
