"""DynamicQuantizeLSTM: what ONNX Runtime computes, in numpy and compiled."""

from dataclasses import dataclass
from unittest import mock

import numpy as np
import pytest
from onnx import TensorProto, helper

import tvmstruct
from tests.models import make_model, rng, run_onnx, value
from tvmstruct.errors import ModelError, UnsupportedOperatorError
from tvmstruct.frontends.onnx_quantized_lstm import DOMAIN, NAME
from tvmstruct.schedules.x86 import recurrence
from tvmstruct.testing import tolerance

STEPS, BATCH, N, H = 6, 3, 9, 7


@dataclass(frozen=True)
class Layer:
    """One ``DynamicQuantizeLSTM`` of random weights and what it is asked for."""

    sides: int = 1
    columns: bool = False
    dtype: str = "int8"
    zero: int | None = None  # of uint8; None: that of symmetric weights
    batch: int = BATCH
    h: int = H
    lengths: tuple[int, ...] = ()
    states: bool = False
    peepholes: bool = False
    more: tuple[tuple[str, object], ...] = ()  # attributes

    def arrays(self) -> dict[str, np.ndarray]:
        """Return the constants."""
        draw, h, d = rng(5), self.h, self.sides
        low, high = (-127, 128) if self.dtype == "int8" else (0, 256)
        arrays = {
            "w": draw.integers(low, high, (d, N, 4 * h)).astype(self.dtype),
            "r": draw.integers(low, high, (d, h, 4 * h)).astype(self.dtype),
            "b": draw.normal(size=(d, 8 * h)).astype(np.float32),
        }
        for name in "wr":
            shape = (d, 4 * h) if self.columns else (d,)
            arrays[f"{name}_scale"] = draw.uniform(0.003, 0.009, shape).astype(np.float32)
            symmetric = 0 if self.dtype == "int8" else 128
            zero = symmetric if self.zero is None else self.zero
            arrays[f"{name}_zero"] = np.full(shape, zero, self.dtype)
        if self.peepholes:
            arrays["p"] = draw.normal(size=(d, 3 * h)).astype(np.float32)
        return arrays | ({"lengths": np.int32(self.lengths)} if self.lengths else {})

    def model(self, change=None):
        """Return the model and its arrays; ``change(arrays)`` breaks them."""
        arrays = self.arrays()
        if change is not None:
            change(arrays)
        inputs = [value(k, a.shape) for k, a in self.feeds().items()]
        has = {*arrays, "x", *(["h0", "c0"] if self.states else [])}
        names = [
            "x", "w", "r", "b", "lengths", "h0", "c0", "p", "w_scale", "w_zero", "r_scale",
            "r_zero",
        ]  # fmt: skip
        given = [n if n in has or n[0] in "wr" else "" for n in names]
        direction = "bidirectional" if self.sides == 2 else "forward"
        attributes = {"hidden_size": self.h, "direction": direction, **dict(self.more)}
        node = helper.make_node(
            NAME, given, ["y", "h", "c"], name="rnn", domain=DOMAIN, **attributes
        )
        outputs = [value(o, None) for o in ("y", "h", "c")]
        model = make_model([node], inputs, outputs, arrays)
        model.opset_import.append(helper.make_opsetid(DOMAIN, 1))
        return model, arrays

    def feeds(self) -> dict[str, np.ndarray]:
        """Return random x and states, some over 1."""
        draw, state = rng(1).normal, (self.sides, self.batch, self.h)
        shapes = {"x": (STEPS, self.batch, N)}
        shapes |= {"h0": state, "c0": state} if self.states else {}
        return {k: draw(size=s).astype(np.float32) for k, s in shapes.items()}


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
    layer = Layer(columns=columns, dtype=dtype)
    model, arrays = layer.model()
    feeds = layer.feeds()
    np.testing.assert_allclose(
        reference(arrays, feeds["x"]), run_onnx(model, feeds)[0][:, 0], atol=1e-5
    )


LAYERS = [
    Layer(),
    Layer(sides=2, columns=True, batch=1, h=35),
    Layer(dtype="uint8", columns=True, states=True),
    Layer(dtype="uint8", zero=97, sides=2, batch=5, h=16),
    Layer(dtype="int8", zero=-31, h=21),
    Layer(sides=2, peepholes=True, states=True, lengths=(3, 0, 5), h=18),
    Layer(batch=2, lengths=(1, 2), more=(("clip", 0.4), ("input_forget", 1))),
]


@pytest.mark.isa("avx2")  # with FMA, as ONNX Runtime has it then
@pytest.mark.parametrize("layer", LAYERS, ids=str)
def test_equals_onnx_runtime_bit_for_bit(layer):
    model, _ = layer.model()
    feeds = layer.feeds()
    compiled = tvmstruct.compile(tvmstruct.from_onnx(model))
    for a, b in zip(compiled.run(feeds).values(), run_onnx(model, feeds), strict=True):
        np.testing.assert_array_equal(a, b)
    assert {r.form for r in compiled.report().layers if r.params} == {"dense dynamic-int8"}


@pytest.mark.isa("avx2")
@pytest.mark.parametrize("batch", [1, 3])
def test_threads_do_not_share_a_step_of_rounded_states(batch):
    layer = Layer(batch=batch, h=43, dtype="uint8", zero=97)
    model, _ = layer.model()
    feeds = layer.feeds()
    with mock.patch.object(recurrence, "PHASE_MACS", 0):
        compiled = tvmstruct.compile(tvmstruct.from_onnx(model), threads=2)
        many = [compiled.run(feeds) for _ in range(50)]  # a race once gave other numbers at times
    want = run_onnx(model, feeds)
    for got in many:
        for a, b in zip(got.values(), want, strict=True):
            np.testing.assert_array_equal(a, b)


def test_other_activations_differ_by_float_rounding_alone():
    names = ("Relu", "HardSigmoid", "Softsign")
    layer = Layer(h=18, more=(("activations", names),))
    model, _ = layer.model()
    feeds = layer.feeds()
    got = tvmstruct.compile(tvmstruct.from_onnx(model)).run(feeds)
    for a, b in zip(got.values(), run_onnx(model, feeds), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4)


@pytest.mark.isa("avx2")
@pytest.mark.parametrize("layer", LAYERS[1:4:2], ids=str)
def test_equals_onnx_runtime_without_an_instruction_for_bytes(layer):
    model, _ = layer.model()
    source = tvmstruct.from_onnx(model)
    assert {d for n, d in source.stored_dtypes.items() if n[0] in "wr"} == {layer.dtype}
    got = tvmstruct.compile(source, "llvm -mcpu=x86-64-v3").run(layer.feeds())
    for a, b in zip(got.values(), run_onnx(model, layer.feeds()), strict=True):
        np.testing.assert_array_equal(a, b)


def test_a_plan_replaces_integers_by_a_form():
    model, _ = Layer(h=8).model()
    entry = {"family": "low_rank", "parameters": {"r": 2}}
    plan = {"version": 1, "layers": {"r": entry}}
    compiled = tvmstruct.compile(tvmstruct.from_onnx(model), plan=plan)
    forms = {r.name: r.form for r in compiled.report().layers}
    assert (forms["r"], forms["w"]) == ("low_rank", "dense dynamic-int8")


@pytest.mark.isa("avx2")
def test_steps_are_not_padded():
    """Padding would be part of the tensor whose range the scale is of."""
    layer = Layer()
    arrays = layer.arrays() | {"last": np.array([2], np.int64)}
    names = ["masked", "w", "r", "b", "", "", "", "", "w_scale", "w_zero", "r_scale", "r_zero"]
    nodes = [
        helper.make_node("Transpose", ["attention_mask"], ["turned"], perm=[1, 0]),
        helper.make_node("Cast", ["turned"], ["ones"], to=TensorProto.FLOAT),
        helper.make_node("Unsqueeze", ["ones", "last"], ["mask"]),
        helper.make_node("Mul", ["x", "mask"], ["masked"]),
        helper.make_node(NAME, names, ["y"], domain=DOMAIN, hidden_size=H, direction="forward"),
        helper.make_node("Squeeze", ["y", "one"], ["out"]),
    ]
    inputs = [
        value("x", ["steps", 2, N]),
        value("attention_mask", [2, "steps"], TensorProto.INT64),
    ]
    outputs = [value("out", ["steps", 2, H])]
    model = make_model(nodes, inputs, outputs, arrays | {"one": np.array([1], np.int64)})
    model.opset_import.append(helper.make_opsetid(DOMAIN, 1))
    compiled = tvmstruct.compile(tvmstruct.from_onnx(model))
    feeds = {
        "x": rng(2).normal(size=(9, 2, N)).astype(np.float32),
        "attention_mask": np.ones((2, 9), np.int64),
    }
    np.testing.assert_array_equal(compiled.run(feeds)["out"], run_onnx(model, feeds)[0])
    assert "steps: exact sizes (activations are rounded" in " ".join(compiled.padder.notes)


@pytest.mark.isa("avx2")
def test_a_saved_model_keeps_its_integers(tmp_path):
    layer = Layer(columns=True)
    model, _ = layer.model()
    tvmstruct.compile(tvmstruct.from_onnx(model)).save(tmp_path / "model.tvms")
    got = tvmstruct.load(tmp_path / "model.tvms").run(layer.feeds())
    for a, b in zip(got.values(), run_onnx(model, layer.feeds()), strict=True):
        np.testing.assert_array_equal(a, b)


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
    model, _ = Layer().model(change)
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
