"""A softmax that is written out is put back together, and nothing that only looks like one."""

from __future__ import annotations

import pytest

from tests.relax_modules import R, check_compiled, module, operators, transform
from tvmstruct.passes.recognize_softmax import RecognizeSoftmax


def softmax(emit, x, *, axis=-1, shift=True, keepdims=True, over=None):
    top = emit(R.max(x, [axis], keepdims=True))
    weights = emit(R.exp(emit(R.subtract(x, top)) if shift else x))
    total = emit(R.sum(weights, [axis if over is None else over], keepdims=keepdims))
    return R.divide(weights, total)


@pytest.mark.parametrize("axis", [-1, 0, 1])
def test_softmax(axis):
    mod = module(lambda emit, x: softmax(emit, x, axis=axis), (3, 4, 4))
    after, _ = transform(mod, RecognizeSoftmax())
    assert operators(after) == ["relax.nn.softmax"]
    check_compiled(mod)


@pytest.mark.parametrize(
    "changes", [{"shift": False}, {"over": 1}, {"keepdims": False}], ids=lambda c: next(iter(c))
)
def test_what_is_none(changes):
    mod = module(lambda emit, x: softmax(emit, x, **changes), (4, 4, 4))
    after, _ = transform(mod, RecognizeSoftmax())
    assert "relax.nn.softmax" not in operators(after)
