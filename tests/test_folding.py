"""Folding changes no operator and leaves fewer levels of butterflies."""

import numpy as np
import pytest

from tests.catalogue import EXPRESSIONS
from tvmstruct import ops
from tvmstruct.families import bh4
from tvmstruct.folding import fold
from tvmstruct.stages import Copy, Hadamard, MatMul, Y, lower
from tvmstruct.testing import tolerance


@pytest.mark.parametrize("name", EXPRESSIONS)
def test_keeps_every_operator(name):
    op = EXPRESSIONS[name]
    want, found = op.to_dense(), fold(op).to_dense()
    scale = max(1.0, float(np.abs(want).max()))
    np.testing.assert_allclose(found, want, **tolerance("float64", op.n_in, scale=scale))


def test_takes_the_transform_within_blocks_into_their_weights(rng):
    op = ops.BlockDiag(rng.normal(size=(8, 4, 4))) @ ops.WalshHadamard(32, 0.25)
    folded = fold(op)
    assert isinstance(folded, ops.Product)
    block, rest = folded.factors
    assert isinstance(block, ops.BlockDiag)
    assert isinstance(rest, ops.WalshHadamard)
    assert (rest.n, rest.inner, rest.scale) == (8, 4, 1.0)
    assert folded.adds == 3 * 32


def test_a_transform_within_blocks_vanishes(rng):
    op = ops.WalshHadamard(4, blocks=6) @ ops.BlockDiag(rng.normal(size=(2, 12, 5)))
    assert isinstance(fold(op), ops.BlockDiag)


def test_odd_blocks_take_nothing(rng):
    op = ops.BlockDiag(rng.normal(size=(4, 3, 4))) @ ops.WalshHadamard(16, blocks=1)
    odd = ops.WalshHadamard(4, blocks=3) @ ops.BlockDiag(rng.normal(size=(4, 3, 4)))
    assert fold(op).adds == 2 * 16
    assert fold(odd).adds == odd.adds


@pytest.mark.parametrize("repeats", [1, 2, 3])
def test_bh4_is_products_and_transforms_without_copies(repeats, rng):
    op = bh4(rng.normal(size=(repeats, 4, 4, 16, 16)), 64, 64 * repeats)
    program = lower(op, 16)
    kinds = [type(stage) for stage in program.stages]
    assert Copy not in kinds
    assert kinds == [MatMul, Hadamard] * 4 + [Hadamard if repeats == 1 else MatMul]
    *_, last, residual = program.stages
    assert isinstance(last, Hadamard)
    assert isinstance(residual, MatMul | Hadamard)
    assert (last.dst, residual.dst, residual.accumulate) == (Y, Y, True)
