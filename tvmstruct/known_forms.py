"""Name the form of an operator that was read off a graph, and write it as its family does."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from math import prod

import numpy as np

from tvmstruct.families.bh4 import PAIRS, bh4
from tvmstruct.ops import (
    Array,
    BlockDiag,
    Dense,
    Op,
    Pad,
    Permute,
    Product,
    SharedBlockDiag,
    Slice,
    Sum,
    WalshHadamard,
    next_power_of_two,
)

TOLERANCE = 1e-6  # relative, of the result of a random vector in float64


@dataclass(frozen=True)
class Known:
    """An operator and the name of its form in the report."""

    op: Op
    name: str = "operator"
    parameters: dict[str, object] = field(default_factory=dict)


def known_form(op: Op) -> Known:
    """Return a simplified operator as its family writes it: BH4, else a Kronecker product."""
    if (found := _as_bh4(op)) is not None:
        return found
    leaves = list(_leaves(op))
    weights = [f for f in leaves if isinstance(f, Dense | BlockDiag | SharedBlockDiag)]
    plain = all(isinstance(f, SharedBlockDiag | Permute) for f in leaves)
    return Known(op, "kronecker") if plain and len(weights) == 2 else Known(op)


def _leaves(op: Op) -> Iterator[Op]:
    if isinstance(op, Product | Sum):
        for part in op.factors if isinstance(op, Product) else op.terms:
            yield from _leaves(part)
    else:
        yield op


def _as_bh4(op: Op) -> Known | None:
    """Return BH4 with its residual, if it gives what ``op`` gives."""
    inner = [f for f in _list(op) if not isinstance(f, Pad | Slice)]
    terms = inner[0].terms if len(inner) == 1 and isinstance(inner[0], Sum) else None
    chains = [inner] if terms is None else [_list(t) for t in terms]
    chains.sort(key=len, reverse=True)
    width = next_power_of_two(op.n_in)
    if not chains[0] or len(chains) > 2 or chains[0][0].n_in != width:
        return None
    kept = 0.0 if len(chains) == 1 else prod(map(_scale, chains[1]))
    scale = prod(map(_scale, chains[0]))
    for w in _read_blocks(chains[0], width):
        if kept == 1 or w.shape[0] != -(-op.n_out // width):
            continue
        if scale != 1 - kept:
            w = w.copy()
            w[:, 0] *= w.dtype.type(scale / (1 - kept))
        made = bh4(w, op.n_in, op.n_out, decay=1 - kept)
        if _agree(op, made):
            shape = {"b": w.shape[-1], "repeats": w.shape[0], "decay": round(1 - kept, 6)}
            return Known(made, "bh4", shape)
    return None


def _agree(a: Op, b: Op) -> bool:
    x = np.random.default_rng(0).standard_normal(a.n_in)
    want, found = a.apply(x), b.apply(x)
    return bool(np.abs(found - want).max() <= TOLERANCE * np.abs(want).max())


def _read_blocks(chain: list[Op], width: int) -> Iterator[Array]:
    """Yield the weights (repeats, 4, blocks, b, b), as the public code and as the family lay them.

    The first blocks fan out to all repeats; the others go by repeats, then blocks, or the other
    way round. Transforms between them are not looked at.
    """
    blocks = [f.w for f in chain if isinstance(f, BlockDiag)]
    if len(blocks) != PAIRS:
        return
    count, b, wide = blocks[0].shape
    repeats, left = divmod(wide, b)
    if left or count * b != width or any(w.shape != (count * repeats, b, b) for w in blocks[1:]):
        return
    first = blocks[0].reshape(count, b, repeats, b).transpose(2, 0, 1, 3)
    for shape, axes in (((repeats, count), (0, 1, 2, 3)), ((count, repeats), (1, 0, 2, 3))):
        rest = [w.reshape(*shape, b, b).transpose(axes) for w in blocks[1:]]
        yield np.stack([first, *rest], axis=1).swapaxes(-1, -2)


def _scale(op: Op) -> float:
    return op.scale if isinstance(op, WalshHadamard) else 1.0


def _list(op: Op) -> list[Op]:
    return list(op.factors) if isinstance(op, Product) else [op]
