"""Models built with random weights: NLP-Fast's three (Tables I and IV), T5, an embedding table.

Every matrix can be a sum of Kronecker products (Shapeshifter), see `Form`; ``PRESETS`` are the
models that its Tables 4 to 7 count.

>>> config = tvmstruct.models.config("bert-s4x", layers=1)
>>> model = tvmstruct.compile(tvmstruct.models.source(config))
>>> model.run(config.inputs(batch=2))
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import Field, fields, replace
from typing import TYPE_CHECKING

from tvmstruct.errors import InputError
from tvmstruct.models.bert import Bert
from tvmstruct.models.config import Config
from tvmstruct.models.counts import Counts, count
from tvmstruct.models.embedding import Embedding
from tvmstruct.models.form import Form
from tvmstruct.models.memory_network import MemoryNetwork
from tvmstruct.models.presets import PRESETS
from tvmstruct.models.t5 import T5
from tvmstruct.models.transformer import Transformer

if TYPE_CHECKING:
    from onnx import ModelProto

    from tvmstruct.frontends import Source

__all__ = [
    "MODELS",
    "PRESETS",
    "T5",
    "Bert",
    "Config",
    "Counts",
    "Embedding",
    "Form",
    "MemoryNetwork",
    "Transformer",
    "build",
    "config",
    "count",
    "names",
    "parse",
    "source",
]

MODELS: Mapping[str, type[Config]] = {
    c.name: c for c in (MemoryNetwork, Transformer, Bert, T5, Embedding)
}
"""Every built-in model by name."""

VARIANTS = {"s4x": "seq", "h4x": "hidden", "f4x": "ffn"}
SWITCH = {"true": True, "1": True, "false": False, "0": False}


def names() -> Iterator[str]:
    """Yield the name of every model, of its variants, such as ``bert-s4x``, and of presets."""
    for name, kind in MODELS.items():
        yield name
        yield from (f"{name}-{suffix}" for suffix, axis in VARIANTS.items() if axis in kind.axes)
    yield from PRESETS


def config(name: str, /, **options: int | bool | str) -> Config:
    """Return the configuration of a model with the base sizes of Table IV, or ``options``.

    A name that ends in ``-s4x``, ``-h4x`` or ``-f4x`` has four times the sequence length (keys
    of a memory network), hidden size or feed-forward size of the same options without it; with
    fewer layers unless ``layers`` says otherwise (2 of BERT, 1 of the Transformer), for a model
    must fit into 2 GB.  Raises ``InputError`` for an unknown name, option or size.
    """
    base, axis = _split(name)
    known = [field.name for field in base.options()]
    for option in options:
        if option not in known:
            raise InputError(f"{name}: unknown option {option!r}; known: {', '.join(known)}")
    if name in PRESETS:
        return base(**{**PRESETS[name].options, **options})
    if axis is None:
        return base(**options)
    return base(**{**base.variant, **options}).scaled(axis, 4)


def _split(name: str) -> tuple[type[Config], str | None]:
    stem, _, suffix = name.rpartition("-")
    if name in MODELS:
        return MODELS[name], None
    if name in PRESETS:
        return MODELS[PRESETS[name].model], None
    if stem in MODELS and suffix in VARIANTS:
        return MODELS[stem], VARIANTS[suffix]
    raise InputError(f"no built-in model {name!r}; there are: {', '.join(names())}")


def parse(text: str) -> Config:
    """Return the configuration that ``bert-s4x?layers=2&seq=64`` names."""
    name, _, tail = text.partition("?")
    kinds = {field.name: field for field in fields(_split(name)[0])}
    options: dict[str, int | bool | str] = {}
    for part in tail.split("&") if tail else ():
        key, equals, value = part.partition("=")
        if not (key and equals and value):
            raise InputError(f"{text}: {part!r} is no option; want {name}?key=value&key=value")
        if key in options:
            raise InputError(f"{text}: option {key!r} comes twice")
        options[key] = _read(text, kinds[key], value) if key in kinds else 0
    return config(name, **options)


def _read(text: str, field: Field[object], value: str) -> int | bool | str:
    if field.type == "str":
        return value
    if field.type == "bool":
        if value.lower() not in SWITCH:
            raise InputError(f"{text}: {field.name} is {value!r}, want true or false")
        return SWITCH[value.lower()]
    try:
        return int(value)
    except ValueError:
        raise InputError(f"{text}: {field.name} is {value!r}, want an integer") from None


def build(config: Config, seed: int = 0) -> ModelProto:
    """Return the ONNX model with random weights, the same for the same seed.

    Weights are named as by Hugging Face and keep the variance of what passes through them, so
    that activations stay near 1 in any depth.  Batch and lengths are dynamic.  Raises
    ``ModelError`` where the weights do not fit into one ONNX message (2 GB).
    """
    return config.graph().finish(seed, config.shrink)


def source(config: Config, seed: int = 0) -> Source:
    """Return the model as a ``Source``, as ``from_onnx`` reads it.

    Ids are checked against the vocabulary, which a factored table exceeds.
    """
    import tvmstruct  # through the lazy package: it sets TVM's threads before TVM is imported

    found = tvmstruct.from_onnx(build(config, seed))
    limits = {entry.name: entry.below for entry in config.specs() if entry.below}
    tokens = {name: min(rows, limits[name]) for name, rows in found.token_inputs.items()}
    return replace(found, token_inputs=tokens)
