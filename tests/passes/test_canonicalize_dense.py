"""Matmuls with constants become layers, however the weight lies; what does not fit says why."""

from __future__ import annotations

import numpy as np
import pytest
from tvm import relax

from tests import models
from tests.relax_modules import R, check_compiled, const, dense, module, nodes, operators, transform
from tvmstruct.layers import LayerTable
from tvmstruct.passes.canonicalize_dense import CanonicalizeDense

W = models.weight(24, 40, seed=1)


def find(mod):
    table = LayerTable()
    mod, log = transform(mod, CanonicalizeDense(table, {}))
    return mod, table, log


PLACES = {
    "plain": (lambda emit, x: R.matmul(x, const(W)), (5, 24), False),
    "transposed": (lambda emit, x: R.matmul(x, R.permute_dims(const(W.T))), (5, 24), True),
    "axes": (lambda emit, x: R.matmul(x, R.permute_dims(const(W.T), [1, 0])), (5, 24), True),
    "twice": (
        lambda emit, x: R.matmul(x, R.permute_dims(R.permute_dims(const(W)))),
        (5, 24),
        False,
    ),
    "identity": (lambda emit, x: R.matmul(x, R.permute_dims(const(W), [0, 1])), (5, 24), False),
    "rank 3": (lambda emit, x: R.matmul(x, const(W)), (2, 5, 24), False),
    "rank 4": (lambda emit, x: R.matmul(x, const(W)), (2, 3, 5, 24), False),
    "repeated": (
        lambda emit, x: R.matmul(x, R.broadcast_to(const(W), (2, 24, 40))),
        (2, 5, 24),
        False,
    ),
    "reshaped": (
        lambda emit, x: R.matmul(x, R.reshape(const(W.reshape(24, 8, 5)), (24, 40))),
        (5, 24),
        False,
    ),
    "vector": (lambda emit, x: R.matmul(x, const(W)), (24,), False),
    "left": (lambda emit, x: R.matmul(const(W), x), (40, 5), True),
    "left, transposed": (lambda emit, x: R.matmul(R.permute_dims(const(W.T)), x), (40, 5), False),
}


@pytest.mark.parametrize("place", PLACES)
def test_places_of_the_weight(place):
    body, shape, transposed = PLACES[place]
    mod = module(body, shape)
    after, table, log = find(mod)
    (layer,) = nodes(after, table)
    assert layer.transposed is transposed
    assert "relax.matmul" not in operators(after)
    assert not log.rejected
    np.testing.assert_array_equal(layer.op.w, W.T if place.startswith("left") else W)
    check_compiled(mod)


def refusal(mod):
    after, table, log = find(mod)
    assert not nodes(after, table)
    ((rule, layer, why),) = log.rejected
    assert rule == "canonicalize_dense"
    assert layer.startswith("constant_")
    model = check_compiled(mod, **REFUSED_BOUND)
    assert why in [record.reason for record in model.report().layers]
    return why


REFUSED_BOUND = {"rtol": 1e-2, "atol": 1e-2}  # float16 is among them


def test_a_batch_of_weights_is_refused():
    w = models.weight(2, 24, 7)
    why = refusal(module(lambda emit, x: R.matmul(x, const(w)), (2, 5, 24)))
    assert "weight has rank 3, want 2" in why


def test_a_vector_is_refused():
    why = refusal(module(lambda emit, x: R.matmul(x, const(W[:, 0])), (5, 24)))
    assert "weight has rank 1, want 2" in why


@pytest.mark.parametrize("dtype", ["float16", "float64"])
def test_other_dtypes_are_refused(dtype):
    def body(emit, x):
        return R.matmul(x, relax.const(W.astype(dtype), dtype))

    assert f"computes in {dtype}; layers compute in float32" in refusal(
        module(body, (5, 24), dtype=dtype)
    )


def test_a_weight_left_of_a_batch_is_refused():
    why = refusal(module(lambda emit, x: R.matmul(const(W), x), (2, 40, 5)))
    assert "stands left of an input of rank 3, want 2" in why


def test_two_inputs_are_no_layer():
    after, _, log = find(module(lambda emit, x, y: R.matmul(x, y), (5, 24), (24, 7)))
    assert not log.rejected
    assert operators(after) == ["relax.matmul"]


def test_a_weight_that_is_used_both_ways_round():
    def body(emit, x):
        w = emit(const(W))
        return R.matmul(emit(R.matmul(x, w)), emit(R.permute_dims(w)))

    mod = module(body, (5, 24))
    after, table, _ = dense(mod)
    assert [n.transposed for n in nodes(after, table)] == [False, True]
    check_compiled(mod)


@pytest.mark.parametrize("shape", [(1, 40), (40, 1), (1, 1)])
def test_a_vector_shaped_weight_that_is_used_both_ways_round(shape):
    """A transposed vector is contiguous too; its packing still is another one."""
    w = models.weight(*shape, seed=3)

    def body(emit, x):
        return R.matmul(emit(R.matmul(x, const(w))), emit(R.permute_dims(const(w))))

    tied = const(w)

    def same_constant(emit, x):
        return R.matmul(emit(R.matmul(x, tied)), emit(R.permute_dims(tied)))

    for each in (body, same_constant):
        check_compiled(module(each, (5, shape[0])))


@pytest.mark.parametrize("trans_a", [0, 1])
@pytest.mark.parametrize("trans_b", [0, 1])
@pytest.mark.parametrize(
    ("alpha", "beta", "bias"), [(1.0, 1.0, True), (0.5, 2.0, True), (3.0, 1.0, False)]
)
def test_gemm_of_onnx(trans_a, trans_b, alpha, beta, bias):
    import tvmstruct

    onnx = models.gemm_model(trans_a, trans_b, alpha, beta, bias=bias)
    x = models.rng(5).normal(size=(24, 5) if trans_a else (5, 24)).astype(np.float32)
    model = tvmstruct.compile(tvmstruct.from_onnx(onnx))
    (want,) = models.run_onnx(onnx, {"x": x})
    np.testing.assert_allclose(model(x), want, **BOUND)
    assert [record.form for record in model.report().layers] == ["dense"]


BOUND = {"rtol": 1e-4, "atol": 1e-5}
