"""Convolutions along one axis as products; padding in every mode; against ONNX Runtime."""

import numpy as np
import pytest
from onnx import helper

import tvmstruct
from tests.models import make_model, rng, run_module, run_onnx, value, weight
from tvmstruct.errors import ModelError
from tvmstruct.testing import tolerance


def convolution(out, channels, taps, length, *, batch=3, bias=True, **attributes):
    arrays = {"w": weight(out, channels, taps, seed=1)}
    arrays |= {"b": weight(out, seed=2)} if bias else {}
    node = helper.make_node("Conv", ["x", *arrays], ["y"], name="conv", **attributes)
    x = value("x", [batch, channels, length])
    return make_model([node], [x], [value("y", None)], arrays)


def assert_same(model, inner):
    source = tvmstruct.from_onnx(model)
    shape = source.inputs[0].shape
    x = rng(3).normal(size=shape).astype(np.float32)
    (want,) = run_onnx(model, {"x": x})
    assert source.outputs[0].shape == want.shape
    np.testing.assert_allclose(run_module(source.at(), [x])[0], want, **tolerance("float32", inner))
    return source


@pytest.mark.parametrize(
    "model",
    [
        convolution(18, 7, 3, 11, pads=[1, 1]),
        convolution(18, 7, 3, 11, pads=[2, 0], strides=[2]),
        convolution(18, 1, 8, 30, strides=[4], bias=False),  # windows in two pieces, a rest
        convolution(18, 3, 4, 12, strides=[4], kernel_shape=[4]),  # side by side
        convolution(18, 3, 2, 13, strides=[5], batch=1),  # gaps between windows
        convolution(18, 5, 1, 6),
        convolution(18, 5, 3, 3),  # one position
    ],
    ids=["same", "stride", "pieces", "side by side", "gaps", "one tap", "one position"],
)
def test_products_equal_convolutions(model):
    source = assert_same(model, 40)
    weights = source.weights
    assert weights["w"].ndim == 2
    assert len(weights) == len(model.graph.initializer)


@pytest.mark.parametrize(
    "model",
    [
        convolution(18, 6, 3, 11, dilations=[2]),
        convolution(18, 6, 3, 11, auto_pad="SAME_UPPER"),
    ],
    ids=["dilation", "automatic padding"],
)
def test_others_stay_convolutions(model):
    assert assert_same(model, 40).weights["w"].ndim == 3


def test_a_window_longer_than_the_input_is_named():
    with pytest.raises(ModelError, match=r"Conv.*conv.*\(3, 7, 2\); want \(batch, 7, 3 or more\)"):
        tvmstruct.from_onnx(convolution(18, 7, 3, 2))


def test_channels_that_do_not_fit_are_named():
    model = convolution(18, 7, 3, 9)
    model.graph.input[0].CopyFrom(value("x", [3, 6, 9]))
    with pytest.raises(ModelError, match=r"Conv.*want \(batch, 7, 3 or more\)"):
        tvmstruct.from_onnx(model)


@pytest.mark.parametrize("mode", ["constant", "reflect", "edge"])
def test_every_mode_of_padding(mode):
    node = helper.make_node("Pad", ["x", "pads"], ["y"], mode=mode)
    pads = {"pads": np.array([0, 2, 0, 3], np.int64)}
    assert_same(make_model([node], [value("x", [2, 10])], [value("y", None)], pads), 1)
