"""Writing an operator shorter, or as its family does, changes no result."""

from __future__ import annotations

import numpy as np
import pytest

from tests import models
from tests.catalogue import EXPRESSIONS
from tvmstruct import ops
from tvmstruct.families import bh4
from tvmstruct.known_forms import known_form
from tvmstruct.ops import BlockDiag, Dense, Pad, Slice, WalshHadamard, add, product, scaling
from tvmstruct.simplify import simplify
from tvmstruct.testing import tolerance


def check(found: ops.Op, want: ops.Op) -> None:
    dense = want.to_dense()
    scale = max(1.0, float(np.abs(dense).max()))
    np.testing.assert_allclose(
        found.to_dense(), dense, **tolerance("float64", want.n_in, scale=scale)
    )


@pytest.mark.parametrize("name", EXPRESSIONS)
def test_keeps_every_operator(name):
    op = EXPRESSIONS[name]
    short = simplify(op)
    check(short, op)
    assert short.macs <= op.macs
    known = known_form(short)
    check(known.op, op)


def level(n: int, half: int, sign: float = -1.0) -> ops.Op:
    """Return sums and differences of pairs ``half`` apart, of slices and paddings."""
    sort = ops.Permute((n // (2 * half), 2, half), (1, 0, 2))
    a, b = (product(sort, Slice(n, start + n // 2, start)) for start in (0, n // 2))
    minus = product(b, scaling(n // 2, sign))
    both = add(product(add(a, b), Pad(n // 2, n)), product(add(a, minus), Pad(n // 2, n, n // 2)))
    return product(both, ops.Permute((2, n // (2 * half), half), (1, 0, 2)))


def test_butterflies_become_one_transform():
    op = product(*(level(32, half) for half in (1, 2, 4, 8, 16)), scaling(32, 0.25))
    assert ops.describe(simplify(op)) == "WalshHadamard(32 x1, scale 0.25)"
    some = product(*(level(32, half) for half in (4, 8)))
    assert ops.describe(simplify(some)) == "WalshHadamard(4 of 4 x2, scale 1)"


def test_what_is_almost_a_transform_is_none():
    op = product(level(8, 1), level(8, 2), level(8, 4, sign=-1.0001))
    short = simplify(op)
    check(short, op)
    assert not isinstance(short, WalshHadamard)


def test_chains_side_by_side_become_one(rng):
    chains = [
        product(BlockDiag(rng.normal(size=(4, 2, 3))), WalshHadamard(4, blocks=3), Pad(12, 24, at))
        for at in (0, 12)
    ]
    short = simplify(add(*chains))
    check(short, add(*chains))
    assert not any(isinstance(f, ops.Sum) for f in short.factors)  # type: ignore[attr-defined]
    cut = [
        product(Slice(12, at + 4, at), Dense(rng.normal(size=(4, 5))), Pad(5, 15, at // 4 * 5))
        for at in (0, 4, 8)
    ]
    assert ops.describe(simplify(add(*cut))) == "BlockDiag(3 blocks 4x5)"


@pytest.mark.parametrize(
    ("repeats", "n_in", "n_out", "decay"), [(2, 11, 27, 0.7), (1, 16, 16, 1), (3, 32, 90, 0.3)]
)
def test_bh4_is_known_however_it_is_laid_out(repeats, n_in, n_out, decay):
    width = ops.next_power_of_two(n_in)
    w = models.rng(2).normal(size=(repeats, 4, 4, width // 4, width // 4))

    def one(blocks: np.ndarray) -> list[ops.Op]:
        pairs = [[BlockDiag(b.swapaxes(1, 2)), WalshHadamard(width)] for b in blocks]
        return [f for pair in pairs for f in pair]

    wide = width * repeats
    places = [ops.pad(width, wide) and (Pad(width, wide, r * width),) for r in range(repeats)]
    mixed = product(add(*(product(*one(b), *p) for b, p in zip(w, places, strict=True))))
    copied = product(add(*(product(*p) for p in places)) if repeats > 1 else scaling(width, 1.0),
                     scaling(wide, 1 - decay))  # fmt: skip
    total = add(product(mixed, scaling(wide, decay)), *([copied] if decay < 1 else []))
    op = product(*ops.pad(n_in, width), total, *ops.crop(wide, n_out))
    want = bh4(w, n_in, n_out, decay=decay)
    for spelled in (op, want):
        known = known_form(simplify(spelled))
        assert known.name == "bh4"
        assert known.parameters == {"b": width // 4, "repeats": repeats, "decay": decay}
        check(known.op, want)
