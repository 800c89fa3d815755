"""T5: an encoder and a decoder with norms before the layers and positions in the scores."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from tvmstruct.models.config import MASK, Config, Input, check_heads
from tvmstruct.models.graph import GraphBuilder
from tvmstruct.models.layers import causal_mask, padding_mask, positions
from tvmstruct.models.matrices import look_up, multiply

EPSILON = 1e-6
BUCKETS, FARTHEST = 32, 128  # of distances: beyond the farthest all are one bucket


@dataclass(frozen=True, kw_only=True)
class T5(Config):
    """Sizes of T5-small (Raffel et al.); ``layers`` of encoder and decoder each.

    Takes ``input_ids`` and ``attention_mask`` (batch, source) and ``decoder_input_ids`` (batch,
    target); returns ``last_hidden_state`` (batch, target, hidden) of the decoder, before the
    output projection, which is the embedding table again.  Dense layers have no bias, unless
    ``attention_bias`` gives one to the four of every attention.
    """

    seq: int = 128
    hidden: int = 512
    ffn: int = 2048
    heads: int = 8
    layers: int = 6
    vocabulary: int = 32128
    attention_bias: bool = False

    name: ClassVar[str] = "t5"
    title: ClassVar[str] = "encoder and decoder layers after their norms, relative positions"
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

    def specs(self) -> tuple[Input, ...]:
        """Return source, mask and target."""
        source = Input("input_ids", ("batch", "source"), below=self.vocabulary)
        target = Input("decoder_input_ids", ("batch", "target"), below=self.vocabulary)
        return source, Input(MASK, ("batch", "source"), below=2), target

    def sizes(self, batch: int) -> dict[str, int]:
        """Return the configured length for source and target."""
        return {"batch": batch, "source": self.seq, "target": self.seq}

    def write(self, graph: GraphBuilder) -> None:
        """Write both stacks."""
        x, y = (self._words(graph, ids) for ids in ("input_ids", "decoder_input_ids"))
        padding = padding_mask(graph, MASK)
        near = self._bias(graph, "input_ids", "encoder", both=True)
        seen = graph.op("Add", near, padding)
        for index in range(self.layers):
            at = f"encoder.block.{index}.layer"
            x = self._attend(graph, x, None, seen, f"{at}.0", "SelfAttention")
            x = self._feed_forward(graph, x, f"{at}.1")
        x = self._norm(graph, x, "encoder.final_layer_norm")
        near = self._bias(graph, "decoder_input_ids", "decoder", both=False)
        before = graph.op("Add", near, causal_mask(graph, "decoder_input_ids"))
        for index in range(self.layers):
            at = f"decoder.block.{index}.layer"
            y = self._attend(graph, y, None, before, f"{at}.0", "SelfAttention")
            y = self._attend(graph, y, x, padding, f"{at}.1", "EncDecAttention")
            y = self._feed_forward(graph, y, f"{at}.2")
        y = self._norm(graph, y, "decoder.final_layer_norm")
        graph.output(y, "last_hidden_state", ("batch", "target", self.hidden))

    def _words(self, graph: GraphBuilder, ids: str) -> str:
        return look_up(graph, ids, "shared.weight", self.vocabulary, self.hidden)

    def _norm(self, graph: GraphBuilder, x: str, name: str) -> str:
        """``x / sqrt(mean(x^2) + epsilon) * gain``."""
        square = graph.op("ReduceMean", graph.op("Mul", x, x), graph.constant([-1]))
        size = graph.op("Sqrt", graph.op("Add", square, graph.constant(EPSILON, "float32")))
        gain = graph.weight(f"{name}.weight", self.hidden, std=0.1, mean=1.0)
        return graph.op("Mul", graph.op("Div", x, size), gain)

    def _dense(
        self, graph: GraphBuilder, x: str, name: str, sides: tuple[int, int], gain: float = 1.0
    ) -> str:
        y = multiply(graph, x, name, *sides, gain=gain)
        if not self.attention_bias or "Attention" not in name:
            return y
        return graph.op("Add", y, graph.weight(f"{name}.bias", sides[1], std=0.1))

    def _attend(
        self, graph: GraphBuilder, x: str, memory: str | None, bias: str, at: str, kind: str
    ) -> str:
        """``x + MultiHead(norm(x), memory)``; scores are not scaled, and ``bias`` is added."""
        d, size = self.hidden, self.hidden // self.heads
        inner = self._norm(graph, x, f"{at}.layer_norm")

        def head(name: str, source: str, order: list[int], gain: float = 1.0) -> str:
            y = self._dense(graph, source, f"{at}.{kind}.{name}", (d, d), gain)
            shape = graph.constant([0, 0, self.heads, size])
            return graph.op("Transpose", graph.op("Reshape", y, shape), perm=order)

        source = inner if memory is None else memory
        query = head("q", inner, [0, 2, 1, 3], 1 / math.sqrt(size))
        scores = graph.op("MatMul", query, head("k", source, [0, 2, 3, 1]))
        weights = graph.op("Softmax", graph.op("Add", scores, bias), axis=-1)
        mixed = graph.op("MatMul", weights, head("v", source, [0, 2, 1, 3]))
        rows = graph.op("Transpose", mixed, perm=[0, 2, 1, 3])
        flat = graph.op("Reshape", rows, graph.constant([0, 0, d]))
        return graph.op("Add", self._dense(graph, flat, f"{at}.{kind}.o", (d, d)), x)

    def _feed_forward(self, graph: GraphBuilder, x: str, at: str) -> str:
        """``x + W_o relu(W_i norm(x))``."""
        inner = self._norm(graph, x, f"{at}.layer_norm")
        wide = graph.op(
            "Relu", self._dense(graph, inner, f"{at}.DenseReluDense.wi", (self.hidden, self.ffn))
        )
        down = self._dense(graph, wide, f"{at}.DenseReluDense.wo", (self.ffn, self.hidden))
        return graph.op("Add", down, x)

    def _bias(self, graph: GraphBuilder, ids: str, stack: str, *, both: bool) -> str:
        """Return what the distance of key and query adds to a score: (1, heads, length, length)."""
        here = positions(graph, ids)
        keys = graph.op("Unsqueeze", here, graph.constant([0]))
        behind = graph.op("Sub", graph.op("Unsqueeze", here, graph.constant([1])), keys)
        name = f"{stack}.block.0.layer.0.SelfAttention.relative_attention_bias.weight"
        table = graph.weight(name, BUCKETS, self.heads, std=1.0)
        found = graph.op("Gather", table, _buckets(graph, behind, both=both))
        first = graph.op("Transpose", found, perm=[2, 0, 1])
        return graph.op("Unsqueeze", first, graph.constant([0]))


def _buckets(graph: GraphBuilder, behind: str, *, both: bool) -> str:
    """Return the bucket of every distance ``query - key``.

    A bucket each for the shorter distances, then one for each step of a geometric series.  Where
    keys lie on ``both`` sides, those after the query have the upper half of the buckets.
    """
    zero = graph.constant(0)
    distance = graph.op("Abs", behind) if both else graph.op("Max", behind, zero)
    limits = bucket_limits(both=both)
    near = graph.op("Min", distance, graph.constant(len(limits) + 1))
    wide = graph.op("Unsqueeze", distance, graph.constant([-1]))
    passed = graph.op("Cast", graph.op("GreaterOrEqual", wide, graph.constant(limits)), to=7)
    steps = graph.op("ReduceSum", passed, graph.constant([-1]), keepdims=0)
    bucket = graph.op("Add", near, steps)
    if not both:
        return bucket
    after = graph.op("Cast", graph.op("Less", behind, zero), to=7)
    return graph.op("Add", bucket, graph.op("Mul", after, graph.constant(BUCKETS // 2)))


def bucket_limits(*, both: bool) -> list[int]:
    """Return the least distance of every bucket that spans several, but for the first of them.

    ``exact (farthest / exact)^(k / exact)`` rounded up, for k = 1 .. exact - 1, where half of
    the buckets of a side are exact.
    """
    exact = BUCKETS // (4 if both else 2)
    ratio = FARTHEST / exact
    return [math.ceil(exact * ratio ** (k / exact) - 1e-9) for k in range(1, exact)]
