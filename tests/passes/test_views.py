"""Loops behind layout operators: what they show equals what numpy computes."""

from __future__ import annotations

import numpy as np
import pytest
from tvm import relax

from tests import models
from tests.relax_modules import R, const, module
from tvmstruct.passes.factors import (
    Factor,
    contiguous,
    join,
    join_all,
    merge,
    number,
    regroup,
    shape_of,
)
from tvmstruct.passes.views import arrange_array, view
from tvmstruct.rewrite import Graph


def test_a_reshape_splits_and_joins_loops():
    axes = contiguous("x", (4, 6))
    assert shape_of(regroup(axes, (2, 12))) == (2, 12)
    assert regroup(axes, (24,)) == [(Factor(24, {"x": 1}),)]
    turned = axes[::-1]
    assert regroup(turned, (24,)) == [(Factor(6, {"x": 1}), Factor(4, {"x": 6}))]
    assert regroup(turned, (8, 3)) is None  # 8 is neither 6 times anything nor a part of 6
    assert shape_of(regroup(turned, (2, 3, 1, 4))) == (2, 3, 1, 4)


def test_axes_meet_where_their_loops_nest():
    a, b = (Factor(6, {"a": 1}),), (Factor(2, {"b": 1}), Factor(3, {"b": 7}))
    assert join(a, b) == (Factor(2, {"a": 3, "b": 1}), Factor(3, {"a": 1, "b": 7}))
    assert join((), b) == b
    assert (
        join((Factor(2, {"a": 3}), Factor(3, {"a": 8})), (Factor(3, {"b": 2}), Factor(2, {})))
        is None
    )
    assert join_all([a], [(), a]) == [(), a]


def test_loops_of_one_stride_are_merged():
    loops = [Factor(2, {"a": 12, "b": 6}), Factor(3, {"a": 4, "b": 2}), Factor(4, {"a": 1})]
    assert merge(loops) == [Factor(6, {"a": 4, "b": 2}), Factor(4, {"a": 1})]
    assert number("s", [(Factor(3),), (), (Factor(2),)])[0] == (Factor(3, {"s": 2}),)


def random_step(rng, shape):
    """Return a layout operator for a tensor of ``shape`` and the same in numpy."""
    kind = rng.integers(6)
    axis = int(rng.integers(len(shape)))
    if kind == 0:
        order = [int(a) for a in rng.permutation(len(shape))]
        return (lambda x: R.permute_dims(x, order)), lambda a: a.transpose(order)
    if kind == 1:
        size = int(np.prod(shape))
        cuts = [d for d in range(1, size + 1) if size % d == 0]
        first = int(rng.choice(cuts))
        rest = [d for d in cuts if (size // first) % d == 0]
        second = int(rng.choice(rest))
        new = (first, second, size // first // second)
        return (lambda x: R.reshape(x, new)), lambda a: a.reshape(new)
    if kind == 2:
        return (lambda x: R.expand_dims(x, axis)), lambda a: np.expand_dims(a, axis)
    if kind == 3:
        new = (2, *(3 if n == 1 else n for n in shape))
        return (lambda x: R.broadcast_to(x, new)), lambda a: np.broadcast_to(a, new)
    if kind == 4:
        return (lambda x: R.repeat(x, 2, axis)), lambda a: np.repeat(a, 2, axis)
    counts = [2 if i == axis else 1 for i in range(len(shape))]
    return (lambda x: R.tile(x, counts)), lambda a: np.tile(a, counts)


@pytest.mark.parametrize("seed", range(40))
def test_random_chains(seed):
    rng = models.rng(seed)
    start = tuple(int(n) for n in rng.choice([1, 2, 3, 4, 6], 3))
    value = want = np.arange(np.prod(start), dtype=np.float32).reshape(start)

    def body(emit, x):
        nonlocal want
        for _ in range(5):
            step, same = random_step(rng, want.shape)
            if want.size > 2000 or want.ndim > 5:
                break
            x, want = emit(step(x)), same(want)
        return x

    mod = module(body, start)
    graph, func = Graph(mod["main"]), mod["main"]
    found = view(graph, func.body.body, "x")
    assert shape_of(found.axes) == want.shape
    if found.root.same_as(func.params[0]):
        np.testing.assert_array_equal(arrange_array(value, "x", found.axes), want)


def test_scales_are_peeled_only_where_asked():
    def body(emit, x):
        return R.permute_dims(emit(R.divide(emit(R.multiply(const(3.0), x)), const([4.0]))))

    mod = module(body, (2, 5))
    graph, func = Graph(mod["main"]), mod["main"]
    found = view(graph, func.body.body, "x", scales=True)
    assert found.root.same_as(func.params[0])
    assert found.scale == 0.75
    assert view(graph, func.body.body, "x").scale == 1.0


@pytest.mark.parametrize(
    ("index", "seen"),
    [
        ([0, 0, 1, 1, 2, 2], True),
        ([0, 1, 2, 0, 1, 2], True),
        ([0, 1, 1, 2, 2, 0], False),
        (1, False),
    ],
    ids=str,
)
def test_a_gather_of_every_row_is_a_repetition(index, seen):
    mod = module(lambda emit, x: R.take(x, relax.const(np.array(index)), 1), (2, 3, 4))
    func = mod["main"]
    found = view(Graph(func), func.body.body, "x")
    assert found.root.same_as(func.params[0]) == seen
    if seen:
        array = np.arange(24).reshape(2, 3, 4)
        np.testing.assert_array_equal(arrange_array(array, "x", found.axes), array[:, index])
