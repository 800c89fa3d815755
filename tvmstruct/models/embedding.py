"""An embedding table alone: rows that ids name."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from tvmstruct.models.config import Config, Input
from tvmstruct.models.graph import GraphBuilder
from tvmstruct.models.matrices import look_up


@dataclass(frozen=True, kw_only=True)
class Embedding(Config):
    """Sizes of an embedding table: those of DrQA (Table 3 of word2ketXS).

    Takes ``input_ids`` (batch, sequence) and returns ``vectors`` (batch, sequence, hidden).  With
    ``form=kronecker`` the table is word2ketXS of ``order`` factors and rank ``r_embedding``.
    """

    seq: int = 256
    hidden: int = 300
    vocabulary: int = 118_655

    name: ClassVar[str] = "embedding"
    title: ClassVar[str] = "an embedding table"
    axes: ClassVar[Mapping[str, tuple[str, ...]]] = {"seq": ("seq",), "hidden": ("hidden",)}
    shrink: ClassVar[str] = "take a smaller vocabulary, or form=kronecker"

    def specs(self) -> tuple[Input, ...]:
        """Return the ids."""
        return (Input("input_ids", ("batch", "sequence"), below=self.vocabulary),)

    def sizes(self, batch: int) -> dict[str, int]:
        """Return the configured length."""
        return {"batch": batch, "sequence": self.seq}

    def write(self, graph: GraphBuilder) -> None:
        """Write the lookup."""
        rows = look_up(graph, "input_ids", "embeddings.weight", self.vocabulary, self.hidden)
        graph.output(rows, "vectors", ("batch", "sequence", self.hidden))
