"""Convolutions over time as dense layers, against PyTorch."""

import numpy as np
import pytest
import torch
from tvm import relax

import tvmstruct
from tests.relax_modules import const, module
from tvmstruct.testing import tolerance

R = relax.op
BATCH, CHANNELS, LENGTH, OUTPUTS = 2, 3, 17, 5


def weight(groups=1, width=4):
    rng = np.random.default_rng(width)
    return rng.normal(size=(OUTPUTS if groups == 1 else 6, CHANNELS // groups, width)) / 3


def compiled(w, tail=lambda emit, y: y, **options):
    def body(emit, x):
        return tail(emit, emit(R.nn.conv1d(x, const(w), **options)))

    return tvmstruct.compile(module(body, (BATCH, CHANNELS, LENGTH)))


def forms(model):
    return [layer.form for layer in model.report().layers]


@pytest.mark.parametrize(
    ("stride", "padding", "dilation", "width"),
    [(1, 0, 1, 4), (2, (3, 1), 1, 4), (3, 2, 2, 3), (1, 0, 1, 1), (5, 0, 1, 17)],
)
def test_agrees_with_torch(stride, padding, dilation, width):
    w, x = weight(width=width), np.random.default_rng(0).normal(size=(BATCH, CHANNELS, LENGTH))
    left, right = (padding, padding) if isinstance(padding, int) else padding
    model = compiled(w, strides=stride, padding=[left, right], dilation=dilation)
    padded = torch.nn.functional.pad(torch.from_numpy(x), (left, right))
    want = torch.nn.functional.conv1d(padded, torch.from_numpy(w), stride=stride, dilation=dilation)
    bound = tolerance("float32", CHANNELS * width)
    np.testing.assert_allclose(model(x.astype(np.float32)), want.numpy(), **bound)
    assert forms(model)[:1] == ["dense"]


def test_bias_and_relu_go_along():
    w, x = weight(), np.random.default_rng(1).normal(size=(BATCH, CHANNELS, LENGTH))
    bias = np.random.default_rng(2).normal(size=(1, OUTPUTS, 1)).astype(np.float32)
    model = compiled(w, lambda emit, y: R.nn.relu(emit(R.add(y, const(bias)))), strides=2)
    want = torch.nn.functional.conv1d(
        torch.from_numpy(x), torch.from_numpy(w), torch.from_numpy(bias.reshape(-1)).double(), 2
    )
    bound = tolerance("float32", CHANNELS * 4)
    np.testing.assert_allclose(model(x.astype(np.float32)), want.relu().numpy(), **bound)


def test_what_stays_a_convolution():
    grouped = compiled(weight(groups=3), groups=3)
    assert "dense" not in forms(grouped)
    x = np.random.default_rng(3).normal(size=(BATCH, CHANNELS, LENGTH)).astype(np.float32)
    want = torch.nn.functional.conv1d(
        torch.from_numpy(x), torch.from_numpy(weight(groups=3)).float(), groups=3
    )
    np.testing.assert_allclose(grouped(x), want.numpy(), **tolerance("float32", 4))
