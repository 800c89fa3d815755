"""The three models of NLP-Fast (Tables I and IV), built with random weights.

>>> config = tvmstruct.models.config("bert-s4x", layers=1)
>>> model = tvmstruct.compile(tvmstruct.models.source(config))
>>> model.run(config.inputs(batch=2))
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import Field, fields
from typing import TYPE_CHECKING

from tvmstruct.errors import InputError
from tvmstruct.models.bert import Bert
from tvmstruct.models.config import Config
from tvmstruct.models.memory_network import MemoryNetwork
from tvmstruct.models.transformer import Transformer

if TYPE_CHECKING:
    from onnx import ModelProto

    from tvmstruct.frontends import Source

__all__ = [
    "MODELS",
    "Bert",
    "Config",
    "MemoryNetwork",
    "Transformer",
    "build",
    "config",
    "names",
    "parse",
    "source",
]

MODELS: Mapping[str, type[Config]] = {c.name: c for c in (MemoryNetwork, Transformer, Bert)}
"""Every built-in model by name."""

VARIANTS = {"s4x": "seq", "h4x": "hidden", "f4x": "ffn"}
SWITCH = {"true": True, "1": True, "false": False, "0": False}


def names() -> Iterator[str]:
    """Yield the name of every model and of its variants, such as ``bert-s4x``."""
    for name, kind in MODELS.items():
        yield name
        yield from (f"{name}-{suffix}" for suffix, axis in VARIANTS.items() if axis in kind.axes)


def config(name: str, /, **options: int | bool) -> Config:
    """Return the configuration of a model with the base sizes of Table IV, or ``options``.

    A name that ends in ``-s4x``, ``-h4x`` or ``-f4x`` has four times the sequence length (keys
    of a memory network), hidden size or feed-forward size of the same options without it; with
    fewer layers unless ``layers`` says otherwise (2 of BERT, 1 of the Transformer), for a model
    must fit into 2 GB.  Raises ``InputError`` for an unknown name, option or size.
    """
    base, axis = _split(name)
    known = [field.name for field in fields(base)]
    for option in options:
        if option not in known:
            raise InputError(f"{name}: unknown option {option!r}; known: {', '.join(known)}")
    if axis is None:
        return base(**options)
    return base(**{**base.variant, **options}).scaled(axis, 4)


def _split(name: str) -> tuple[type[Config], str | None]:
    stem, _, suffix = name.rpartition("-")
    if name in MODELS:
        return MODELS[name], None
    if stem in MODELS and suffix in VARIANTS:
        return MODELS[stem], VARIANTS[suffix]
    raise InputError(f"no built-in model {name!r}; there are: {', '.join(names())}")


def parse(text: str) -> Config:
    """Return the configuration that ``bert-s4x?layers=2&seq=64`` names."""
    name, _, tail = text.partition("?")
    kinds = {field.name: field for field in fields(_split(name)[0])}
    options: dict[str, int | bool] = {}
    for part in tail.split("&") if tail else ():
        key, equals, value = part.partition("=")
        if not (key and equals and value):
            raise InputError(f"{text}: {part!r} is no option; want {name}?key=value&key=value")
        if key in options:
            raise InputError(f"{text}: option {key!r} comes twice")
        options[key] = _read(text, kinds[key], value) if key in kinds else 0
    return config(name, **options)


def _read(text: str, field: Field[object], value: str) -> int | bool:
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
    """Return the model as a ``Source``, as ``from_onnx`` reads it."""
    import tvmstruct  # through the lazy package: it sets TVM's threads before TVM is imported

    return tvmstruct.from_onnx(build(config, seed))
