"""Small rectangular, non-symmetric, unequal-block expressions, and every family."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from tvmstruct import families
from tvmstruct.families import FAMILIES
from tvmstruct.ops import (
    BlockDiag,
    Dense,
    Diag,
    Op,
    Pad,
    Permute,
    Product,
    SharedBlockDiag,
    Slice,
    Sum,
    WalshHadamard,
    map_arrays,
    scaling,
    swap,
)

_rng = np.random.default_rng(20240607)


def normal(*shape: int) -> np.ndarray:
    """Return standard normal float64 entries."""
    return _rng.normal(size=shape)


_SHARED = normal(3, 2)

NODES: dict[str, Op] = {
    "dense wide": Dense(normal(3, 7)),
    "dense tall": Dense(normal(7, 3)),
    "dense 1x1": Dense(normal(1, 1)),
    "block diagonal": BlockDiag(normal(4, 3, 5)),
    "one block": BlockDiag(normal(1, 5, 2)),
    "shared block diagonal": SharedBlockDiag(normal(5, 3), 4),
    "permute 2-D": swap(3, 5),
    "permute 3-D": Permute((2, 3, 5), (2, 0, 1)),
    "permute 4-D": Permute((2, 3, 1, 4), (3, 1, 0, 2)),
    "diagonal": Diag(normal(6)),
    "hadamard": WalshHadamard(8),
    "hadamard, scaled and repeated": WalshHadamard(4, scale=0.3, blocks=3),
    "hadamard of runs": WalshHadamard(8, scale=-0.5, blocks=2, inner=3),
    "hadamard of many neighbours": WalshHadamard(64, blocks=2),
    "hadamard beside blocks": BlockDiag(normal(4, 3, 6))
    @ WalshHadamard(8, 0.5, 3)
    @ Diag(normal(24)),
    "hadamard between blocks": BlockDiag(normal(4, 3, 4))
    @ WalshHadamard(16)
    @ BlockDiag(normal(2, 8, 5)),
    "hadamard, permuted": (WalshHadamard(4, 0.5, 2, 6) @ Permute((2, 4, 3, 2), (2, 0, 1, 3)))
    + Diag(normal(48)),
    "features repeated": scaling(6, 0.3) @ (Pad(6, 18) + Pad(6, 18, 6) + Pad(6, 18, 12)),
    "scaling": scaling(5, -0.7),
    "slice": Slice(9, 4),
    "slice from the middle": Slice(9, 7, 2),
    "pad": Pad(4, 9),
    "pad in the middle": Pad(4, 9, 3),
    "sum": Dense(normal(5, 4)) + Slice(5, 4) + (Pad(5, 8) @ SharedBlockDiag(normal(2, 1), 4)),
    "product": Pad(5, 6) @ BlockDiag(normal(2, 3, 4)) @ swap(2, 4) @ Diag(normal(8)) @ Slice(8, 7),
    "product of sums": (Dense(normal(6, 4)) + Slice(6, 5, 1)) @ (Pad(4, 7) + Dense(normal(4, 7))),
    "sum with what it reads": Dense(normal(5, 6)) @ (Dense(normal(6, 6)) + Slice(6, 6)),
    "what is read, then a sum": Dense(normal(5, 6)) @ (Slice(6, 6) + Dense(normal(6, 6))),
    "array used twice": SharedBlockDiag(_SHARED, 2)
    @ Permute((2, 2), (1, 0))
    @ Pad(4, 9)
    @ SharedBlockDiag(_SHARED, 3),
}


@dataclass(frozen=True)
class Case:
    """A family at one weight shape with one choice of parameters."""

    family: str
    shape: tuple[int, int]
    parameters: dict[str, Any] = field(default_factory=dict)

    def __str__(self) -> str:
        details = ",".join(f"{k}={v}" for k, v in self.parameters.items())
        return f"{self.family} {self.shape[0]}x{self.shape[1]} {details}"

    def member(self) -> Op:
        """Return a random member: the expression that a fit has, with normal entries."""
        options = {"sweeps": 1} if self.family in ("bh4", "low_rank_lgp") else {}
        shaped = FAMILIES[self.family].nearest(normal(*self.shape), **self.parameters, **options)
        return map_arrays(shaped.op, lambda a: normal(*a.shape))


def _both(family: str, shape: tuple[int, int], **parameters: Any) -> Iterator[Case]:
    yield Case(family, shape, parameters)
    yield Case(family, shape[::-1], parameters)


EVEN = [
    *_both("low_rank", (24, 36), r=5),
    *_both("vvma", (24, 36), k=4),
    *_both("vvma", (24, 36), k=6, transposed=True),
    *_both("vvma", (24, 36), k=12, transposed=False),
    *_both("kronecker", (24, 36), r=2, a=(4, 9), b=(6, 4)),
    *_both("block_diagonal", (24, 36), g=4),
    *_both("lgp_shuffle", (24, 36), g=3),
    *_both("lgp_dense", (24, 36), g=4),
    Case("lgp_dense", (24, 24), {"g": 3}),
    *_both("low_rank_lgp", (24, 36), g=2, r=3, g_out=4),
    Case("bh4", (32, 64), {"b": 4}),
    Case("bh4", (32, 16), {"b": 8, "decay": 0.5}),
    *_both("monarch", (24, 36), b=4, r=1),
    Case("monarch", (36, 24), {"b": 3}),
    *_both("word2ket_xs", (27, 64), order=3, r=2),
    *_both("word2ket_xs", (36, 25), order=2, r=3),
]
EVEN.remove(Case("kronecker", (36, 24), {"r": 2, "a": (4, 9), "b": (6, 4)}))
EVEN.append(Case("kronecker", (36, 24), {"r": 2, "a": (9, 2), "b": (4, 12)}))

RAGGED = [
    *_both("vvma", (23, 31), k=4, transposed=False),
    *_both("vvma", (23, 31), k=6, transposed=True),
    *_both("kronecker", (23, 31), r=2),
    Case("kronecker", (23, 31), {"r": 3, "a": (5, 4), "b": (5, 9)}),
    *_both("block_diagonal", (23, 31), g=4),
    *_both("lgp_shuffle", (23, 31), g=5),
    *_both("lgp_dense", (23, 31), g=3),
    *_both("low_rank_lgp", (23, 31), g=3, r=4),
    *_both("bh4", (13, 37), b=4),
    *_both("monarch", (23, 31), b=4, r=2),
    *_both("word2ket_xs", (23, 31), order=2, r=2),
    *_both("word2ket_xs", (23, 31), order=3, r=2),
    Case("word2ket_xs", (70, 16), {"order": 4, "r": 2}),
]

CASES = EVEN + RAGGED

EXPRESSIONS: dict[str, Op] = {**NODES, **{str(case): case.member() for case in CASES}}
EXPRESSIONS["kronecker helper"] = families.kronecker(normal(2, 3, 4), normal(2, 5, 2))


def node_types_in(op: Op) -> set[type[Op]]:
    """Return the types of the nodes of an expression."""
    parts = op.factors if isinstance(op, Product) else op.terms if isinstance(op, Sum) else ()
    return {type(op)}.union(*(node_types_in(part) for part in parts))
