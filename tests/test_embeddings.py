"""Tensor-product tables in numpy: rows, inner products, and what they refuse."""

from __future__ import annotations

import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import given, settings

from tests.embedding_reference import ket_row, xs_row
from tvmstruct.embeddings import Word2Ket, Word2KetXS
from tvmstruct.errors import InputError
from tvmstruct.testing import tolerance


@st.composite
def tables(draw) -> Word2KetXS | Word2Ket:
    order, rank = draw(st.integers(2, 6)), draw(st.integers(1, 4))
    side = st.integers(1, 3 if order > 3 else 6)
    rng = np.random.default_rng(draw(st.integers(0, 9)))
    if draw(st.booleans()):
        shapes = [(draw(side), draw(side)) for _ in range(order)]
        rows, columns = np.prod(shapes, axis=0)
        sizes = draw(st.integers(1, int(rows))), draw(st.integers(1, int(columns)))
        return Word2KetXS(tuple(rng.normal(size=(rank, *s)) for s in shapes), *sizes)
    q, vocabulary = draw(side), draw(st.integers(1, 5))
    dimension = draw(st.integers(1, q**order))
    return Word2Ket(rng.normal(size=(vocabulary, rank, order, q)), dimension)


def reference(table: Word2KetXS | Word2Ket) -> np.ndarray:
    if isinstance(table, Word2KetXS):
        return np.stack(
            [xs_row(table.factors, i, table.dimension) for i in range(table.vocabulary)]
        )
    return np.stack([ket_row(t, table.dimension, table.norm) for t in table.tensors])


@settings(max_examples=150, deadline=None)
@given(tables())
def test_rows_inner_products_and_operator_are_those_of_the_whole_table(table) -> None:
    want = reference(table)
    ids = np.arange(table.vocabulary)
    scale = {"scale": max(1.0, float(np.abs(want).max()))}
    np.testing.assert_allclose(table.rows(ids), want, **tolerance("float64", 16, **scale))
    gram = want @ want.T
    scale = {"scale": max(1.0, float(np.abs(gram).max()))}
    found = table.inner(ids[:, None], ids[None, :])
    np.testing.assert_allclose(found, gram, **tolerance("float64", 64, **scale))
    if isinstance(table, Word2KetXS):
        dense = table.operator.to_dense()
        np.testing.assert_allclose(dense, want, **tolerance("float64", 64, **scale))


@pytest.mark.parametrize("order", [2, 3, 4, 8])
def test_normalised_tree_is_the_papers(order: int) -> None:
    tensors = np.random.default_rng(order).normal(size=(6, 3, order, 3))
    table = Word2Ket(tensors, 3**order - 2, norm=1e-5)
    np.testing.assert_allclose(
        table.rows([[5, 0], [1, 1]]), reference(table)[[[5, 0], [1, 1]]], **tolerance("float64", 99)
    )
    with pytest.raises(ValueError, match="rows with LayerNorm do not factor"):
        table.inner(0, 1)


def test_parameters_are_counted() -> None:
    factors = tuple(np.zeros((1, 19, 5), np.float32) for _ in range(4))
    assert Word2KetXS(factors, 118_655, 300).params == 380  # the paper's Figure 5
    assert Word2Ket(np.zeros((7, 5, 4, 4)), 256).params == 7 * 80  # its Figure 3: 20 vectors of 4


TABLE = Word2KetXS((np.ones((2, 3, 4)), np.ones((2, 5, 2))), 14, 7)


@pytest.mark.parametrize(
    ("ids", "message"),
    [
        ([0, 14], "ids from 0 to 14; the table has the rows 0 to 13"),
        ([-1], "ids from -1 to -1; the table has the rows 0 to 13"),
        ([0.5], "ids are float64; want integers"),
    ],
)
def test_ids_outside_the_table_are_refused(ids: list, message: str) -> None:
    for ask in (TABLE.rows, lambda i: TABLE.inner(0, i)):
        with pytest.raises(InputError, match=message):
            ask(ids)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Word2KetXS(TABLE.factors, 16, 7), "cannot be cropped to 16x7"),
        (lambda: Word2KetXS(TABLE.factors[:1], 3, 4), "want 2 to 6 of"),
        (lambda: Word2Ket(np.ones((3, 2, 2)), 4), r"want \(vocabulary, rank, order, q\)"),
        (lambda: Word2Ket(np.ones((3, 2, 1, 4)), 4), "order 2 or more"),
        (lambda: Word2Ket(np.ones((3, 2, 2, 2)), 5), "dimension=5 of 2.2 features; want 1 to 4"),
        (lambda: Word2Ket(np.ones((3, 2, 2, 2)), 4, -1.0), "norm=-1.0; want a positive epsilon"),
    ],
)
def test_tables_that_do_not_fit_are_refused(make, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()
