"""Sentences in, unit vectors out: tokenise, run the encoder, average the hidden states."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Protocol, cast

import numpy as np

from tvmstruct.errors import InputError, MissingDependencyError, ModelError

Array = np.ndarray[Any, np.dtype[Any]]
INPUTS = ("input_ids", "attention_mask", "token_type_ids")
LONGEST = 512


class Spec(Protocol):
    """Name, dtype and shape of an input or output; an int in ``shape`` is a fixed dimension."""

    @property
    def name(self) -> str: ...
    @property
    def dtype(self) -> str: ...
    @property
    def shape(self) -> tuple[int | str | None, ...]: ...


class Model(Protocol):
    """What an encoder must offer; ``CompiledModel`` does."""

    @property
    def inputs(self) -> Sequence[Spec]: ...
    @property
    def outputs(self) -> Sequence[Spec]: ...
    def run(self, feeds: Mapping[str, Array], /) -> Mapping[str, Array]: ...


class SentenceEncoder:
    """An encoder model with its tokeniser: ``encode(sentences)`` returns one unit vector each.

    The vector of a sentence is ``sum_t mask_t h_t / sum_t mask_t``, scaled to length one, where
    ``h`` are the hidden states, the model's only float output of rank 3 (or its first).
    """

    def __init__(
        self, model: Model, tokenizer_json: str | os.PathLike[str], *, max_length: int | None = None
    ) -> None:
        unknown = [spec.name for spec in model.inputs if spec.name not in INPUTS]
        if unknown:
            raise ModelError(
                f"model: input {unknown[0]!r} is not one of {', '.join(INPUTS)}; "
                "SentenceEncoder feeds these only"
            )
        self.model = model
        self.hidden = hidden_output(model.outputs)
        self.tokenizer = _load_tokenizer(tokenizer_json)
        self.max_length = max_length or _own_limit(self.tokenizer)
        self.tokenizer.enable_truncation(self.max_length)
        self.tokenizer.no_padding()
        self._pad_id = self.tokenizer.token_to_id("[PAD]") or 0

    def encode(self, sentences: Sequence[str], *, batch_size: int = 8) -> Array:
        """Return ``(len(sentences), d)`` float32 in the order of ``sentences``."""
        if batch_size < 1:
            raise InputError(f"batch_size: {batch_size} is not 1 or more")
        vectors: dict[int, Array] = {}
        for rows, feeds in self.batches(sentences, batch_size=batch_size):
            hidden = self.model.run(feeds)[self.hidden.name]
            pooled = mean_pool(hidden, feeds_mask(feeds))
            vectors.update(zip(rows, pooled, strict=True))
        if not vectors:
            width = self.hidden.shape[-1]
            return np.zeros((0, width if isinstance(width, int) else 0), np.float32)
        return np.stack([vectors[row] for row in range(len(vectors))])

    def batches(
        self, sentences: Sequence[str], *, batch_size: int = 8
    ) -> Iterator[tuple[list[int], dict[str, Array]]]:
        """Yield ``(row numbers, inputs)``: sentences of like length, padded to the longest."""
        _check_sentences(sentences)
        encodings = self.tokenizer.encode_batch(list(sentences))
        order = sorted(range(len(encodings)), key=lambda row: len(encodings[row].ids))
        for start in range(0, len(order), batch_size):
            rows = order[start : start + batch_size]
            yield rows, self._feeds([encodings[row] for row in rows])

    def _feeds(self, encodings: list[Any]) -> dict[str, Array]:
        """Return the model's inputs, each ``(len(encodings), longest)``."""
        shape = (len(encodings), max(len(e.ids) for e in encodings))
        ids, mask, types = np.full(shape, self._pad_id), np.zeros(shape, int), np.zeros(shape, int)
        for row, encoding in enumerate(encodings):
            length = len(encoding.ids)
            ids[row, :length] = encoding.ids
            mask[row, :length] = 1
            types[row, :length] = encoding.type_ids
        feeds: dict[str, Array] = dict(zip(INPUTS, (ids, mask, types), strict=True))
        wanted = {spec.name: feeds[spec.name].astype(spec.dtype) for spec in self.model.inputs}
        if "attention_mask" not in wanted and not mask.all():
            raise ModelError(
                "model: it has no attention_mask, so sentences of different lengths cannot share "
                "a batch; use batch_size=1"
            )
        return wanted


def hidden_output(outputs: Sequence[Spec]) -> Spec:
    """Return the hidden states among ``outputs``: float, rank 3."""
    found = [s for s in outputs if s.dtype.startswith("float") and len(s.shape) == 3]
    if not found:
        shapes = ", ".join(f"{s.name} {s.dtype} rank {len(s.shape)}" for s in outputs)
        raise ModelError(f"model: no float output of rank 3 (batch, length, width) among: {shapes}")
    return next((s for s in found if s.name == "last_hidden_state"), found[0])


def feeds_mask(feeds: Mapping[str, Array]) -> Array:
    """Return the attention mask of a batch; ones where the model takes none."""
    mask = feeds.get("attention_mask")
    return np.ones_like(feeds["input_ids"]) if mask is None else mask


def mean_pool(hidden: Array, mask: Array) -> Array:
    """Return the mean of ``hidden`` (b, s, d) where ``mask`` is 1, scaled to length one."""
    weight = mask.astype(np.float32)
    summed = np.einsum("bsd,bs->bd", np.asarray(hidden, np.float32), weight)
    mean = summed / np.maximum(weight.sum(axis=1, keepdims=True), 1e-9)
    return mean / np.maximum(np.linalg.norm(mean, axis=1, keepdims=True), 1e-12)


def _load_tokenizer(path: str | os.PathLike[str]) -> Any:  # the library is typed in part only
    try:
        from tokenizers import Tokenizer
    except ImportError as error:
        raise MissingDependencyError(
            "SentenceEncoder needs the package tokenizers: pip install 'tvmstruct[hf]'"
        ) from error
    if not os.path.isfile(path):
        raise InputError(f"tokenizer_json: no file {os.fspath(path)!r}")
    try:
        return Tokenizer.from_file(os.fspath(path))
    except Exception as error:  # the library raises bare Exception
        raise InputError(
            f"tokenizer_json: {os.fspath(path)!r} is not a tokenizer.json ({error})"
        ) from error


def _check_sentences(sentences: object) -> None:
    if isinstance(sentences, str):
        raise InputError("sentences: got one string; pass a list, encode([sentence])")
    for row, sentence in enumerate(cast("Sequence[object]", sentences)):
        if not isinstance(sentence, str):
            raise InputError(f"sentences: number {row} is {type(sentence).__name__}, want str")


def _own_limit(tokenizer: Any) -> int:
    """Return the length at which the tokeniser's file says to cut, else 512."""
    truncation = tokenizer.truncation
    return LONGEST if truncation is None else int(truncation["max_length"])
