"""Calibration: what the layers of a model read on typical inputs."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from tvmstruct.errors import InputError
from tvmstruct.ops import Array
from tvmstruct.vta.scales import Options

Batch = Mapping[str, Any] | Sequence[Any]
WANTED = (
    "a list of what the model is called with, such as "
    '[{"input_ids": ids, "attention_mask": mask}]; a few typical batches are enough'
)


@dataclass(frozen=True, eq=False)
class Calibration:
    """Typical inputs of a model, and how scales are chosen from what its layers read on them.

    ``rows`` is how many rows of each layer's input are kept, drawn at random from all batches.
    """

    batches: tuple[Batch, ...]
    options: Options = field(default_factory=Options)
    rows: int = 512

    def __post_init__(self) -> None:
        if not self.batches:
            raise InputError(f"calibration has no batches; pass calibration={WANTED}")
        if self.rows < 1:
            raise InputError(f"calibration: rows={self.rows}; want at least 1")

    @classmethod
    def of(cls, given: Calibration | Batch | Iterable[Batch] | None) -> Calibration:
        """Return the checked form of the argument ``calibration`` of ``compile``.

        It is one batch (inputs by name, or the array of a model with one input), or several: a
        list or an iterator, each by name, as a tuple in the order of inputs, or one array.
        """
        if given is None:
            raise InputError(
                'target="vta" computes dense layers in int8 and has to see typical inputs first: '
                f"pass calibration={WANTED}"
            )
        if isinstance(given, Calibration):
            return given
        if isinstance(given, Mapping) or hasattr(given, "__dlpack__"):
            return cls((_batch(given),))
        if not isinstance(given, Iterable) or isinstance(given, str | bytes):
            raise InputError(f"calibration is a {type(given).__name__}; want {WANTED}")
        return cls(tuple(map(_batch, given)))


def _batch(given: Any) -> Batch:
    if isinstance(given, Mapping | tuple):
        return given
    if hasattr(given, "__dlpack__"):
        return (given,)
    raise InputError(
        f"calibration: a batch is a {type(given).__name__}; want {WANTED}, "
        "or a tuple of arrays in the order of the model's inputs"
    )


class Samples:
    """Rows drawn evenly from all that a layer reads (reservoir sampling), and the largest."""

    def __init__(self, keep: int) -> None:
        self.keep, self.count, self.top = keep, 0, -1.0
        self.rows: Array = np.zeros((0, 0), np.float32)
        self.extreme: Array = np.zeros((0, 0), np.float32)
        self._rng = np.random.default_rng(0)

    def add(self, x: Array) -> None:
        """Take in rows ``x`` (rows, n)."""
        free = max(0, self.keep - self.count)
        if self.count == 0:
            self.rows = np.zeros((0, x.shape[1]), np.float32)
        self.rows = np.concatenate([self.rows, x[:free]])
        later = x[free:]
        seen = np.arange(self.count + min(free, len(x)), self.count + len(x))
        place = self._rng.integers(0, seen + 1) if len(later) else seen
        for row, i in zip(later, place, strict=True):
            if i < self.keep:
                self.rows[i] = row
        self.count += len(x)
        if x.size and (top := float(np.abs(x).max())) > self.top:
            self.top = top
            self.extreme = x[np.abs(x).max(axis=1).argmax()][None].copy()

    def array(self) -> Array:
        """Return the rows, the one with the largest value among them."""
        return np.concatenate([self.rows, self.extreme]) if len(self.extreme) else self.rows
