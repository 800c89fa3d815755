"""Parts of an operator's outputs share no multiply-adds, and side by side they are the whole."""

import numpy as np
import pytest

from tests.catalogue import EXPRESSIONS
from tvmstruct import families, ops
from tvmstruct.op_text import NODES
from tvmstruct.parts import lower_parts, output_parts
from tvmstruct.stages import lower
from tvmstruct.testing import tolerance

CUTS = {
    (name, count): output_parts(op, count) for name, op in EXPRESSIONS.items() for count in (2, 3)
}
FOUND = {key: parts for key, parts in CUTS.items() if parts is not None}


def repeats(rng, n_in: int = 32, n_out: int = 64, b: int = 8) -> ops.Op:
    shape = (-(-n_out // 32), 4, 32 // b, b, b)
    return families.bh4(rng.normal(size=shape), n_in, n_out)


@pytest.mark.parametrize("key", FOUND, ids=str)
def test_side_by_side_they_are_the_operator(key, rng):
    op, parts = EXPRESSIONS[key[0]], FOUND[key]
    x = rng.normal(size=(3, op.n_in))
    want = op.apply(x)
    found = np.concatenate([part.apply(x) for part in parts], axis=-1)
    scale = max(1.0, float(np.abs(op.apply(np.abs(x))).max()))
    np.testing.assert_allclose(found, want, **tolerance("float64", op.n_in, scale=scale))
    assert sum(part.macs for part in parts) <= op.macs


def test_every_node_but_one_falls_into_parts_somewhere():
    kinds = {type(EXPRESSIONS[name]) for name, _ in FOUND}
    assert kinds == set(NODES.values()) - {ops.Pad}  # below


def test_parts_of_a_padding_within_its_features_and_out_of_them(rng):
    op = ops.add(ops.Pad(6, 12), ops.Pad(6, 12, start=6))
    parts = output_parts(op, 4)
    assert parts is not None
    x = rng.normal(size=(2, 6))
    np.testing.assert_array_equal(np.concatenate([p.apply(x) for p in parts], -1), op.apply(x))
    assert output_parts(ops.Pad(7, 12, start=1), 2) is None


@pytest.mark.parametrize(("n_in", "b"), [(32, 8), (32, 4), (27, 8)])
def test_repeats_of_bh4_are_parts(n_in, b, rng):
    op = repeats(rng, n_in, 64, b)
    parts = output_parts(op, 2)
    assert parts is not None
    x = rng.normal(size=(5, n_in))
    found = np.concatenate([part.apply(x) for part in parts], axis=-1)
    np.testing.assert_allclose(found, op.apply(x), rtol=1e-12, atol=1e-12)
    assert [2 * part.macs for part in parts] == [op.macs] * 2
    program = lower_parts(op, 8, 2)
    assert (program.parts, program.n_out) == (2, 64)
    assert [2 * program.words(i) for i in range(4)] == [w.size for w in program.weights[:4]]


def test_work_that_all_outputs_need_is_not_done_twice(rng):
    low_rank = ops.Dense(rng.normal(size=(12, 3))) @ ops.Dense(rng.normal(size=(3, 8)))
    assert output_parts(low_rank, 2) is None
    assert output_parts(repeats(rng, 32, 64) @ ops.WalshHadamard(64), 2) is None


def test_a_crop_through_a_repeat_is_left_whole(rng):
    op = repeats(rng, 32, 60)
    assert output_parts(op, 2) is None
    assert lower_parts(op, 8, 2).key == lower(op, 8).key


def test_a_short_program_is_left_whole(rng):
    op = ops.BlockDiag(rng.normal(size=(4, 8, 8)))
    assert output_parts(op, 2) is not None
    assert lower_parts(op, 8, 2).parts == 1


def test_more_threads_than_parts_leave_it_whole(rng):
    assert lower_parts(repeats(rng), 8, 16).parts == 1
