"""The embedding kernel against the paper's equations in float64, on every ISA of this machine."""

from __future__ import annotations

import hypothesis.strategies as st
import numpy as np
import pytest
import tvm
from hypothesis import given, settings

from tests.embedding_reference import ket_row, layer_norm, xs_row
from tests.kernels import build, call, every_isa, gamma_and_beta
from tvmstruct.embeddings import TensorTable, Word2Ket, Word2KetXS
from tvmstruct.schedules.compute.embedding import EmbeddingSum, Rows, pack_table, tensors_of
from tvmstruct.schedules.x86.embedding_rows import PARALLEL_ELEMENTS, embedding_rows
from tvmstruct.targets import ISAS, host_features
from tvmstruct.testing import tolerance

rng = np.random.default_rng(9)
XS = {  # (t, q) of each factor, rank, vocabulary, dimension
    "order 2, lines of 20": ([(7, 20), (6, 20)], 5, 40, 384),
    "order 2, short lines": ([(4, 7), (5, 7)], 3, 20, 37),
    "order 2, whole vectors": ([(3, 5), (4, 32)], 2, 11, 150),
    "order 2, less than a line": ([(3, 4), (4, 33)], 2, 12, 21),
    "order 2, one feature": ([(3, 1), (4, 1)], 1, 12, 1),
    "order 2, wide": ([(2, 9), (2, 150)], 2, 4, 1301),
    "order 3": ([(3, 4), (2, 5), (4, 4)], 4, 23, 77),
    "order 4": ([(2, 5)] * 4, 2, 16, 300),
    "order 5": ([(2, 3)] * 5, 1, 31, 200),
    "order 6": ([(2, 2), (1, 3), (2, 2), (2, 2), (1, 2), (2, 3)], 3, 15, 140),
}
KET = {  # vocabulary, rank, order, q; dimension
    "order 2": ((9, 3, 2, 7), 45),
    "order 3": ((9, 2, 3, 4), 50),
    "order 4": ((9, 5, 4, 4), 250),
    "order 8": ((5, 2, 8, 2), 255),
}


def make_xs(shapes, rank: int, vocabulary: int, dimension: int) -> Word2KetXS:
    factors = tuple(rng.standard_normal((rank, t, q), np.float32) for t, q in shapes)
    return Word2KetXS(factors, vocabulary, dimension)


def make_ket(shape, dimension: int, norm: float | None) -> Word2Ket:
    return Word2Ket(rng.standard_normal(shape, np.float32) + np.float32(0.3), dimension, norm)


def expected(table: TensorTable, ids: np.ndarray) -> np.ndarray:
    if isinstance(table, Word2KetXS):
        return np.stack([xs_row(table.factors, int(i), table.dimension) for i in ids])
    assert isinstance(table, Word2Ket)
    return np.stack([ket_row(table.tensors[i], table.dimension, table.norm) for i in ids])


def bound(table: TensorTable, want: np.ndarray):
    return tolerance("float32", table.rank, scale=float(np.abs(want).max()))


def check(isa, table: TensorTable, count: int = 19) -> None:
    spec = EmbeddingSum(table.dimension, (tensors_of(table, "int64"),))
    lib = build(isa, {"f": embedding_rows(isa, spec).func})
    ids = rng.integers(0, table.vocabulary, count)
    ids[[0, -1]] = 0, table.vocabulary - 1  # the ends of the packed tables
    found = call(lib["f"], [*pack_table(table), tvm.runtime.tensor(ids)], count, table.dimension)
    want = expected(table, ids)
    np.testing.assert_allclose(found, want, **bound(table, want))


@every_isa
@pytest.mark.parametrize("case", XS.values(), ids=XS)
def test_word2ket_xs_rows_are_equation_3_4(isa, case) -> None:
    check(isa, make_xs(*case))


@every_isa
@pytest.mark.parametrize("norm", [None, 1e-5], ids=["plain", "normalised"])
@pytest.mark.parametrize("case", KET.values(), ids=KET)
def test_word2ket_rows_are_equation_3_3(isa, case, norm) -> None:
    check(isa, make_ket(*case, norm))


TABLE = make_xs([(7, 20), (6, 20)], 5, 40, 384)


@every_isa
@pytest.mark.parametrize("made", [True, False], ids=["made", "dense"])
@pytest.mark.parametrize("n", [384, 37])
def test_word_position_and_type_are_summed_and_normalised(isa, made: bool, n: int) -> None:
    batch, length = 3, 5
    table = make_xs([(7, 20), (6, 20)], 5, 40, n)
    word = tensors_of(table, "int64", 1.5) if made else Rows(40, "int64", 1.5)
    spec = EmbeddingSum(n, (word, Rows(2, "int32"), Rows(length), Rows(1)), norm=1e-6)
    lib = build(isa, {"f": embedding_rows(isa, spec).func})
    count = batch * length
    ids, kinds = rng.integers(0, 40, count), rng.integers(0, 2, count, dtype=np.int32)
    types, places, one = (rng.standard_normal((s, n), np.float32) for s in (2, length, 1))
    words = expected(table, np.arange(40))
    first = pack_table(table) if made else [words.astype(np.float32)]
    gamma, beta = gamma_and_beta(n)
    others = [types, tvm.runtime.tensor(kinds), places, one, gamma, beta]
    found = call(lib["f"], [*first, tvm.runtime.tensor(ids), *others], count, n)
    total = 1.5 * words[ids] + types[kinds] + np.tile(places, (batch, 1)) + one
    want = layer_norm(total, gamma, beta, 1e-6)
    np.testing.assert_allclose(found, want, **tolerance("float32", n, scale=4))


@pytest.mark.parametrize("made", [True, False], ids=["made", "dense"])
def test_any_number_of_rows_and_any_id(made: bool) -> None:
    isa = next(isa for isa in ISAS if isa.name == "sse")
    term = tensors_of(TABLE, "int64") if made else Rows(40, "int64")
    spec = EmbeddingSum(384, (term,))
    lib = build(isa, {"f": embedding_rows(isa, spec).func})
    words = expected(TABLE, np.arange(40))
    tables = pack_table(TABLE) if made else [words.astype(np.float32)]
    for count in (0, 1, 16, PARALLEL_ELEMENTS // 384 + 3):  # serial, and tasks of many threads
        ids = rng.integers(-5, 50, count)  # outside the table: its nearest row, as with clip
        found = call(lib["f"], [*tables, tvm.runtime.tensor(ids)], count, 384)
        want = words[np.clip(ids, 0, 39)]
        np.testing.assert_allclose(found, want, **bound(TABLE, words))


@st.composite
def random_tables(draw) -> TensorTable:
    order, rank = draw(st.integers(2, 6)), draw(st.integers(1, 5))
    side = st.integers(1, {2: 40, 3: 9, 4: 5}.get(order, 3))
    if draw(st.booleans()):
        shapes = [(draw(st.integers(1, 3)), draw(side)) for _ in range(order)]
        rows, columns = (int(np.prod(n)) for n in zip(*shapes, strict=True))
        sizes = draw(st.integers(1, rows)), draw(st.integers(1, columns))
        return make_xs(shapes, rank, *sizes)
    q = draw(side)
    norm = draw(st.sampled_from([None, 1e-5]))
    return make_ket((3, rank, order, q), draw(st.integers(1, q**order)), norm if q > 1 else None)


@settings(max_examples=20, deadline=None)
@given(random_tables())
def test_any_order_rank_and_side(table: TensorTable) -> None:
    check(next(isa for isa in ISAS if isa.needs <= host_features()), table, count=5)


def test_two_tensor_products_in_one_sum_are_refused() -> None:
    term = tensors_of(TABLE, "int64")
    with pytest.raises(ValueError, match="want one tensor product at most"):
        embedding_rows(ISAS[-1], EmbeddingSum(384, (term, term)))
