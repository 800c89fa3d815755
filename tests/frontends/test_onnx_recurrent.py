"""ONNX LSTM, GRU and RNN: what is read of a node, against ONNX Runtime."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from onnx import helper

from tests.models import run_onnx
from tests.recurrent_models import COUNTS, Node, recurrent_model
from tvmstruct.errors import ModelError, UnsupportedOperatorError
from tvmstruct.frontends.onnx_recurrent import read_layer
from tvmstruct.testing import tolerance

SMOOTH = ("Tanh", "Sigmoid", "Softsign", "HardSigmoid", "ScaledTanh", "Affine", "LeakyRelu", "Elu")
KINKED = ("Relu", "ThresholdedRelu", "Softplus")


def apply_node(node, feeds):
    """Return y, h and c of a node as ONNX shapes them, in numpy."""
    arrays = node.arrays()
    layer = read_layer(node.proto(), arrays.get)
    x, h, c = (feeds.get(k) for k in ("x", "h", "c"))
    swap = layer.batch_first
    x, h, c = (None if a is None else a.swapaxes(0, 1) if swap else a for a in (x, h, c))
    sides = [
        r.apply(x, *(None if s is None else s[i] for s in (h, c)), arrays.get("lengths"))
        for i, r in enumerate(layer.directions)
    ]
    y, *states = (
        np.stack(s, 1 if i == 0 else 0)
        for i, s in enumerate(zip(*sides, strict=True))
        if s[0] is not None
    )
    y = y.transpose(2, 0, 1, 3) if swap else y
    return [y, *(s.swapaxes(0, 1) if swap else s for s in states)]


@st.composite
def nodes(draw):
    kind = draw(st.sampled_from(sorted(COUNTS)))
    direction = draw(st.sampled_from(["forward", "reverse", "bidirectional"]))
    sides = 2 if direction == "bidirectional" else 1
    activations, steps = None, draw(st.integers(1, 6))
    batch = draw(st.integers(1, 4))
    if draw(st.booleans()):
        name = st.sampled_from(SMOOTH + KINKED)
        count = COUNTS[kind] * sides
        activations = draw(st.lists(name, min_size=count, max_size=count))
    needs = {"Affine", "ScaledTanh", "ThresholdedRelu"}.intersection(activations or ())
    given = bool(needs) or (bool(activations) and draw(st.booleans()))
    lengths = st.lists(st.integers(0, steps), min_size=batch, max_size=batch)
    return Node(
        kind, direction, steps, batch, draw(st.integers(1, 7)), draw(st.integers(1, 5)),
        bias=draw(st.booleans()),
        peepholes=kind == "LSTM" and draw(st.booleans()),
        states=draw(st.booleans()),
        lengths=draw(st.none() | lengths),
        activations=activations,
        alpha=[0.3, 0.9, 0.5, 0.7, 1.2, 0.4] if given else None,
        beta=[0.2, 0.6, 0.4, 0.1, 0.5, 0.3] if given else None,
        clip=draw(st.none() | st.just(0.4)),
        coupled=kind == "LSTM" and draw(st.booleans()),
        reset_after=kind == "GRU" and draw(st.booleans()),
        seed=draw(st.integers(0, 99)),
    )  # fmt: skip


@settings(max_examples=300, deadline=None)
@given(nodes())
def test_nodes_mean_what_onnx_runtime_computes(node):
    feeds = node.feeds()
    if node.lengths and 0 in node.lengths and node.states:
        feeds = {k: a if k == "x" else np.zeros_like(a) for k, a in feeds.items()}
    want = run_onnx(recurrent_model(node), feeds)
    assume(all(np.abs(a).max() < 1e2 for a in want))  # some activations grow without bound
    for got, expected in zip(apply_node(node, feeds), want, strict=True):
        np.testing.assert_allclose(got, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", sorted(COUNTS))
@pytest.mark.parametrize("direction", ["forward", "reverse", "bidirectional"])
def test_batch_first_is_the_same_with_axes_swapped(kind, direction):
    node = Node(kind, direction, states=True)  # ONNX Runtime does not know layout 1
    first = replace(node, layout=1)
    feeds = node.feeds()
    y, *states = apply_node(first, {k: a.swapaxes(0, 1) for k, a in feeds.items()})
    want, *ends = run_onnx(recurrent_model(node), feeds)
    np.testing.assert_allclose(y.transpose(1, 2, 0, 3), want, **tolerance("float32", 7))
    for state, end in zip(states, ends, strict=True):
        np.testing.assert_allclose(state.swapaxes(0, 1), end, **tolerance("float32", 7))


@pytest.mark.parametrize("kind", ["LSTM", "GRU", "RNN"])
def test_a_row_of_length_zero_yields_zeros(kind):
    node = Node(kind, "bidirectional", states=True, lengths=[0, 2, 5])
    feeds = node.feeds()
    want = run_onnx(recurrent_model(node), feeds)
    for a, b in zip(apply_node(node, feeds), want, strict=True):
        assert not a[..., 0, :].any()
        np.testing.assert_allclose(a, b, **tolerance("float32", 7))


def broken(change, **attributes):
    """Return a node of these attributes whose arrays went through ``change``."""
    node = Node(**attributes)
    proto, arrays = node.proto(), node.arrays()
    change(proto, arrays)
    return proto, arrays


def no_weight(proto, arrays):
    del arrays["w"]


def no_input(proto, arrays):
    proto.input[1] = ""


def short_weight(proto, arrays):
    arrays["r"] = arrays["r"][:, :-1]


def double_weight(proto, arrays):
    arrays["w"] = arrays["w"].astype(np.float64)


def set_attribute(**values):
    def change(proto, arrays):
        kept = [a for a in proto.attribute if a.name not in values]
        del proto.attribute[:]
        proto.attribute.extend(kept + [helper.make_attribute(k, v) for k, v in values.items()])

    return change


@pytest.mark.parametrize(
    ("change", "error", "why"),
    [
        (no_weight, UnsupportedOperatorError, r"LSTM.*cell.*W 'w' is computed at run time"),
        (no_input, ModelError, "input W is missing"),
        (short_weight, ModelError, r"R has the shape \(1, 23, 6\).*\(1, 24, 6\)"),
        (double_weight, UnsupportedOperatorError, "W 'w' is float64"),
        (set_attribute(hidden_size=5), ModelError, "hidden_size 5"),
        (set_attribute(hidden_size=0.5), ModelError, "'hidden_size' has a wrong type"),
        (set_attribute(direction="bidirectional"), ModelError, "2 directions"),
        (set_attribute(direction="sideways"), ModelError, "direction 'sideways'"),
        (set_attribute(clip=-1.0), ModelError, "clip=-1.0; want more than 0"),
        (set_attribute(activations=["Tanh"]), ModelError, "1 activations; want 3"),
        (
            set_attribute(activations=["Sigmoid", "Tanh", "Swish"]),
            UnsupportedOperatorError,
            r"LSTM.*activation 'swish' is not known; known are sigmoid, tanh",
        ),
        (
            set_attribute(activations=["Sigmoid", "ScaledTanh", "Tanh"]),
            ModelError,
            "'scaledtanh' needs 2 parameters",
        ),
    ],
)
def test_broken_nodes_are_named(change, error, why):
    proto, arrays = broken(change)
    with pytest.raises(error, match=why):
        read_layer(proto, arrays.get)
