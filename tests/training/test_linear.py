"""One module for every family: the operator's values, its gradients, its bits, its variances."""

from __future__ import annotations

import copy
import pickle

import numpy as np
import pytest

from tests.catalogue import CASES, EXPRESSIONS, Case, normal
from tvmstruct import embeddings, ops
from tvmstruct.families import FAMILIES
from tvmstruct.testing import tolerance

pytest.importorskip("torch")

import torch

from tvmstruct.training import StructuredEmbedding, StructuredLinear

over_expressions = pytest.mark.parametrize("name", EXPRESSIONS)
FAMILY_SIZES = {  # large enough for the law of large numbers
    "low_rank": ((96, 160), {"r": 24}),
    "vvma": ((128, 96), {"k": 16}),
    "kronecker": ((144, 144), {"r": 4}),
    "block_diagonal": ((120, 200), {"g": 4}),
    "lgp_shuffle": ((120, 200), {"g": 5}),
    "lgp_dense": ((120, 200), {"g": 4}),
    "low_rank_lgp": ((120, 200), {"g": 4, "r": 2}),
    "bh4": ((128, 256), {"b": 16}),
    "monarch": ((144, 144), {"b": 6}),
    "word2ket_xs": ((125, 125), {"order": 3, "r": 8}),
}


def single(op: ops.Op) -> ops.Op:
    return ops.cast(op, np.float32)


@over_expressions
@pytest.mark.parametrize("batch", [(), (3,), (2, 1, 4), (0, 2)], ids=str)
def test_forward_is_the_operator(name: str, batch: tuple[int, ...]) -> None:
    op = EXPRESSIONS[name]
    x = normal(*batch, op.n_in)
    y = StructuredLinear.from_operator(op)(torch.from_numpy(x)).detach().numpy()
    np.testing.assert_allclose(y, op.apply(x), **tolerance("float64", op.n_in, scale=100))


@over_expressions
def test_the_operator_comes_back_bit_for_bit(name: str) -> None:
    op = single(EXPRESSIONS[name])
    layer = StructuredLinear(op, bias=False)
    back = layer.operator()
    assert ops.describe(back) == ops.describe(op)
    for got, want in zip(back.arrays(), op.arrays(), strict=True):
        assert got.dtype == want.dtype
        assert got.tobytes() == want.tobytes()
    assert sum(p.numel() for p in layer.parameters()) == op.params
    names = [n for n, _ in layer.named_parameters()]
    assert names == ["weight", *(f"weight_{i}" for i in range(1, len(names)))][: len(names)]


@over_expressions
def test_gradients_are_those_of_the_dense_matrix(name: str) -> None:
    """The gradient with respect to x is that of a matrix; each array's by a finite step."""
    op = EXPRESSIONS[name]
    layer, x = StructuredLinear(op, bias=False), torch.from_numpy(normal(3, op.n_in))
    x.requires_grad_()
    v = normal(3, op.n_out)
    (layer(x) * torch.from_numpy(v)).sum().backward()
    want = v @ op.to_dense().T
    bound = tolerance("float64", op.n_out, scale=max(1.0, float(np.abs(want).max())))
    np.testing.assert_allclose(x.grad.numpy(), want, **bound)
    for parameter in layer.arrays():
        step = torch.from_numpy(normal(*parameter.shape)) * 1e-6
        with torch.no_grad():
            parameter += step
            up = (layer(x) * torch.from_numpy(v)).sum()
            parameter -= 2 * step
            down = (layer(x) * torch.from_numpy(v)).sum()
            parameter += step
        want = float(up - down) / 2
        assert parameter.grad is not None
        got = float((parameter.grad * step).sum())
        assert got == pytest.approx(want, rel=1e-4, abs=1e-9 * float(up.abs() + 1))


def test_an_array_used_twice_is_one_parameter_with_the_sum_of_its_gradients() -> None:
    op = EXPRESSIONS["array used twice"]
    layer = StructuredLinear(op, bias=False)
    assert [n for n, _ in layer.named_parameters()] == ["weight"]
    assert [uses for _, uses in layer.uses()] == [5]


def test_copies_pickles_and_state_dicts_compute_the_same() -> None:
    layer = StructuredLinear.of("vvma", 23, 31, k=6)
    other = StructuredLinear.of("vvma", 23, 31, k=6)
    other.load_state_dict(layer.state_dict())
    x = torch.randn(4, 23)
    for same in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer)), other):
        assert torch.equal(same(x), layer(x))
        assert not {p.data_ptr() for p in same.parameters()} & {
            p.data_ptr() for p in layer.parameters()
        }


def test_half_precision_becomes_single() -> None:
    layer = StructuredLinear(ops.cast(EXPRESSIONS["dense wide"], np.float16), bias=False)
    assert layer.weight.dtype == torch.float32


def test_a_bias_is_added() -> None:
    op = single(EXPRESSIONS["dense wide"])
    bias = normal(op.n_out).astype(np.float32)
    x = torch.randn(2, 3, op.n_in)
    layer = StructuredLinear.from_operator(op, bias)
    assert torch.equal(layer(x), StructuredLinear(op, bias=False)(x) + torch.from_numpy(bias))


@pytest.mark.parametrize("family", FAMILIES)
def test_initial_variance_is_that_of_a_dense_layer(family: str) -> None:
    (n_in, n_out), parameters = FAMILY_SIZES[family]
    torch.manual_seed(3)
    squares = []
    for _ in range(12):
        layer = StructuredLinear.of(family, n_in, n_out, bias=False, **parameters)
        squares.append((layer.operator().to_dense() ** 2).sum() / n_out)  # of y for unit x
    dense = (torch.nn.Linear(n_in, 400).weight ** 2).sum().item() / 400
    assert np.mean(squares) == pytest.approx(dense, rel=0.12)
    assert np.mean(squares) == pytest.approx(1 / 3, rel=0.1)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_every_case_can_be_initialised(case: Case) -> None:
    layer = StructuredLinear.of(case.family, *case.shape, **case.parameters)
    assert all(torch.isfinite(p).all() and p.abs().max() > 0 for p in layer.parameters())


def test_the_residual_of_bh4_does_not_drown_small_gains() -> None:
    """Its residual alone brings 0.09 of the variance: a gain of 0.05 is what the weights add."""
    from tvmstruct.training import initialise

    layer = StructuredLinear.of("bh4", 64, 64, bias=False, b=8)
    initialise(layer, 0.05)
    total = (layer.operator().to_dense() ** 2).sum() / 64
    assert total == pytest.approx(0.09 + 0.05, rel=0.3)


@pytest.mark.parametrize(("order", "r"), [(2, 3), (3, 2), (4, 1)])
def test_an_embedding_makes_the_rows_of_its_table(order: int, r: int) -> None:
    layer = StructuredEmbedding.of(70, 19, order=order, r=r)
    table = layer.table()
    assert isinstance(table, embeddings.Word2KetXS)
    ids = np.arange(70).reshape(2, 5, 7)
    got = layer(torch.from_numpy(ids)).detach().numpy()
    np.testing.assert_allclose(got, table.rows(ids), **tolerance("float32", 8, scale=10))
    assert sum(p.numel() for p in layer.parameters()) == table.params
    again = StructuredEmbedding(table).table()
    same = zip(again.factors, table.factors, strict=True)
    assert all(a.tobytes() == b.tobytes() for a, b in same)


def test_an_embedding_has_unit_variance() -> None:
    torch.manual_seed(0)
    rows = [StructuredEmbedding.of(256, 64, order=2, r=8)(torch.arange(256)) for _ in range(8)]
    assert torch.stack(rows).var().item() == pytest.approx(1, rel=0.1)
