"""The Transformer: an encoder, and a decoder that also attends to what the encoder says."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import sqrt
from typing import ClassVar

import numpy as np

from tvmstruct.errors import InputError
from tvmstruct.models.config import MASK, Config, Input, check_heads
from tvmstruct.models.graph import GraphBuilder, Weight
from tvmstruct.models.layers import (
    Names,
    Stream,
    attend,
    causal_mask,
    feed_forward,
    padding_mask,
    positions,
)
from tvmstruct.models.matrices import look_up

LEAST_POSITIONS = 512


@dataclass(frozen=True, kw_only=True)
class Transformer(Config):
    """Sizes of the Transformer: Table IV of NLP-Fast; ``layers`` of encoder and decoder each.

    Takes ``input_ids`` (batch, source), ``attention_mask`` (batch, source), where 0 is padding,
    and ``decoder_input_ids`` (batch, target); with ``embeddings=False`` the ids are replaced by
    ``hidden`` (batch, source, hidden) and ``decoder_hidden`` (batch, target, hidden).  Returns
    ``last_hidden_state`` (batch, target, hidden) of the decoder: like the paper's breakdown, it
    ends before the projection to the vocabulary.  A target needs no mask: it is read from left
    to right, so padding at its end changes nothing before it.
    """

    seq: int = 256
    hidden: int = 1024
    ffn: int = 4096
    heads: int = 16
    layers: int = 6
    embeddings: bool = True
    vocabulary: int = 37000
    target_vocabulary: int | None = None

    name: ClassVar[str] = "transformer"
    title: ClassVar[str] = "encoder and decoder layers with ReLU"
    axes: ClassVar[Mapping[str, tuple[str, ...]]] = {
        "seq": ("seq",),
        "hidden": ("hidden", "heads"),
        "ffn": ("ffn",),
    }
    variant: ClassVar[Mapping[str, int]] = {"layers": 1}
    shrink: ClassVar[str] = "take fewer layers, such as layers=1"

    def __post_init__(self) -> None:
        """Check the sizes and that heads divide them."""
        super().__post_init__()
        check_heads(self, self.hidden, self.heads)
        if self.embeddings and self.hidden % 2:
            raise InputError(
                f"transformer: hidden {self.hidden} is odd, but positions are pairs of sine and "
                "cosine; take an even size, or embeddings=False"
            )

    def specs(self) -> tuple[Input, ...]:
        """Return source, mask and target, as ids or hidden states."""
        source, target = ("batch", "source"), ("batch", "target")
        mask = Input(MASK, source, below=2)
        if not self.embeddings:
            hidden = Input("hidden", (*source, self.hidden))
            return hidden, mask, Input("decoder_hidden", (*target, self.hidden))
        ids = Input("input_ids", source, below=self.vocabulary)
        words = self.target_vocabulary or self.vocabulary
        return ids, mask, Input("decoder_input_ids", target, below=words)

    def sizes(self, batch: int) -> dict[str, int]:
        """Return the configured length for source and target."""
        return {"batch": batch, "source": self.seq, "target": self.seq}

    def write(self, graph: GraphBuilder) -> None:
        """Write embeddings, encoder layers and decoder layers."""
        stream = Stream(self.hidden, self.heads, self.ffn, epsilon=1e-5)
        x, y = self._embed(graph) if self.embeddings else ("hidden", "decoder_hidden")
        padding, causal = padding_mask(graph, MASK), causal_mask(graph, y)
        for index in range(self.layers):
            at = f"encoder.layers.{index}."
            x = attend(graph, x, x, padding, _attention(at + "self_attn"), stream)
            x = feed_forward(graph, x, _feed_forward(at), "Relu", stream)
        for index in range(self.layers):
            at = f"decoder.layers.{index}."
            y = attend(graph, y, y, causal, _attention(at + "self_attn"), stream)
            y = attend(graph, y, x, padding, _attention(at + "encoder_attn"), stream)
            y = feed_forward(graph, y, _feed_forward(at), "Relu", stream)
        graph.output(y, "last_hidden_state", ("batch", "target", self.hidden))

    def _embed(self, graph: GraphBuilder) -> tuple[str, str]:
        """Return source and target: ``sqrt(hidden) * shared[ids] + positions``."""
        places = max(LEAST_POSITIONS, self.seq)
        sines = Weight(
            (places, self.hidden), lambda _: sine_positions(places, self.hidden), computed=True
        )
        table = graph.table("embed_positions.weight", sines)
        root = graph.constant(sqrt(self.hidden), "float32")

        def embed(ids: str, words: str, rows: int) -> str:
            # Scaled by sqrt(hidden) when read, so that its rows come out with unit variance.
            found = look_up(graph, ids, words, rows, self.hidden, std=1 / sqrt(self.hidden))
            places = graph.op("Gather", table, positions(graph, ids))
            return graph.op("Add", graph.op("Mul", found, root), places)

        if self.target_vocabulary is None:
            shared = "shared.weight"
            return (
                embed("input_ids", shared, self.vocabulary),
                embed("decoder_input_ids", shared, self.vocabulary),
            )
        return (
            embed("input_ids", "encoder.embed_tokens.weight", self.vocabulary),
            embed("decoder_input_ids", "decoder.embed_tokens.weight", self.target_vocabulary),
        )


def sine_positions(rows: int, hidden: int) -> np.ndarray:
    """Return (rows, hidden): sin and cos of ``row / 10000^(2 i / hidden)`` in turns."""
    angles = np.arange(rows)[:, None] / 10000 ** (np.arange(0, hidden, 2) / hidden)
    return np.stack([np.sin(angles), np.cos(angles)], axis=-1).reshape(rows, hidden).astype("f4")


def _attention(at: str) -> Names:
    return Names(*(f"{at}.{x}_proj" for x in ("q", "k", "v", "out")), norm=f"{at}_layer_norm")


def _feed_forward(at: str) -> tuple[str, str, str]:
    return f"{at}fc1", f"{at}fc2", f"{at}final_layer_norm"
