"""Attention takes in the dense layer that reads its heads, and nothing else."""

from __future__ import annotations

import numpy as np
import pytest

from tests import models
from tests.passes.test_merge_shared_input import F, H, attend, project
from tests.relax_modules import R, check_compiled, const, module

N, L = 64, 70
W = models.weight(F, N, seed=5)


def block(emit, x, between=lambda emit, y: y, read=None):
    y = attend(emit, *(project(emit, x, s, length=L, batch=1) for s in range(3)), out=(1, L, F))
    y = emit(between(emit, emit(y)))
    y = emit(R.add(emit(R.matmul(y, const(W))), const(models.weight(N, seed=6))))
    y = emit(R.add(y, const(np.linspace(-1, 1, N))))
    return y if read is None else read(emit, y)


def forms(body):
    model = check_compiled(module(body, (1, L, F)))
    return [(r.form, r.reason) for r in model.report().layers if r.form == "attention"]


def test_the_projection_joins_attention():
    ((_, reason),) = forms(block)
    assert "at once" in reason


def test_an_activation_keeps_them_apart():
    ((_, reason),) = forms(lambda emit, x: R.nn.relu(emit(block(emit, x))))
    assert "side by side" in reason


@pytest.mark.parametrize("heads", [H])
def test_something_between_keeps_them_apart(heads):
    ((_, reason),) = forms(lambda emit, x: block(emit, x, lambda emit, y: R.nn.relu(y)))
    assert "side by side" in reason
