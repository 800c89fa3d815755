"""Quantisation: what it loses, what it promises about scales, and what it refuses."""

import numpy as np
import pytest

from tests.catalogue import EVEN, NODES, RAGGED
from tests.vta import integer_reference
from tvmstruct import ops
from tvmstruct.errors import InputError
from tvmstruct.vta.integer import IntLinear, Program, Reorder, factors
from tvmstruct.vta.quantize import FloatLayer, quantise
from tvmstruct.vta.scales import Options

INNER_SUMS = ("product of sums", "sum with what it reads",
              "what is read, then a sum")  # fmt: skip
CASES = {
    **{name: op for name, op in NODES.items() if name not in INNER_SUMS},
    **{str(case): case.member() for case in [*EVEN, *RAGGED] if case.family != "bh4"},
}


def rows(n: int, count: int = 64, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(count, n)).astype(np.float32)


def run_by_reference(program: Program, x: np.ndarray) -> np.ndarray:
    for step in program.steps:
        if isinstance(step, IntLinear):
            x = integer_reference.linear(step.op, step.bias, step.shift, x, relu=step.relu)
        else:
            padded = np.concatenate([x, np.zeros((len(x), 1), x.dtype)], axis=1)
            x = padded[:, step.index]
    return x


@pytest.mark.parametrize("scales", ["channel", "tensor"])
@pytest.mark.parametrize("op", CASES.values(), ids=CASES)
def test_int8_is_near_the_layer_and_equals_the_reference(op, scales):
    x = rows(op.n_in)
    bias = None if op.n_out % 2 else np.linspace(-1, 1, op.n_out)
    if bias is not None and any(isinstance(f, ops.Pad) for f in [op, *getattr(op, "factors", [])]):
        bias = None  # refused after padding, see below
    layer = quantise([FloatLayer(op, bias, op.n_out % 3 == 0)], x, Options(scales=scales))
    linear = max(len(p.linear) for p in layer.programs)
    assert layer.error < (0.025 if scales == "channel" else 0.05) * linear
    want = op.apply(x) + (0 if bias is None else bias)
    if layer.relu or any(step.relu for p in layer.programs for step in p.linear):
        want = np.maximum(want, 0)
    fresh = np.linalg.norm(layer(x) - want) / np.linalg.norm(want)
    assert fresh == pytest.approx(layer.error, rel=1e-3, abs=1e-5)
    for program in layer.programs:
        q = program.quantise(x)
        np.testing.assert_array_equal(program.run(q), run_by_reference(program, q))


@pytest.mark.parametrize("name", INNER_SUMS)
def test_a_sum_inside_a_product_is_refused(name):
    op = NODES[name]
    with pytest.raises(ValueError, match="sum of operators inside a product"):
        quantise([FloatLayer(op)], rows(op.n_in))


def test_scales_obey_the_shift():
    """A unit of the output is x_scale * w_scale * 2**shift, seen on the rounded weights."""
    w = np.random.default_rng(3).normal(size=(40, 21)) * np.geomspace(0.01, 3, 21)
    layer, after = FloatLayer(ops.Dense(w)), FloatLayer(ops.Dense(rows(21, 4).T))
    free = quantise([layer], rows(40)).programs[0]
    chained = quantise([layer, after], rows(40)).programs[0]
    for step in (free.linear[0], chained.linear[0]):
        assert isinstance(step.op, ops.Dense)
        assert (step.shift >= 0).all()
        assert np.abs(step.op.w.astype(int)).max(axis=0).min() >= 63  # half the range is used
    q, shift = free.linear[0].op.w, free.linear[0].shift
    w_scale = free.y_scale / 2.0**shift / free.x_scale[:, None]  # features have scales too
    np.testing.assert_array_less(np.abs(q * w_scale - w) / w_scale, 0.501)
    assert np.unique(free.y_scale).size == 21
    q, shift = chained.linear[0].op.w / chained.x_scale[:, None], chained.linear[0].shift
    hidden = (w * q).sum(axis=0) / (q * q).sum(axis=0) * 2.0**shift  # the scale of all outputs
    np.testing.assert_allclose(hidden, hidden.mean(), rtol=0.01)


def test_tensor_scales_are_powers_of_two_with_one_shift():
    layer = quantise([FloatLayer(ops.Dense(rows(30, 17).T))], rows(30), Options(scales="tensor"))
    (program,) = layer.programs
    assert np.log2(program.x_scale) % 1 == 0
    assert np.unique(program.y_scale).size == 1
    assert np.log2(program.y_scale[0]) % 1 == 0
    assert np.unique(program.linear[0].shift).size == 1


def test_a_chain_hands_int8_on():
    w1, w2 = rows(24, 40, 1).T / 5, rows(40, 12, 2).T / 6
    b1, x = rows(40, 1, 3)[0], rows(24, 200, 4)
    chain = [FloatLayer(ops.Dense(w1), b1, True), FloatLayer(ops.Dense(w2))]
    (program,) = quantise(chain, x).programs
    want = np.maximum(x @ w1 + b1, 0) @ w2
    assert [step.relu for step in program.linear] == [True, False]
    assert np.linalg.norm(program(x) - want) < 0.025 * np.linalg.norm(want)
    q = program.quantise(x)
    np.testing.assert_array_equal(program.run(q), run_by_reference(program, q))


def test_an_outlier_of_one_feature_is_taken_up_by_the_weight():
    x = rows(16, 256)
    x[:, 3] *= 100
    layer = FloatLayer(ops.Dense(rows(16, 8).T))
    smooth, (coarse,) = (
        quantise([layer], x),
        quantise([layer], x, Options(scales="tensor")).programs,
    )
    assert smooth.programs[0].x_scale[3] > 4 * np.median(smooth.programs[0].x_scale)
    others = x * (np.arange(16) != 3)
    want = others @ layer.op.w
    error = [np.linalg.norm(p(others) - want) for p in (smooth, coarse)]
    assert error[0] < 0.5 * error[1]


def test_percentile_leaves_an_outlier_out():
    x = rows(16, 4096)
    x[7, 3] = 1000
    layer = FloatLayer(ops.Dense(rows(16, 8).T))
    scales = {
        m: float(quantise([layer], x, Options(m, "tensor")).programs[0].x_scale[0])
        for m in ("minmax", "percentile")
    }
    assert scales["minmax"] == 8  # the power of two over 1000 / 127
    assert scales["percentile"] < 10 / 127


def test_zero_weights_zero_inputs_and_one_row():
    op = ops.Dense(np.zeros((5, 3)))
    bias = np.array([1.0, -2.0, 0.0])
    layer = quantise([FloatLayer(op, bias)], np.zeros((1, 5), np.float32))
    np.testing.assert_allclose(layer(rows(5)), np.tile([1.0, -2.0, 0.0], (64, 1)), atol=0.02)


def test_factors_merge_reorderings():
    parts = factors(ops.swap(3, 4) @ ops.Pad(12, 16, 2) @ ops.Dense(np.ones((16, 2))))
    assert isinstance(parts[0], Reorder)
    assert len(parts) == 2
    x = np.arange(12)[None]
    np.testing.assert_array_equal(parts[0].run(x), (ops.swap(3, 4) @ ops.Pad(12, 16, 2)).apply(x))


def test_a_bias_on_padding_is_refused():
    op = ops.Dense(np.ones((3, 4))) @ ops.Pad(4, 6)
    with pytest.raises(ValueError, match="bias on padded"):
        quantise([FloatLayer(op, np.ones(6))], rows(3))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"method": "best"}, "method='best' is unknown; known: mse"),
        ({"scales": "row"}, "scales='row' is unknown; known: channel"),
        ({"percentile": 0.5}, "percentile=0.5; want 50 to 100"),
    ],
)
def test_unknown_options_are_refused(options, message):
    with pytest.raises(InputError, match=message):
        Options(**options)


def test_a_sum_in_a_chain_is_refused():
    two = ops.Dense(np.ones((3, 4))) + ops.Dense(np.ones((3, 4)))
    with pytest.raises(ValueError, match="added on the CPU"):
        quantise([FloatLayer(two), FloatLayer(ops.Dense(np.ones((4, 2))))], rows(3))
