"""Feed-forward blocks as exporters write them become one kernel, with ONNX Runtime's numbers."""

from __future__ import annotations

import math

import numpy as np
import pytest

import tvmstruct
from tests import models
from tests.attention_spellings import Builder
from tvmstruct.testing import tolerance

ROWS, N, HIDDEN = 516, 24, 128  # enough rows for the split kernel to pay, and a ragged last block
OUT = 64


def weights(b, flip=False):
    w1, w2 = models.weight(N, HIDDEN, seed=1), models.weight(HIDDEN, OUT, seed=2)
    b1, b2 = models.weight(HIDDEN, seed=3), models.weight(OUT, seed=4)
    return [b.const(w) for w in ((w1.T, b1, w2.T, b2) if flip else (w1, b1, w2, b2))]


def by_matmul(b, x, activation):
    """The bias after the product on one side, before it on the other."""
    w1, b1, w2, b2 = weights(b)
    h = activation(b, b.op("Add", b1, b.op("MatMul", x, w1)))
    return b.op("Add", b.op("MatMul", h, w2), b2)


def by_gemm(b, x, activation):
    """Weights as torch stores them."""
    w1, b1, w2, b2 = weights(b, flip=True)
    return b.op("Gemm", activation(b, b.op("Gemm", x, w1, b1, transB=1)), w2, b2, transB=1)


def by_einsum(b, x, activation):
    """As TensorFlow's EinsumDense."""
    w1, b1, w2, b2 = weights(b)
    h = activation(b, b.op("Add", b.op("Einsum", x, w1, equation="bsd,dh->bsh"), b1))
    return b.op("Add", b.op("Einsum", h, w2, equation="bsh,hd->bsd"), b2)


def erf_gelu(b, h):
    inner = b.op("Erf", b.op("Div", h, b.const(math.sqrt(2))))
    return b.op("Mul", b.op("Mul", h, b.op("Add", inner, b.const(1.0))), b.const(0.5))


def erf_gelu_of_half(b, h):
    inner = b.op("Erf", b.op("Mul", b.const(math.sqrt(0.5)), h))
    return b.op("Mul", b.op("Mul", b.const(0.5), h), b.op("Add", b.const(1.0), inner))


def tanh_gelu(b, h):
    cube = b.op("Mul", b.const(0.044715), b.op("Pow", h, b.const(3.0)))
    inner = b.op("Mul", b.const(math.sqrt(2 / math.pi)), b.op("Add", h, cube))
    return b.op("Mul", b.op("Mul", b.const(0.5), h), b.op("Add", b.const(1.0), b.op("Tanh", inner)))


def sigmoid_gelu(b, h):
    return b.op("Mul", h, b.op("Sigmoid", b.op("Mul", b.const(1.702), h)))


def silu(b, h):
    return b.op("Mul", b.op("Sigmoid", h), h)


def relu(b, h):
    return b.op("Relu", h)


BLOCKS = [
    (by_matmul, (ROWS, N), erf_gelu),
    (by_matmul, (4, ROWS // 4, N), erf_gelu_of_half),
    (by_matmul, (4, ROWS // 4, N), tanh_gelu),
    (by_gemm, (ROWS, N), relu),
    (by_gemm, (ROWS, N), sigmoid_gelu),
    (by_einsum, (4, ROWS // 4, N), silu),
]


def compile_block(block, shape, activation):
    b = Builder()
    proto = b.build(block(b, b.random(*shape), activation))
    model = tvmstruct.compile(tvmstruct.from_onnx(proto), buckets="exact", threads=1)
    (found,) = model.run(b.inputs).values()
    (want,) = models.run_onnx(proto, b.inputs)
    np.testing.assert_allclose(found, want, **tolerance("float32", 256))
    return model.report().layers


@pytest.mark.parametrize(
    ("block", "shape", "activation"), BLOCKS, ids=lambda v: getattr(v, "__name__", str(v))
)
def test_spelling(block, shape, activation):
    records = compile_block(block, shape, activation)
    (found,) = [r for r in records if r.form == "feed-forward"]
    assert found.shape == (N, HIDDEN, OUT)


def test_the_report_names_an_activation_that_no_kernel_knows():
    records = compile_block(by_gemm, (ROWS, N), lambda b, h: b.op("Softplus", h))
    (found,) = [r for r in records if r.form == "not rewritten by split_feed_forward"]
    assert "stands between c0 and c2" in found.reason
