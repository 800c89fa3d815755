"""Linear chains become one structured operator, with the numbers of the graph."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.linalg import hadamard

import tvmstruct
from tests import models
from tests.relax_modules import (
    LayerTable,
    R,
    const,
    module,
    nodes,
    operators,
    random_inputs,
    transform,
)
from tvmstruct import ops
from tvmstruct.families import bh4
from tvmstruct.passes.recognize_operator import RecognizeOperator
from tvmstruct.testing import tolerance

ROWS = (3, 7)
BOUND = tolerance("float32", 256, scale=10)


def weights(*shape: int, seed: int = 0) -> np.ndarray:
    return models.rng(seed).normal(size=shape) / np.sqrt(shape[-2])


def recognise(body, *shapes):
    """Return the layers, the module and what was refused."""
    mod, table, forms = module(body, *shapes), LayerTable(), {}
    new, log = transform(mod, RecognizeOperator(table, forms, {}))
    return mod, nodes(new, table), new, log.rejected


# Ways to write it: each ends in (3, 7, outputs) of an input (3, 7, inputs)


def batched(emit, x):
    """The blocks first, as einsum "bgp,gpq->bgq" is imported."""
    x = emit(R.permute_dims(emit(R.reshape(x, (21, 4, 6))), (1, 0, 2)))
    y = emit(R.matmul(x, const(weights(4, 6, 5))))
    return R.reshape(emit(R.permute_dims(y, (1, 0, 2))), (*ROWS, 20))


def rows_of_one(emit, x):
    """An axis of one for each block."""
    x = emit(R.reshape(x, (*ROWS, 4, 1, 6)))
    return R.reshape(emit(R.matmul(x, const(weights(4, 6, 5)))), (*ROWS, 20))


def from_left(emit, x):
    """``w @ x``."""
    x = emit(R.reshape(x, (*ROWS, 4, 6, 1)))
    return R.reshape(emit(R.matmul(const(weights(4, 5, 6)), x)), (*ROWS, 20))


def fanned_out(emit, x):
    """One input, two products of each block."""
    x = emit(R.reshape(x, (*ROWS, 1, 4, 1, 6)))
    return R.reshape(emit(R.matmul(x, const(weights(2, 4, 6, 5)))), (*ROWS, 40))


def strided_blocks(emit, x):
    """Blocks of every fourth feature, each cut out, joined again."""
    parts = []
    for i in range(4):
        part = emit(R.strided_slice(x, [2], [i], [24], [4]))
        parts.append(emit(R.matmul(part, const(weights(6, 5, seed=i)))))
    return R.concat(parts, 2)


def kronecker(emit, x):
    """Reshape, matmul, transpose, matmul, transpose."""
    y = emit(R.matmul(emit(R.reshape(x, (21, 4, 6))), const(weights(6, 5))))
    y = emit(R.matmul(emit(R.permute_dims(y, (0, 2, 1))), const(weights(4, 3))))
    return R.reshape(emit(R.permute_dims(y, (0, 2, 1))), (*ROWS, 15))


def kronecker_from_both_sides(emit, x):
    """``a @ x @ b``."""
    y = emit(R.matmul(emit(R.reshape(x, (*ROWS, 4, 6))), const(weights(6, 5))))
    return R.reshape(emit(R.matmul(const(weights(3, 4)), y)), (*ROWS, 15))


def stacked_butterflies(emit, x):
    """A + B and A - B of neighbours, level by level."""
    y, half = x, 1
    while half < 32:
        y = emit(R.reshape(y, (21, 16 // half, 2, half)))
        a, b = (emit(R.take(y, const_index(i), 2)) for i in range(2))
        y = emit(R.stack([emit(R.add(a, b)), emit(R.subtract(a, b))], 2))
        half *= 2
    return R.multiply(emit(R.reshape(y, (*ROWS, 32))), const(0.125))


def split_butterflies(emit, x):
    """Even and odd features, joined end to end."""
    for _ in range(5):
        a, b = (emit(R.strided_slice(x, [2], [i], [32], [2])) for i in range(2))
        x = emit(R.concat([emit(R.add(a, b)), emit(R.subtract(a, b))], 2))
    return x


def sylvester(emit, x):
    """Small Sylvester matrices on two axes: H_32 = H_4 (x) H_8."""
    y = emit(R.matmul(emit(R.reshape(x, (*ROWS, 4, 8))), const(hadamard(8))))
    return R.reshape(emit(R.matmul(const(hadamard(4)), y)), (*ROWS, 32))


def scaled_and_padded(emit, x):
    """Zeros around the input, diagonals, a slice."""
    x = emit(R.nn.pad(emit(R.multiply(x, const(weights(24, 24)[0]))), [0, 0, 0, 0, 2, 6]))
    y = emit(R.matmul(emit(R.reshape(x, (*ROWS, 4, 1, 8))), const(weights(4, 8, 6))))
    y = emit(R.strided_slice(emit(R.reshape(y, (*ROWS, 24))), [2], [1], [22]))
    return R.divide(emit(R.negative(y)), const(3.0))


def const_index(i: int):
    import tvm

    return tvm.relax.const(i, "int64")


def public_bh4(emit, x, n_in=96, width=128, b=8, n_out=250, transform=hadamard):
    """The projection of LookupFFN's public code: padding, residual, repeats, slice."""
    w, rows, repeats = bh4_weights(width, b, n_out), 21, -(-n_out // width)
    x = emit(R.reshape(x, (rows, n_in)))
    x = emit(R.concat([x, emit(R.zeros((rows, width - n_in), "float32"))], 1))
    outs = []
    for r in range(repeats):
        y = x
        for pair in range(4):
            y = emit(R.permute_dims(emit(R.reshape(y, (rows, width // b, b))), (1, 0, 2)))
            y = emit(R.matmul(y, const(w[r, pair].swapaxes(1, 2))))
            y = emit(R.reshape(emit(R.permute_dims(y, (1, 0, 2))), (rows, width)))
            y = emit(R.matmul(y, const(transform(width))))
        outs.append(y)
    y = emit(R.multiply(emit(R.concat(outs, 1)), const(0.7)))
    y = emit(R.add(y, emit(R.multiply(emit(R.tile(x, (1, repeats))), const(0.3)))))
    return R.reshape(emit(R.strided_slice(y, [1], [0], [n_out])), (*ROWS, n_out))


def bh4_weights(width, b, n_out):
    shape = (-(-n_out // width), 4, width // b, b, b)
    return models.rng(1).normal(size=shape) / np.sqrt(b * width)


CASES = {
    batched: (24, "BlockDiag(4 blocks 6x5)"),
    rows_of_one: (24, "BlockDiag(4 blocks 6x5)"),
    from_left: (24, "BlockDiag(4 blocks 6x5)"),
    fanned_out: (24, "BlockDiag(4 blocks 6x10) @ Permute(4x2x5 by 1,0,2)"),
    strided_blocks: (24, None),
    kronecker: (
        24,
        "SharedBlockDiag(4 of 6x5) @ Permute(4x5 by 1,0) @ SharedBlockDiag(5 of 4x3)"
        " @ Permute(5x3 by 1,0)",
    ),
    kronecker_from_both_sides: (24, None),
    stacked_butterflies: (32, "WalshHadamard(32 x1, scale 0.125)"),
    split_butterflies: (32, "WalshHadamard(32 x1, scale 1)"),
    sylvester: (32, "WalshHadamard(32 x1, scale 1)"),
    scaled_and_padded: (24, None),
    public_bh4: (96, None),
}


@pytest.mark.parametrize("body", CASES, ids=lambda f: f.__name__)
def test_chain_becomes_one_operator(body):
    width, want = CASES[body]
    mod, (node,), new, refused = recognise(body, (*ROWS, width))
    assert not refused
    assert set(operators(new)) == {"relax.reshape", "relax.call_dps_packed"}
    (x,) = random_inputs(mod)
    (y,) = models.run_module(mod, [x])
    np.testing.assert_allclose(node.op.apply(x.astype(np.float64)), y, **BOUND)
    assert node.op.macs + node.op.adds < node.op.n_in * node.op.n_out
    if want is not None:
        assert ops.describe(node.op) == want


def test_public_bh4_is_the_family(rng):
    _, (node,), _, _ = recognise(public_bh4, (*ROWS, 96))
    want = bh4(bh4_weights(128, 8, 250), 96, 250)
    assert ops.describe(node.op) == ops.describe(want)
    x = rng.normal(size=(5, 96))
    np.testing.assert_allclose(node.op.apply(x), want.apply(x), **BOUND)


# Where chains begin and end


def test_a_value_that_others_read_ends_a_chain():
    def body(emit, x):
        h = emit(R.matmul(emit(R.reshape(x, (*ROWS, 4, 1, 6))), const(weights(4, 6, 6))))
        y = emit(R.matmul(h, const(weights(4, 6, 5))))
        return R.reshape(y, (*ROWS, 20)), h

    _mod, found, _new, refused = recognise(body, (*ROWS, 24))
    assert [ops.describe(n.op) for n in found] == [
        "BlockDiag(4 blocks 6x6)",
        "BlockDiag(4 blocks 6x5)",
    ]
    assert not refused
    assert len({n.key for n in found}) == 2


def test_a_residual_and_a_bias_stay_for_the_epilogue():
    def body(emit, x):
        y = emit(R.matmul(emit(R.reshape(x, (*ROWS, 4, 1, 6))), const(weights(4, 6, 6))))
        y = emit(R.add(emit(R.reshape(y, (*ROWS, 24))), const(weights(1, 24)[0])))
        return R.add(x, y)

    model = tvmstruct.compile(module(body, (*ROWS, 24)))
    (record,) = model.report().layers
    assert (record.form, record.params) == ("operator", 144)
    mod = module(body, (*ROWS, 24))
    (x,) = random_inputs(mod)
    np.testing.assert_allclose(model(x), models.run_module(mod, [x])[0], **BOUND)


@pytest.mark.parametrize(
    "body",
    [
        lambda emit, x: R.matmul(x, const(weights(24, 20))),
        lambda emit, x: R.matmul(emit(R.matmul(x, const(weights(24, 2)))), const(weights(2, 24))),
        lambda emit, x: R.permute_dims(
            emit(R.reshape(emit(R.matmul(x, const(weights(24, 20)))), (*ROWS, 4, 5))), (0, 2, 1, 3)
        ),
    ],
    ids=["dense", "low rank", "heads"],
)
def test_plain_matrices_are_left_alone(body):
    _, found, _, refused = recognise(body, (*ROWS, 24))
    assert not found
    assert not refused


def test_heads_after_a_chain_stay_a_transpose():
    def body(emit, x):
        y = emit(R.reshape(emit(rows_of_one(emit, x)), (*ROWS, 4, 5)))
        return R.permute_dims(y, (0, 2, 1, 3))

    _mod, (node,), new, _ = recognise(body, (*ROWS, 24))
    assert ops.describe(node.op) == "BlockDiag(4 blocks 6x5)"
    assert operators(new)[-1] == "relax.permute_dims"


def test_what_costs_more_than_its_matrix_becomes_the_matrix():
    def small(emit, x):
        return public_bh4(emit, x, n_in=11, width=16, b=4, n_out=27)

    mod, (node,), _, _ = recognise(small, (*ROWS, 11))
    assert isinstance(node.op, ops.Dense)
    assert node.op.w.dtype == np.float32
    (x,) = random_inputs(mod)
    np.testing.assert_allclose(node.op.apply(x), models.run_module(mod, [x])[0], **BOUND)


def test_matrices_for_each_row_are_no_layer():
    def body(emit, x):
        return R.matmul(x, const(weights(3, 24, 20)))

    _, found, new, _ = recognise(body, (*ROWS, 24))
    assert not found
    assert operators(new) == ["relax.matmul"]


def test_almost_sylvester_is_no_transform():
    def body(emit, x):
        h = hadamard(8).astype(float)
        h[3, 5] *= 1.001
        return R.reshape(emit(R.matmul(emit(R.reshape(x, (*ROWS, 4, 8))), const(h))), (*ROWS, 32))

    _, (node,), _, _ = recognise(body, (*ROWS, 32))
    assert isinstance(node.op, ops.SharedBlockDiag)


# PyTorch


class TestTorch:
    """BH4 as people write it in PyTorch, through torch.export and torch.onnx."""

    def module(self, torch):
        class Projection(torch.nn.Module):
            def __init__(self):
                super().__init__()
                w = torch.from_numpy(bh4_weights(64, 4, 120).astype(np.float32))
                self.weight = torch.nn.Parameter(w)
                self.bias = torch.nn.Parameter(torch.linspace(-1, 1, 120))

            def transform(self, y):
                half = 1
                while half < 64:
                    a, b = y.reshape(-1, 32 // half, 2, half).unbind(2)
                    y = torch.stack([a + b, a - b], 2).reshape(-1, 64)
                    half *= 2
                return y

            def forward(self, x):
                wide = torch.nn.functional.pad(x.reshape(-1, 60), (0, 4))
                outs = []
                for w in self.weight:
                    y = wide
                    for pair in range(4):
                        y = torch.einsum("bni,noi->bno", y.reshape(-1, 16, 4), w[pair])
                        y = self.transform(y.reshape(-1, 64))
                    outs.append(y)
                y = 0.7 * torch.cat(outs, -1) + 0.3 * wide.repeat(1, 2)
                return (y[:, :120] + self.bias).reshape(*x.shape[:-1], 120)

        return Projection().eval()

    @pytest.mark.parametrize("way", ["export", "onnx"])
    def test_projection(self, way, tmp_path):
        torch = pytest.importorskip("torch")
        projection = self.module(torch)
        x = torch.from_numpy(models.rng(3).normal(size=(*ROWS, 60)).astype(np.float32))
        if way == "onnx":
            path = str(tmp_path / "model.onnx")
            torch.onnx.export(projection, (x,), path, dynamo=False, opset_version=17)
            source = tvmstruct.from_onnx(path)
        else:
            source = tvmstruct.from_torch(projection, (x,))
        model = tvmstruct.compile(source)
        (record,) = model.report().layers
        assert record.form == "bh4"
        assert record.parameters == {"b": 4, "repeats": 2, "decay": 0.7}
        with torch.no_grad():
            want = projection(x).numpy()
        np.testing.assert_allclose(model(x.numpy()), want, **BOUND)


@pytest.mark.parametrize("batch", [1, 16])
def test_overlapping_windows_of_slices_do_not_stop_the_search(batch):
    def body(emit, x):
        x = emit(R.reshape(x, (batch, 5, 16)))
        parts = [emit(R.strided_slice(x, [1], [i], [i + 4])) for i in (0, 1)]
        rows = emit(R.reshape(emit(R.concat(parts, 2)), (batch * 4, 32)))
        return R.matmul(rows, const(weights(32, 18)))

    mod = module(body, (batch, 1, 80))
    (x,) = random_inputs(mod)
    np.testing.assert_allclose(tvmstruct.compile(mod)(x), models.run_module(mod, [x])[0], **BOUND)
