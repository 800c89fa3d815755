"""Products on words of low precision: which of them are worth it, and how their inputs lie.

A dot product instruction multiplies words of 32 bits that hold a few neighbours of the depth. So
the features that a product reads are rounded first, by a stage of their own, into a buffer whose
places the product then reads word by word:

* in order, where the depth ends in a run of neighbours: features keep their places, and the rest
  of a run's last word, whatever that is, meets weights of zero;
* gathered, where the groups are neighbours: ``[depth in words][group][neighbours]``, so that a
  vector of words belongs to neighbouring groups.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import numpy as np

BYTES, HALVES = "bytes", "halves"  # words of four int8, or of two bfloat16
EACH = {BYTES: 4, HALVES: 2}  # neighbours in a word
TYPES = {BYTES: "uint8", HALVES: "uint16"}  # of a rounded feature
MORE = {BYTES: 2, HALVES: 0}  # rows of a panel after the words: starts of sums, and their scales
ROUNDING, SCALING = {BYTES: 3, HALVES: 2}, {BYTES: 3, HALVES: 0}  # see `pays`
Dim = tuple[int, int]  # extent, stride


@dataclass(frozen=True)
class Source:
    """What a product reads: ``buffer[offset + g * stride + sum_i p_i * depth_i]``.

    ``scale`` is the buffer with the scale of every row, where the features are rounded to int8.
    """

    buffer: int
    offset: int
    groups: Dim
    depth: tuple[Dim, ...]
    scale: int | None = None


@dataclass(frozen=True)
class Round:
    """Round the features of ``source`` to ``dst``, in order or ``gathered``.

    In int8 a feature is kept as ``rint(127 v / t) + 128``, where t is the largest magnitude of
    the features of the row, and the buffer ``scale`` takes t / 127.
    """

    source: Source
    dst: int
    scale: int | None
    form: str
    gathered: bool

    @property
    def src(self) -> int:
        """Buffer that it reads."""
        return self.source.buffer

    @property
    def runs(self) -> tuple[Dim, ...]:
        """The features of a row as a nest of runs, neighbours innermost."""
        dims = sorted((d for d in (self.source.groups, *self.source.depth) if d[0] > 1), key=_step)
        out: list[Dim] = []
        for extent, stride in dims:
            if out and out[-1][0] * out[-1][1] == stride:
                out[-1] = (out[-1][0] * extent, out[-1][1])
            else:
                out.append((extent, stride))
        return tuple(reversed(out or [(1, 1)]))

    @property
    def target(self) -> Source:
        """Where the product finds its words: the last extent of the depth counts words."""
        each, (groups, stride) = EACH[self.form], self.source.groups
        *outer, (extent, step) = self.source.depth
        words = -(-extent // each)
        if not self.gathered:
            depth = (*outer, (words, each * step))
            return Source(self.dst, 0, (groups, stride), depth, self.scale)
        row, dims = groups * each, [(words, groups * each)]
        for outer_extent, _ in reversed(outer):
            row *= dims[0][0]
            dims.insert(0, (outer_extent, row))
        return Source(self.dst, 0, (groups, each), tuple(dims), self.scale)

    @property
    def size(self) -> int:
        """Elements of ``dst``, with what the last word of the last run may reach."""
        found, each = self.target, EACH[self.form]
        last = sum((extent - 1) * stride for extent, stride in (found.groups, *found.depth))
        return last + each


def ordered(source: Source) -> Source:
    """Return the same features with the smallest stride of the depth last."""
    depth = tuple(sorted(source.depth, key=_step, reverse=True))
    return replace(source, depth=depth)


def _step(dim: Dim) -> int:
    return dim[1]


def words_of(
    w: np.ndarray, depth: tuple[Dim, ...], order: tuple[int, ...], each: int
) -> np.ndarray:
    """Return weights (blocks, p, q) as (blocks, words, q, each): zero where a run ends in a word.

    ``depth`` are the dimensions of p, and ``order`` is that in which words go through them.
    """
    blocks, _, q = w.shape
    extents = [extent for extent, _ in depth]
    nest = w.reshape(blocks, *extents, q).transpose(0, *(1 + i for i in order), 1 + len(extents))
    run = nest.shape[-2]
    padded = np.zeros((*nest.shape[:-2], -(-run // each) * each, q), w.dtype)
    padded[..., :run, :] = nest
    return padded.reshape(blocks, -1, each, q).transpose(0, 1, 3, 2)


def pays(form: str, p: int, q: int) -> bool:
    """Return whether blocks of p by q take fewer instructions in words than in float32.

    Beside the products themselves, rounding costs as much as ``ROUNDING`` products of each
    input, and bringing a sum back to float32 ``SCALING`` of each output: what blocks of 4 by 4 to
    128 by 64 take, at 1 and 64 rows, says so within a fifth.
    """
    words = math.ceil(p / EACH[form])
    return p * q > words * q + ROUNDING[form] * p + SCALING[form] * q
