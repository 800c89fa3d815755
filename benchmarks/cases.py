"""What a line computes: a stack of equal layers of one form, or the demo's sentence encoder.

The weights of a stack are made once, from random factors, and handed to the workers as files.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from tvmstruct import families
from tvmstruct.ops import Array, Dense, Op, crop, pad, product

STEADY = 32  # layers over which a random input keeps its norm


@dataclass(frozen=True)
class Stack:
    """``layers`` layers of one form in a row on ``rows`` rows, from k to n and back to k.

    Where k = n all of them share one weight, else the ways there and back have one each.
    ``sizes`` are the parameters of the form; a single layer only goes there.
    """

    rows: int
    k: int
    n: int
    layers: int = 32
    form: str = "dense"
    sizes: Mapping[str, int] = field(default_factory=dict)

    @property
    def shapes(self) -> tuple[tuple[int, int], ...]:
        """Shapes of the distinct weights, in order of use."""
        there, back = (self.k, self.n), (self.n, self.k)
        return (there,) if self.k == self.n or self.layers == 1 else (there, back)


@dataclass(frozen=True)
class Encoder:
    """The demo's sentence encoder, three blocks of width 384, on a batch of token ids."""

    rows: int
    length: int


@dataclass(frozen=True)
class Work:
    """What ours needs for one layer, as a mean over the distinct layers, or for one encoder.

    ``plain_flops`` are in float32 whatever the precision of the line. ``weight_values`` and
    ``other_bytes`` (x and y) are streamed by each call; ``resident`` are the values of all
    weights. ``saving`` is the dense layer's multiply-adds over ours. ``working_set`` are the bytes
    whose level of the memory bounds the line, where that is not all that is streamed.
    """

    flops: float
    weight_values: float
    other_bytes: float
    resident: float
    saving: float = 1.0
    plain_flops: float = 0.0
    working_set: float | None = None


class Weights:
    """Makes the weights of stacks, each set once, as files in a folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._known: dict[str, tuple[list[Op], list[str]]] = {}

    def of(self, stack: Stack) -> tuple[Work, list[str]]:
        """Return the work of a layer and the files of the distinct weights, in order of use."""
        key = f"{stack.form}{dict(stack.sizes)}{stack.shapes}"
        if key not in self._known:
            members = make_members(stack)
            files = [self.folder / f"{len(self._known)}-{i}.npy" for i in range(len(members))]
            scale = 1 / growth(members)
            for op, file in zip(members, files, strict=True):
                np.save(file, (op.to_dense() * scale).astype(np.float32))
            self._known[key] = members, list(map(str, files))
        members, files = self._known[key]
        return stack_work(stack, members), files


def make_members(stack: Stack) -> list[Op]:
    """Return a random member of the stack's form for each distinct weight."""
    rng = np.random.default_rng(0)
    return [MEMBERS[stack.form](k, n, rng, **stack.sizes) for k, n in stack.shapes]


def growth(members: Sequence[Op]) -> float:
    """Return the factor by which one layer of a stack lengthens a random vector, on average."""
    x = np.random.default_rng(1).standard_normal(members[0].n_in)
    if len(members) == 1 and members[0].n_in != members[0].n_out:  # a single layer, no way back
        return float(np.linalg.norm(members[0].apply(x)) / np.linalg.norm(x))
    logarithm = 0.0
    for i in range(STEADY):
        y = members[i % len(members)].apply(x)
        logarithm += math.log(float(np.linalg.norm(y) / np.linalg.norm(x)))
        x = y / np.linalg.norm(y)
    return math.exp(logarithm / STEADY)


def stack_work(stack: Stack, members: Sequence[Op]) -> Work:
    """Count what the operators say; features that are padded count, for they are computed."""
    count = len(members)
    macs = sum(op.macs for op in members) / count
    params = sum(op.params for op in members)
    return Work(
        flops=2.0 * stack.rows * macs,
        weight_values=params / count,
        other_bytes=4.0 * stack.rows * (stack.k + stack.n),
        resident=params,
        saving=stack.k * stack.n / macs,
    )


def encoder_work(encoder: Encoder) -> Work:
    """Count the encoder's dense layers, and as plain float32 the products of attention."""
    blocks, width, inner = 3, 384, 1536
    values = blocks * (4 * width * width + 2 * width * inner)
    tokens = encoder.rows * encoder.length
    attention = blocks * 2 * width * encoder.length  # multiply-adds for a token
    features = blocks * (8 * width + 2 * inner)  # in and out of the dense layers
    return Work(
        flops=2.0 * tokens * values,
        weight_values=values,
        other_bytes=4.0 * tokens * features,
        resident=values,
        plain_flops=2.0 * tokens * attention,
    )


def _dense(k: int, n: int, rng: np.random.Generator) -> Op:
    return Dense(rng.standard_normal((k, n)))


def _vvma(n_in: int, n_out: int, rng: np.random.Generator, *, k: int) -> Op:
    blocks_in, blocks_out = -(-n_in // k), -(-n_out // k)
    m, v = rng.standard_normal((k, k)), rng.standard_normal((blocks_out, blocks_in, k))
    core = families.vvma(m, v, transposed=n_out > n_in)  # the cheaper form
    return _fitted(core, n_in, n_out)


def _low_rank(n_in: int, n_out: int, rng: np.random.Generator, *, r: int) -> Op:
    return families.low_rank(rng.standard_normal((n_in, r)), rng.standard_normal((r, n_out)))


def _lgp_shuffle(n_in: int, n_out: int, rng: np.random.Generator, *, g: int) -> Op:
    blocks = rng.standard_normal((g, -(-n_in // g), -(-n_out // g)))
    return _fitted(families.lgp_shuffle(blocks), n_in, n_out)


def _monarch(n_in: int, n_out: int, rng: np.random.Generator, *, b: int) -> Op:
    p, q, r = -(-n_in // b), -(-n_out // b), -(-n_in // (b * b))
    first, second = rng.standard_normal((b, p, b * r)), rng.standard_normal((b, b * r, q))
    return _fitted(families.monarch(first, second), n_in, n_out)


def _kronecker(n_in: int, n_out: int, rng: np.random.Generator, *, r: int) -> Op:
    p, q = math.isqrt(n_in - 1) + 1, math.isqrt(n_out - 1) + 1
    a, b = rng.standard_normal((r, p, q)), rng.standard_normal((r, p, q))
    return _fitted(families.kronecker(a, b), n_in, n_out)


def _fitted(core: Op, n_in: int, n_out: int) -> Op:
    return product(*pad(n_in, core.n_in), core, *crop(core.n_out, n_out))


MEMBERS: Mapping[str, Callable[..., Op]] = {
    "dense": _dense,
    "vvma": _vvma,
    "low_rank": _low_rank,
    "lgp_shuffle": _lgp_shuffle,
    "monarch": _monarch,
    "kronecker": _kronecker,
}


def load(files: Sequence[str], stack: Stack) -> tuple[list[Array], Array]:
    """Return the weight of every layer, (k, n) or (n, k), and an input (rows, k)."""
    distinct = [np.load(file) for file in files]
    weights = [distinct[i % len(distinct)] for i in range(stack.layers)]
    return weights, np.random.default_rng(2).standard_normal((stack.rows, stack.k), np.float32)
