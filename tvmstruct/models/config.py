"""What the built-in models share: sizes that are checked and scaled, and random inputs."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import Field, dataclass, fields, replace
from typing import ClassVar, Self

import numpy as np

from tvmstruct.errors import InputError
from tvmstruct.models.form import Form
from tvmstruct.models.graph import GraphBuilder, check_seed

AXES = {"seq": "sequence length", "hidden": "hidden size", "ffn": "feed-forward size"}
MASK = "attention_mask"


@dataclass(frozen=True)
class Input:
    """An input of a built-in model and what random values of it look like.

    ``dims`` holds sizes and symbols.  Integers (int64) are drawn from 0 to ``below - 1``;
    where ``below`` is 0 the input is float32, normal with standard deviation ``scale``.
    """

    name: str
    dims: tuple[int | str, ...]
    below: int = 0
    scale: float = 1.0

    def draw(self, shape: tuple[int, ...], rng: np.random.Generator) -> np.ndarray:
        """Return a random array in memory that a compiled model takes without a copy."""
        from tvmstruct.arrays import aligned_empty  # imports TVM; a table of models needs none

        array = aligned_empty(shape, np.int64 if self.below else np.float32)
        if self.name == MASK:
            array[...] = _padding(shape, rng)
        elif self.below:
            array[...] = rng.integers(0, self.below, shape)
        else:
            rng.standard_normal(dtype=np.float32, out=array)
            array *= np.float32(self.scale)
        return array


def _padding(shape: tuple[int, ...], rng: np.random.Generator) -> np.ndarray:
    """Return ones, then zeros: every row keeps at least half and, from length 2, loses one."""
    length = shape[-1]
    kept = rng.integers(-(-length // 2), max(2, length), (*shape[:-1], 1))
    return np.arange(length) < kept


@dataclass(frozen=True, kw_only=True)
class Config(ABC):
    """The sizes of a built-in model; every one is an integer of 1 or more, or a switch.

    ``form``, with ``r``, ``r_embedding`` and ``order``, says how matrices and tables are stored;
    see `Form`.
    ``axes`` maps what ``scaled`` may scale to the fields that grow with it.  A ``-4x`` variant
    starts from the fields in ``variant``, so that its weights fit into one ONNX message.
    """

    form: str = "dense"
    r: int = 16
    r_embedding: int = 256
    order: int = 2

    name: ClassVar[str]
    title: ClassVar[str]
    axes: ClassVar[Mapping[str, tuple[str, ...]]]
    variant: ClassVar[Mapping[str, int]] = {}
    shrink: ClassVar[str]

    def __post_init__(self) -> None:
        """Check every field and name the first that is wrong."""
        for field in fields(self):
            value = getattr(self, field.name)
            if field.name == "form" or (value is None and str(field.type).endswith("None")):
                continue
            if field.type == "bool":
                if not isinstance(value, bool):
                    raise InputError(f"{self.name}: {field.name} is {value!r}, want True or False")
            elif not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise InputError(
                    f"{self.name}: {field.name} is {value!r}, want an integer of 1 or more"
                )
        self.storage.check(self.name)

    @property
    def storage(self) -> Form:
        """Return how matrices and tables are stored."""
        return Form(self.form, self.r, self.r_embedding, self.order)

    @classmethod
    def options(cls) -> list[Field[object]]:
        """Return the fields, those that every model has at the end."""
        common = {field.name for field in fields(Config)}
        return sorted(fields(cls), key=lambda field: field.name in common)

    @abstractmethod
    def specs(self) -> tuple[Input, ...]:
        """Return the inputs in the model's order."""

    @abstractmethod
    def sizes(self, batch: int) -> dict[str, int]:
        """Return the size of every symbol among the dimensions of the inputs."""

    @abstractmethod
    def write(self, graph: GraphBuilder) -> None:
        """Write the model into ``graph``."""

    @property
    def params(self) -> int:
        """Return the number of weights, counted without making any."""
        return self.graph().params

    def graph(self) -> GraphBuilder:
        """Return the model as a graph whose weights are declared only."""
        graph = GraphBuilder(self.name, self.storage)
        for entry in self.specs():
            graph.input(entry.name, entry.dims, "int64" if entry.below else "float32")
        self.write(graph)
        return graph

    def scaled(self, axis: str, factor: int) -> Self:
        """Return the configuration with ``axis`` ("seq", "hidden" or "ffn") times ``factor``.

        Heads keep their size, so their number grows with "hidden"; nothing else changes.
        """
        if axis not in AXES:
            raise InputError(f"scaled: unknown axis {axis!r}; known: {', '.join(AXES)}")
        if axis not in self.axes:
            raise InputError(
                f"{self.name} has no {AXES[axis]}; what can be scaled: {', '.join(self.axes)}"
            )
        return replace(self, **{name: getattr(self, name) * factor for name in self.axes[axis]})

    def shapes(self, batch: int = 1) -> dict[str, tuple[int, ...]]:
        """Return the shape of every input for ``batch`` rows at the configured length."""
        if batch < 1:
            raise InputError(f"{self.name}: batch is {batch}, want 1 or more")
        sizes = self.sizes(batch)
        return {
            entry.name: tuple(d if isinstance(d, int) else sizes[d] for d in entry.dims)
            for entry in self.specs()
        }

    def inputs(self, batch: int = 1, seed: int = 0) -> dict[str, np.ndarray]:
        """Return random inputs, the same for the same seed: ids in range, masks with padding."""
        rng, shapes = np.random.default_rng(check_seed(seed)), self.shapes(batch)
        return {entry.name: entry.draw(shapes[entry.name], rng) for entry in self.specs()}


def check_heads(config: Config, hidden: int, heads: int) -> None:
    """Raise where ``hidden`` does not split into ``heads`` equal heads."""
    if hidden % heads:
        fits = max(h for h in range(1, heads) if hidden % h == 0)
        raise InputError(
            f"{config.name}: hidden {hidden} is no multiple of heads {heads}; "
            f"heads={fits} would divide it"
        )
