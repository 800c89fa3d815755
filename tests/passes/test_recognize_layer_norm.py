"""Spelled-out layer normalisation becomes one operator again, and nothing else does."""

import numpy as np
import pytest
from tvm import relax

from tvmstruct import compat
from tvmstruct.passes.recognize_layer_norm import RecognizeLayerNorm
from tvmstruct.rewrite import Log, apply_rule

R = relax.op
N = 24
GAMMA, BETA = (np.random.default_rng(i).standard_normal(N).astype("float32") for i in (0, 1))


def graph(square, epsilon=1e-6, axis=-1, other=None):
    builder = relax.BlockBuilder()
    x = relax.Var("x", relax.TensorType((3, N), "float32"))
    with builder.function("main", [x]):
        with builder.dataflow():
            mean = builder.emit(R.mean(x, axis, keepdims=True))
            centred = builder.emit(R.subtract(x, mean))
            again = builder.emit(R.subtract(x, mean)) if other is None else x
            variance = builder.emit(R.mean(square(again), -1, keepdims=True))
            root = builder.emit(R.sqrt(R.add(variance, relax.const(epsilon, "float32"))))
            normed = builder.emit(R.divide(centred, root))
            scaled = builder.emit(R.multiply(relax.const(GAMMA), normed))
            out = builder.emit_output(R.add(scaled, relax.const(BETA)))
        builder.emit_func_output(out)
    return relax.transform.Normalize()(builder.get())


def operators(mod):
    return [compat.op_name(b.value) for b in mod["main"].body.blocks[0].bindings]


SQUARES = {
    "power": lambda v: R.power(v, relax.const(2.0, "float32")),
    "product": lambda v: R.multiply(v, v),
}


@pytest.mark.parametrize("square", SQUARES.values(), ids=SQUARES)
def test_both_squares_are_recognised(square):
    mod = apply_rule(graph(square), RecognizeLayerNorm(), Log())
    assert operators(mod) == ["relax.nn.layer_norm"]
    norm = mod["main"].body.blocks[0].bindings[0].value
    assert float(norm.attrs.epsilon) == pytest.approx(1e-6)
    np.testing.assert_array_equal(compat.constant_array(norm.args[1]), GAMMA)
    np.testing.assert_array_equal(compat.constant_array(norm.args[2]), BETA)


@pytest.mark.parametrize(
    "options", [{"axis": 0}, {"other": "x"}], ids=["mean over rows", "mean of x squared"]
)
def test_lookalikes_are_left_alone(options):
    mod = apply_rule(graph(SQUARES["product"], **options), RecognizeLayerNorm(), Log())
    assert "relax.nn.layer_norm" not in operators(mod)
