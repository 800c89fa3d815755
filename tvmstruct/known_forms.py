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
    width = next_power_of_two(op.n_in)
    terms = inner[0].terms if len(inner) == 1 and isinstance(inner[0], Sum) else None
    chains = [inner] if terms is None else [_list(t) for t in terms]
    chains.sort(key=len, reverse=True)
    if not chains[0] or len(chains) > 2 or chains[0][0].n_in != width:
        return None
    if (read := _read_pairs(chains[0], width)) is None:
        return None
    w, scale = read
    kept = 0.0 if len(chains) == 1 else prod(_scale(f) for f in chains[1])
    if kept == 1 or w.shape[0] != -(-op.n_out // width):
        return None
    if scale != 1 - kept:
        w = w.copy()
        w[:, 0] *= w.dtype.type(scale / (1 - kept))
    made = bh4(w, op.n_in, op.n_out, decay=1 - kept)
    x = np.random.default_rng(0).standard_normal(op.n_in)
    want, got = op.apply(x), made.apply(x)
    if np.abs(got - want).max() > TOLERANCE * np.abs(want).max():
        return None
    return Known(
        made, "bh4", {"b": w.shape[-1], "repeats": w.shape[0], "decay": round(1 - kept, 6)}
    )


def _read_pairs(chain: list[Op], width: int) -> tuple[Array, float] | None:
    """Return the weights (repeats, 4, blocks, b, b) and the factor of pairs of blocks and H."""
    blocks = [f.w for f in chain if isinstance(f, BlockDiag)]
    mixed = [f for f in chain if isinstance(f, WalshHadamard) and f.n > 1]
    if len(blocks) != PAIRS or len(mixed) != PAIRS or any(f.n != width for f in mixed):
        return None
    count, b, wide = blocks[0].shape
    repeats = wide // b
    if (
        wide % b
        or count * b != width
        or any(w.shape != (count * repeats, b, b) for w in blocks[1:])
    ):
        return None
    first = blocks[0].reshape(count, b, repeats, b).transpose(2, 0, 1, 3)
    rest = [w.reshape(repeats, count, b, b) for w in blocks[1:]]
    w = np.stack([first, *rest], axis=1).swapaxes(-1, -2)
    return w, prod(_scale(f) for f in chain)


def _scale(op: Op) -> float:
    return op.scale if isinstance(op, WalshHadamard) else 1.0


def _list(op: Op) -> list[Op]:
    return list(op.factors) if isinstance(op, Product) else [op]
