"""Results in another shape: views where a kernel wrote them for that, else copies."""

import numpy as np
import pytest
from tvm import relax

import tvmstruct
from tests.relax_modules import const, module
from tvmstruct.testing import tolerance

R = relax.op
RNG = np.random.default_rng(0)
W = RNG.normal(size=(6, 8)) / 3


def dense(emit, x):
    return emit(R.matmul(x, const(W)))


def split(value):
    return R.reshape(value, (2, 2, 8))


def both_shapes(emit, x):
    y = dense(emit, x)
    return y, emit(split(y))


def two_results(emit, x, other):
    relu = emit(R.nn.relu(dense(emit, other)))
    return emit(split(dense(emit, x))), emit(R.reshape(relu, (8, 4)))


BODIES = {
    "one": (lambda emit, x: split(dense(emit, x)), 1),
    "two": (two_results, 2),
    "both shapes": (both_shapes, 0),
    "an input": (lambda emit, x: R.reshape(x, (2, 12)), 0),
    "read again": (lambda emit, x: emit(R.sum(emit(split(dense(emit, x))), axis=[0])), 0),
}


@pytest.mark.parametrize("name", BODIES)
def test_results_share_no_memory_but_their_own(name) -> None:
    body, views = BODIES[name]
    inputs = RNG.normal(size=(1 + (name == "two"), 4, 6)).astype(np.float32)
    model = tvmstruct.compile(module(body, *[(4, 6)] * len(inputs)))
    x = inputs[0]
    results = model(*inputs)
    results = results if isinstance(results, (list, tuple)) else [results]
    y = x @ W
    want = {
        "one": [y],
        "two": [y, np.maximum(inputs[-1] @ W, 0)],
        "both shapes": [y, y],
        "an input": [x],
        "read again": [y.reshape(2, 2, 8).sum(0)],
    }[name]
    arrays = [*inputs, *results]
    for i, a in enumerate(arrays):
        assert not any(np.shares_memory(a, b) for b in arrays[:i])
    for result, value in zip(results, want, strict=True):
        np.testing.assert_allclose(result.reshape(-1), value.reshape(-1), **tolerance("float32", 6))
    (bucket,) = model.buckets.values()
    assert str(bucket.lowered.mod["main"]).count('"vm.builtin.reshape"') == views
