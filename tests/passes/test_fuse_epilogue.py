"""Bias, activation and residual move into the layer before them, and only where that is safe."""

from __future__ import annotations

import math

import numpy as np
import pytest

from tests import models
from tests.relax_modules import (
    R,
    check_compiled,
    const,
    dense,
    module,
    nodes,
    operators,
    structure_and_numbers,
    transform,
)
from tvmstruct.layers import HashTables, LayerTable
from tvmstruct.passes.fuse_epilogue import FuseEpilogue
from tvmstruct.passes.fuse_layer_norm import FuseLayerNorm
from tvmstruct.schedules.compute.dense import Epilogue

W, B = models.weight(24, 40, seed=1), models.weight(40, seed=2)
ROOT2, HALF = const(math.sqrt(2)), const(0.5)


def linear(emit, x):
    return emit(R.add(emit(R.matmul(x, const(W))), const(B)))


def one_plus_erf(emit, h):
    return emit(R.add(emit(R.erf(emit(R.divide(h, ROOT2)))), const(1.0)))


def cube(emit, h):
    return emit(R.multiply(emit(R.multiply(h, h)), h))


def tanh_gelu(emit, h, cubed, *, flip=False):
    c = emit(R.multiply(const(0.044715), cubed))
    total = emit(R.add(c, h) if flip else R.add(h, c))
    inner = emit(R.tanh(emit(R.multiply(total, const(math.sqrt(2 / math.pi))))))
    return R.multiply(emit(R.multiply(HALF, h)), emit(R.add(const(1.0), inner)))


ACTIVATIONS = {
    "relu": ("relu", lambda emit, h: R.nn.relu(h)),
    "tanh": ("tanh", lambda emit, h: R.tanh(h)),
    "sigmoid": ("sigmoid", lambda emit, h: R.sigmoid(h)),
    "silu op": ("silu", lambda emit, h: R.nn.silu(h)),
    "silu": ("silu", lambda emit, h: R.multiply(emit(R.sigmoid(h)), h)),
    "sigmoid gelu": (
        "gelu_sigmoid",
        lambda emit, h: R.multiply(h, emit(R.sigmoid(emit(R.multiply(h, const(1.702)))))),
    ),
    "gelu op": ("gelu", lambda emit, h: R.nn.gelu(h)),
    "gelu_tanh op": ("gelu_tanh", lambda emit, h: R.nn.gelu_tanh(h)),
    "torch": (
        "gelu",
        lambda emit, h: R.multiply(emit(R.multiply(h, one_plus_erf(emit, h))), HALF),
    ),
    "half first": (
        "gelu",
        lambda emit, h: R.multiply(emit(R.multiply(HALF, h)), one_plus_erf(emit, h)),
    ),
    "half inside": (
        "gelu",
        lambda emit, h: R.multiply(h, emit(R.multiply(one_plus_erf(emit, h), HALF))),
    ),
    "divided by two": (
        "gelu",
        lambda emit, h: R.divide(emit(R.multiply(one_plus_erf(emit, h), h)), const(2.0)),
    ),
    "times root half": (
        "gelu",
        lambda emit, h: R.multiply(
            emit(R.multiply(h, HALF)),
            emit(R.add(const(1.0), emit(R.erf(emit(R.multiply(h, const(math.sqrt(0.5)))))))),
        ),
    ),
    "cube by products": ("gelu_tanh", lambda emit, h: tanh_gelu(emit, h, cube(emit, h))),
    "cube by power": (
        "gelu_tanh",
        lambda emit, h: tanh_gelu(emit, h, emit(R.power(h, const(3.0))), flip=True),
    ),
}


@structure_and_numbers
@pytest.mark.parametrize("shape", [(5, 24), (2, 3, 24)], ids=str)
@pytest.mark.parametrize("spelling", ACTIVATIONS)
def test_activations_in_every_spelling(spelling, shape, numbers):
    name, body = ACTIVATIONS[spelling]
    mod = module(lambda emit, x: body(emit, linear(emit, x)), shape)
    after, table, _ = dense(mod)
    (layer,) = nodes(after, table)
    assert layer.epilogue == Epilogue(True, name)
    assert set(operators(after)) <= {"relax.reshape", "relax.call_dps_packed"}
    if numbers:
        check_compiled(mod)


@pytest.mark.parametrize("spelling", ["relu", "torch", "cube by power", "silu", "sigmoid gelu"])
def test_activations_compute_the_same(spelling):
    _, body = ACTIVATIONS[spelling]
    check_compiled(module(lambda emit, x: body(emit, linear(emit, x)), (2, 3, 24)))


NOT_GELU = {
    "other half": lambda emit, h: R.multiply(
        emit(R.multiply(h, one_plus_erf(emit, h))), const(0.5004)
    ),
    "other root": lambda emit, h: R.multiply(
        emit(R.multiply(h, HALF)),
        emit(R.add(const(1.0), emit(R.erf(emit(R.multiply(h, const(0.7075))))))),
    ),
    "two": lambda emit, h: R.multiply(
        emit(R.multiply(h, HALF)), emit(R.add(const(2.0), emit(R.erf(emit(R.divide(h, ROOT2))))))
    ),
    "other input": lambda emit, h: R.multiply(
        emit(R.multiply(emit(R.tanh(h)), HALF)), one_plus_erf(emit, h)
    ),
    "quick": lambda emit, h: R.multiply(h, emit(R.sigmoid(emit(R.multiply(h, const(1.6)))))),
    "sigmoid of another": lambda emit, h: R.multiply(h, emit(R.sigmoid(emit(R.negative(h))))),
    "other cube": lambda emit, h: tanh_gelu(emit, h, emit(R.power(h, const(3.01)))),
}


@structure_and_numbers
@pytest.mark.parametrize("spelling", NOT_GELU)
def test_what_is_nearly_gelu_stays_exactly_what_it_is(spelling, numbers):
    mod = module(lambda emit, x: NOT_GELU[spelling](emit, linear(emit, x)), (5, 24))
    after, table, _ = dense(mod)
    assert [n.activation for n in nodes(after, table)] == ["none"]
    if numbers:
        check_compiled(mod)


ORDERS = {
    "bias twice": (
        lambda emit, x, r: R.add(linear(emit, x), const(B)),
        Epilogue(True),
    ),
    "scalar bias": (
        lambda emit, x, r: R.add(emit(R.matmul(x, const(W))), const([2.0])),
        Epilogue(True),
    ),
    "bias from the left": (
        lambda emit, x, r: R.add(const(B), emit(R.matmul(x, const(W)))),
        Epilogue(True),
    ),
    "bias with leading ones": (
        lambda emit, x, r: R.add(emit(R.matmul(x, const(W))), const(B[None])),
        Epilogue(True),
    ),
    "residual": (
        lambda emit, x, r: R.add(r, linear(emit, x)),
        Epilogue(True, "none", True),
    ),
    "residual after activation": (
        lambda emit, x, r: R.add(emit(R.nn.relu(linear(emit, x))), r),
        Epilogue(True, "relu", True),
    ),
    "activation after residual stays": (
        lambda emit, x, r: R.nn.relu(emit(R.add(linear(emit, x), r))),
        Epilogue(True, "none", True),
    ),
    "bias after activation stays": (
        lambda emit, x, r: R.add(emit(R.nn.relu(emit(R.matmul(x, const(W))))), const(B)),
        Epilogue(False, "relu"),
    ),
    "second activation stays": (
        lambda emit, x, r: R.tanh(emit(R.nn.relu(linear(emit, x)))),
        Epilogue(True, "relu"),
    ),
    "second residual stays": (
        lambda emit, x, r: R.add(emit(R.add(linear(emit, x), r)), r),
        Epilogue(True, "none", True),
    ),
}


@pytest.mark.parametrize("order", ORDERS)
def test_orders(order):
    body, epilogue = ORDERS[order]
    mod = module(body, (5, 24), (5, 40))
    after, table, _ = dense(mod)
    (layer,) = nodes(after, table)
    assert layer.epilogue == epilogue
    check_compiled(mod)


READERS = {
    "the product": lambda emit, x: (lambda h: (R.add(h, const(B)), R.negative(h)))(
        emit(R.matmul(x, const(W)))
    ),
    "the biased product": lambda emit, x: (lambda h: (R.nn.relu(h), R.negative(h)))(
        linear(emit, x)
    ),
    "gelu's input": lambda emit, x: (
        lambda h: (
            R.multiply(emit(R.multiply(h, one_plus_erf(emit, h))), HALF),
            R.negative(h),
        )
    )(linear(emit, x)),
    "gelu's erf": lambda emit, x: (
        lambda h: (
            lambda e: (
                R.multiply(emit(R.multiply(h, emit(R.add(e, const(1.0))))), HALF),
                R.negative(e),
            )
        )(emit(R.erf(emit(R.divide(h, ROOT2)))))
    )(linear(emit, x)),
    "itself as residual": lambda emit, x: (lambda h: R.add(h, h))(linear(emit, x)),
}


@pytest.mark.parametrize("what", READERS)
def test_what_another_reader_needs_is_computed_once(what):
    mod = module(READERS[what], (5, 24))
    after, table, _ = dense(mod)
    (layer,) = nodes(after, table)
    assert layer.activation == "none"
    assert not layer.residual
    check_compiled(mod)


BROADCAST = {
    "residual to rows": ((5, 24), (1, 40)),
    "rows to residual": ((1, 24), (5, 40)),
    "batch to residual": ((1, 5, 24), (2, 5, 40)),
    "residual of lower rank": ((2, 5, 24), (5, 40)),
    "residual of higher rank": ((5, 24), (2, 5, 40)),
}


@pytest.mark.parametrize("case", BROADCAST)
def test_broadcasting_residuals_stay_in_the_graph(case):
    mod = module(lambda emit, x, r: R.add(linear(emit, x), r), *BROADCAST[case])
    after, table, _ = dense(mod)
    (layer,) = nodes(after, table)
    assert not layer.residual
    check_compiled(mod)


def test_a_column_times_a_row_vector_is_no_bias():
    w = models.weight(24, 1)
    mod = module(lambda emit, x: R.add(emit(R.matmul(x, const(w))), const(B)), (5, 24))
    after, table, _ = dense(mod)
    assert nodes(after, table)[0].bias is None
    check_compiled(mod)


def test_a_bias_per_row_is_no_bias():
    b = np.arange(5, dtype=np.float32)[:, None] * np.ones((1, 40), np.float32)
    mod = module(lambda emit, x: R.add(emit(R.matmul(x, const(W))), const(b)), (5, 24))
    after, table, _ = dense(mod)
    assert nodes(after, table)[0].bias is None
    check_compiled(mod)


def test_a_reshape_that_splits_the_features_ends_the_epilogue():
    def body(emit, x):
        h = emit(R.reshape(emit(R.matmul(x, const(W))), (5, 4, 10)))
        return R.add(h, const(B[:10]))

    mod = module(body, (5, 24))
    after, table, _ = dense(mod)
    assert nodes(after, table)[0].bias is None
    check_compiled(mod)


def test_tables_take_bias_residual_and_normalisation_but_no_activation():
    table = LayerTable()
    hashed = HashTables(("t",), models.weight(3, 4, 40, seed=3))

    def body(emit, z, r):
        y = emit(R.reshape(emit(table.call(hashed, [z], (10, 40))), (2, 5, 40)))
        total = emit(R.add(r, emit(R.add(y, const(B)))))
        return R.nn.layer_norm(total, const(np.ones(40)), const(B), axes=[-1])

    epilogues = [FuseEpilogue(table) for _ in range(2)]
    after, _ = transform(module(body, (10, 6), (2, 5, 40)), *epilogues, FuseLayerNorm(table))
    (found,) = nodes(after, table)
    assert isinstance(found, HashTables)
    np.testing.assert_array_equal(found.bias, B)
    assert found.epilogue == Epilogue(True, "none", True, 1e-5)

    def activated(emit, z):
        return R.nn.relu(emit(table.call(hashed, [z], (10, 40))))

    after, _ = transform(module(activated, (10, 6)), FuseEpilogue(table))
    assert "relax.nn.relu" in operators(after)
