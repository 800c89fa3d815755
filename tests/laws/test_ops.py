"""Laws of the operator algebra over the whole catalogue."""

from __future__ import annotations

import dataclasses

import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import given, settings

from tests.catalogue import EXPRESSIONS, NODES, node_types_in, normal
from tvmstruct import ops
from tvmstruct.families import bh4
from tvmstruct.ops import Op
from tvmstruct.testing import tolerance

over_catalogue = pytest.mark.parametrize("op", EXPRESSIONS.values(), ids=EXPRESSIONS.keys())


class Counted:
    """A parameter that counts the products it takes part in."""

    count = 0

    def __init__(self, value: float) -> None:
        self.value = value

    def __mul__(self, other: float) -> float:
        Counted.count += 1
        return self.value * other

    __rmul__ = __mul__


def dense_of(op: Op) -> np.ndarray:
    """Return the matrix by applying the operator to one unit vector at a time."""
    return np.stack([op.apply(row) for row in np.eye(op.n_in)])


@over_catalogue
@pytest.mark.parametrize("batch", [(), (1,), (3, 5), (0,), (2, 0)], ids=str)
def test_apply_equals_dense(op: Op, batch: tuple[int, ...]) -> None:
    x = normal(*batch, op.n_in)
    close = tolerance("float64", op.n_in, scale=float(np.abs(op.to_dense()).max()))
    np.testing.assert_allclose(op.apply(x), x @ dense_of(op), **close)


@over_catalogue
def test_to_dense_has_the_shape_of_a_matmul_operand(op: Op) -> None:
    dense = op.to_dense()
    assert dense.shape == (op.n_in, op.n_out)
    np.testing.assert_allclose(
        dense, dense_of(op), **tolerance("float64", op.n_in, scale=float(np.abs(dense).max()))
    )


@over_catalogue
def test_transpose_is_the_transposed_matrix(op: Op) -> None:
    mirrored = ops.transpose(op)
    close = tolerance("float64", op.n_in + op.n_out, scale=float(np.abs(op.to_dense()).max()))
    np.testing.assert_allclose(dense_of(mirrored), op.to_dense().T, **close)
    assert mirrored.params == op.params


@over_catalogue
def test_macs_are_counted_by_instrumented_arrays(op: Op) -> None:
    def instrument(a: np.ndarray) -> np.ndarray:
        return np.array([Counted(v) for v in a.reshape(-1)], object).reshape(a.shape)

    Counted.count = 0
    ops.map_arrays(op, instrument).apply(np.ones(op.n_in, object))
    assert op.macs == Counted.count


@over_catalogue
def test_params_count_each_array_once(op: Op) -> None:
    sizes: list[int] = []
    ops.map_arrays(op, lambda a: sizes.append(a.size) or a)
    assert op.params == sum(sizes)


@over_catalogue
def test_apply_keeps_float32(op: Op) -> None:
    x = normal(3, op.n_in).astype(np.float32)
    y = ops.cast(op, np.float32).apply(x)
    assert y.dtype == np.float32
    reference = op.apply(x.astype(np.float64))
    scale = float(np.abs(op.to_dense()).max())
    np.testing.assert_allclose(y, reference, **tolerance("float32", 4 * op.n_in, scale=scale))


@over_catalogue
def test_map_arrays_keeps_the_expression(op: Op) -> None:
    same = ops.map_arrays(op, lambda a: a)
    assert ops.describe(same) == ops.describe(op) == repr(op)
    assert [a is b for a, b in zip(same.arrays(), op.arrays(), strict=True)].count(False) == 0


@over_catalogue
def test_wrong_width_is_refused(op: Op) -> None:
    with pytest.raises(ValueError, match=rf"want \(\.\.\., {op.n_in}\)"):
        op.apply(np.zeros((2, op.n_in + 1)))


def test_every_node_type_is_in_the_catalogue() -> None:
    leaves = {c for c in Op.__subclasses__() if dataclasses.is_dataclass(c)}
    assert set().union(*map(node_types_in, NODES.values())) == leaves
    assert len(leaves) == 10


def test_matmul_and_add_flatten_and_agree_with_dense_algebra() -> None:
    a, b, c = (ops.Dense(normal(p, q)) for p, q in ((3, 4), (4, 4), (4, 2)))
    chain = a @ ((b + ops.Diag(normal(4))) @ c)
    assert isinstance(chain, ops.Product)
    assert len(chain.factors) == 3
    dense = a.to_dense() @ chain.factors[1].to_dense() @ c.to_dense()
    np.testing.assert_allclose(chain.to_dense(), dense, **tolerance("float64", 16))
    total = (b + b) + (ops.Slice(4, 4) + b)
    assert isinstance(total, ops.Sum)
    assert len(total.terms) == 4
    np.testing.assert_allclose(
        total.to_dense(), 3 * b.to_dense() + np.eye(4), **tolerance("float64", 4)
    )


def test_hadamard_counts_additions_only() -> None:
    op = ops.WalshHadamard(16, blocks=3)
    assert (op.macs, op.params, op.adds) == (0, 0, 3 * 16 * 4)
    assert (op + ops.scaling(48, 2.0)).adds == op.adds + 48


def test_bh4_flops_are_the_ones_that_the_paper_prints() -> None:
    op = bh4(np.zeros((2, 4, 8, 64, 64)), 512, 1024, decay=1.0)
    assert round((2 * op.macs + op.adds) / 1e6, 2) == 0.56


def test_a_shared_array_stays_shared() -> None:
    op = NODES["array used twice"]
    assert op.params == 6
    assert ops.transpose(ops.cast(op, np.float32)).params == 6


INVALID = {
    "yields 16 features but factor 1 .SharedBlockDiag. takes 12; operators apply left": (
        lambda: ops.SharedBlockDiag(normal(3, 4), 4) @ ops.SharedBlockDiag(normal(3, 4), 4)
    ),
    "Sum: term 0 .Dense. is 3x4 but term 1 .Dense. is 4x3": (
        lambda: ops.Dense(normal(3, 4)) + ops.Dense(normal(4, 3))
    ),
    r"Dense: w has shape \(3,\); want \(n_in, n_out\)": lambda: ops.Dense(normal(3)),
    r"BlockDiag: w has shape \(2, 0, 3\); want \(g, p, q\)": lambda: ops.BlockDiag(normal(2, 0, 3)),
    "Dense: w is a list; want a numpy array": lambda: ops.Dense([[1.0]]),  # pyright: ignore
    "SharedBlockDiag: blocks=0; want blocks >= 1": lambda: ops.SharedBlockDiag(normal(2, 2), 0),
    r"Permute: dims=\(2, 3\) and axes=\(0, 0\)": lambda: ops.Permute((2, 3), (0, 0)),
    r"Diag: d has shape \(2, 2\); want \(n\)": lambda: ops.Diag(normal(2, 2)),
    "WalshHadamard: n=12 is not a power of two; pad the features to 16": (
        lambda: ops.WalshHadamard(12)
    ),
    "WalshHadamard: scale=nan": lambda: ops.WalshHadamard(4, scale=float("nan")),
    "Slice: start=2, stop=9 of width=8": lambda: ops.Slice(8, 9, 2),
    "Pad: size=4 at start=2 does not fit width=5": lambda: ops.Pad(4, 5, 2),
    "Sum: no terms": lambda: ops.Sum(()),
    "Product: no factors": lambda: ops.Product(()),
}


@pytest.mark.parametrize("message", INVALID)
def test_invalid_nodes_say_what_is_wrong(message: str) -> None:
    with pytest.raises(ValueError, match=message):
        INVALID[message]()


def node_on(draw: st.DrawFn, n: int) -> Op:
    """Draw a node or a sum that takes ``n`` features."""
    divisors = [d for d in range(1, n + 1) if n % d == 0]
    g, q = draw(st.sampled_from(divisors)), draw(st.integers(1, 4))
    stop = draw(st.integers(1, n))
    choices: list[Op] = [
        ops.Dense(normal(n, q)),
        ops.BlockDiag(normal(g, n // g, q)),
        ops.SharedBlockDiag(normal(n // g, q), g),
        ops.swap(g, n // g),
        ops.Diag(normal(n)),
        ops.Slice(n, stop, draw(st.integers(0, stop - 1))),
        ops.Pad(n, n + q, draw(st.integers(0, q))),
        ops.Pad(n, ops.next_power_of_two(n)) @ ops.WalshHadamard(ops.next_power_of_two(n), 0.5),
        ops.Dense(normal(n, n)) + ops.scaling(n, 0.5),
    ]
    return draw(st.sampled_from(choices))


@st.composite
def expressions(draw: st.DrawFn) -> Op:
    op = node_on(draw, draw(st.integers(1, 12)))
    for _ in range(draw(st.integers(0, 4))):
        op = op @ node_on(draw, op.n_out)
    return op


@settings(max_examples=80, deadline=None)
@given(expressions(), st.lists(st.integers(0, 3), max_size=3))
def test_random_expressions_obey_the_laws(op: Op, batch: list[int]) -> None:
    x = normal(*batch, op.n_in)
    dense = op.to_dense()
    close = tolerance("float64", 4096, scale=max(1.0, float(np.abs(dense).max())))
    np.testing.assert_allclose(op.apply(x), x @ dense_of(op), **close)
    np.testing.assert_allclose(ops.transpose(op).to_dense(), dense.T, **close)
    assert op.apply(x).shape == (*batch, op.n_out)
    assert op.params == sum(a.size for a in op.arrays())
