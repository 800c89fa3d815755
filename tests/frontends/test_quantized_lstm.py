"""DynamicQuantizeLSTM: what ONNX Runtime computes, and how near float activations come to it."""

import numpy as np
import pytest
from onnx import helper

import tvmstruct
from tests.models import make_model, rng, run_onnx, value
from tvmstruct.errors import ModelError, UnsupportedOperatorError
from tvmstruct.testing import tolerance

STEPS, BATCH, N, H = 6, 3, 9, 7


def quantized(*, sides=1, columns=False, dtype="int8", change=None):
    """Return a model and its arrays; ``change(arrays)`` breaks them."""
    draw = rng(5)
    low, high = (-127, 128) if dtype == "int8" else (0, 256)
    arrays = {
        "w": draw.integers(low, high, (sides, N, 4 * H)).astype(dtype),
        "r": draw.integers(low, high, (sides, H, 4 * H)).astype(dtype),
        "b": draw.normal(size=(sides, 8 * H)).astype(np.float32),
    }
    for name in "wr":
        shape = (sides, 4 * H) if columns else (sides,)
        arrays[f"{name}_scale"] = draw.uniform(0.003, 0.009, shape).astype(np.float32)
        arrays[f"{name}_zero"] = np.full(shape, 0 if dtype == "int8" else 128, dtype)
    if change is not None:
        change(arrays)
    names = ["x", "w", "r", "b", "", "", "", "", "w_scale", "w_zero", "r_scale", "r_zero"]
    node = helper.make_node(
        "DynamicQuantizeLSTM", names, ["y", "h", "c"], name="rnn", domain="com.microsoft",
        hidden_size=H, direction="bidirectional" if sides == 2 else "forward",
    )  # fmt: skip
    outputs = [value(o, None) for o in ("y", "h", "c")]
    model = make_model([node], [value("x", [STEPS, BATCH, N])], outputs, arrays)
    model.opset_import.append(helper.make_opsetid("com.microsoft", 1))
    return model, arrays


def rounded(a):
    """Return ``a`` as ONNX Runtime's 8-bit integers less their zero point, and their scale."""
    low, high = min(a.min(), 0), max(a.max(), 0)
    scale = np.float32(high - low) / np.float32(255) or np.float32(1)
    zero = np.clip(np.rint(-low / scale), 0, 255)
    return np.clip(np.rint(a / scale) + zero, 0, 255) - zero, scale


def reference(arrays, x):
    """Return y of one direction: x is rounded once, h once for each step, rows together."""

    def matrix(name):
        return arrays[name][0].astype(np.float32) - arrays[f"{name}_zero"][0]

    def sigmoid(v):
        return 1 / (1 + np.exp(-v))

    w, r = matrix("w"), matrix("r")
    bias = arrays["b"][0].reshape(2, -1).sum(0)
    values, scale = rounded(x)
    z = values @ w * (scale * arrays["w_scale"][0])
    h = c = np.zeros((x.shape[1], H), np.float32)
    y = []
    for step in z:
        values, scale = rounded(h)
        total = step + values @ r * (scale * arrays["r_scale"][0]) + bias
        i, o, f, g = np.split(total, 4, 1)
        c = sigmoid(f) * c + sigmoid(i) * np.tanh(g)
        h = sigmoid(o) * np.tanh(c)
        y.append(h)
    return np.stack(y)


@pytest.mark.parametrize("columns", [False, True])
@pytest.mark.parametrize("dtype", ["int8", "uint8"])
def test_what_onnx_runtime_computes(columns, dtype):
    model, arrays = quantized(columns=columns, dtype=dtype)
    x = rng(1).normal(size=(STEPS, BATCH, N)).astype(np.float32)
    np.testing.assert_allclose(reference(arrays, x), run_onnx(model, {"x": x})[0][:, 0], atol=1e-5)


@pytest.mark.parametrize(
    ("sides", "columns", "dtype"), [(2, False, "int8"), (2, True, "int8"), (1, False, "uint8")]
)
def test_float_activations_come_near(sides, columns, dtype):
    model, _ = quantized(sides=sides, columns=columns, dtype=dtype)
    source = tvmstruct.from_onnx(model)
    assert {d for n, d in source.stored_dtypes.items() if n[0] in "wr"} == {dtype}
    x = rng(1).normal(size=(STEPS, BATCH, N)).astype(np.float32)
    got = tvmstruct.compile(source).run({"x": x})
    for a, b in zip(got.values(), run_onnx(model, {"x": x}), strict=True):
        np.testing.assert_allclose(a, b, atol=0.05)


def halved(arrays):
    arrays["w"] = arrays["w"].astype(np.float16)


def one_scale(arrays):
    arrays["r_scale"] = np.float32([0.1, 0.2, 0.3])


def no_scale(arrays):
    del arrays["w_scale"]


@pytest.mark.parametrize(
    ("change", "error", "why"),
    [
        (halved, ModelError, "'rnn': 'w' is float16"),
        (one_scale, ModelError, r"scale \(3,\) and zero point \(1,\) of 'r' must both"),
        (no_scale, UnsupportedOperatorError, r"'rnn': \['w_scale'\] are no constants"),
    ],
)
def test_broken_weights_are_named(change, error, why):
    model, _ = quantized(change=change)
    if change is no_scale:
        model.graph.input.append(value("w_scale", [1]))
    with pytest.raises(error, match=why):
        tvmstruct.from_onnx(model)


def test_dense_weights_of_8_bits_compile():
    arrays = {
        "w": rng(0).integers(-127, 128, (24, 40)).astype(np.int8),
        "scale": np.array(0.01, np.float32), "zero": np.array(0, np.int8),
    }  # fmt: skip
    nodes = [
        helper.make_node("DequantizeLinear", ["w", "scale", "zero"], ["float"]),
        helper.make_node("MatMul", ["x", "float"], ["y"]),
    ]
    model = make_model(nodes, [value("x", [3, 24])], [value("y", None)], arrays)
    x = rng(1).normal(size=(3, 24)).astype(np.float32)
    got = tvmstruct.compile(tvmstruct.from_onnx(model))(x)
    want = x @ (arrays["w"] * np.float32(0.01))  # ONNX Runtime rounds x to 8 bits here
    np.testing.assert_allclose(got, want, **tolerance("float32", 24))
