"""A language model: embedding, recurrent layers with structured matrices, dense output layer."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from tvmstruct.recurrent_forms import Forms
from tvmstruct.training.embedding import StructuredEmbedding
from tvmstruct.training.linear import StructuredLinear
from tvmstruct.training.recurrent import StructuredGRU, StructuredLSTM


class LanguageModel(nn.Module):
    """Logits of the next symbol: ``output(lstm(embedding(ids)))``, the state carried by the caller.

    >>> logits, state = model(ids, state)  # ids (s, b); logits (s, b, vocabulary)
    """

    def __init__(
        self,
        embedding: nn.Embedding | StructuredEmbedding,
        recurrent: StructuredLSTM | StructuredGRU,
        output: nn.Linear | StructuredLinear,
        *,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        self.embedding, self.recurrent, self.output = embedding, recurrent, output
        self.dropout = nn.Dropout(dropout)

    @classmethod
    def of(
        cls,
        vocabulary: int,
        hidden: int,
        layers: int = 2,
        *,
        forms: Forms = (None, None),
        dropout: float = 0.0,
    ) -> LanguageModel:
        """Return an initialised model with ``hidden`` features throughout."""
        embedding = nn.Embedding(vocabulary, hidden)
        recurrent = StructuredLSTM.of(hidden, hidden, layers, forms=forms, dropout=dropout)
        return cls(embedding, recurrent, nn.Linear(hidden, vocabulary), dropout=dropout)

    def forward(self, ids: Tensor, state: Any = None) -> tuple[Tensor, Any]:
        """Return logits (s, b, vocabulary) and the last state of ids (s, b) of integers."""
        y, state = self.recurrent(self.dropout(self.embedding(ids)), state)
        return self.output(self.dropout(y)), state
