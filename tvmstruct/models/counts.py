"""How many parameters a built-in model has, and in which part: Tables 4 to 7 of Shapeshifter."""

from __future__ import annotations

from dataclasses import dataclass
from math import prod

from tvmstruct.models.config import Config

PARTS = ("encoder", "decoder", "embedding", "other")


@dataclass(frozen=True)
class Counts:
    """Parameters by part; tables that a formula gives, such as sine positions, are none.

    Embedding tables are "embedding" wherever they belong; norms and biases count where they are.
    """

    encoder: int = 0
    decoder: int = 0
    embedding: int = 0
    other: int = 0

    @property
    def layers(self) -> int:
        """Parameters of the encoder and the decoder: the tables' "Enc./Dec."."""
        return self.encoder + self.decoder

    @property
    def total(self) -> int:
        """Parameters in all."""
        return self.layers + self.embedding + self.other

    def rows(self) -> dict[str, int]:
        """Return the total, then every part that the model has."""
        parts = {part: getattr(self, part) for part in PARTS}
        return {"total": self.total, **{part: n for part, n in parts.items() if n}}

    def __str__(self) -> str:
        return ", ".join(f"{part} {n:,}" for part, n in self.rows().items())


def count(config: Config) -> Counts:
    """Return the parameters of a model by part, counted without making any."""
    found = dict.fromkeys(PARTS, 0)
    for name, weight in config.graph().weights.items():
        if not weight.computed:
            found[part_of(name)] += prod(weight.shape)
    return Counts(**found)


def part_of(name: str) -> str:
    """Return the part of a model that a weight belongs to, by its name."""
    if name.startswith(("shared.", "embeddings.")) or "embed_tokens" in name:
        return "embedding"
    part = name.partition(".")[0]
    return part if part in ("encoder", "decoder") else "other"
