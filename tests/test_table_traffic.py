"""Bytes of lookups, counted by hand: few rows of large tables, and few tables of many rows."""

from __future__ import annotations

import numpy as np
import pytest

from tvmstruct.caches import L1, L2, L3, MEMORY, Caches
from tvmstruct.embeddings import Word2KetXS
from tvmstruct.layers import Embedding, HashTables
from tvmstruct.lookup_cost import Walk, distinct_rows, gather_traffic
from tvmstruct.schedules.compute.embedding import EmbeddingSum, Rows, tensors_of
from tvmstruct.table_traffic import lookup_traffic, notes, table_size, touched_bytes

N, TOKENS = 12, 21
CACHES = Caches(l1=4 << 10, l2=32 << 10, l3=256 << 10)


def embedding() -> Embedding:
    """Return the sum of a word table of 96 kB, factors of 5 kB, and 7 rows that repeat."""
    rng = np.random.default_rng(0)
    factors = tuple(rng.normal(size=(3, t, q)).astype("f4") for t, q in ((41, 4), (60, 5)))
    table = Word2KetXS(factors, 2400, N)
    terms = (Rows(2000, "int64"), tensors_of(table, "int64"), Rows(7))
    return Embedding(EmbeddingSum(N, terms), ("words", "made", ""), table)


def test_rows_come_from_where_their_table_is():
    moved = lookup_traffic(embedding(), TOKENS, CACHES)
    assert moved[L3] == 4 * TOKENS * N  # of 2000 rows
    assert moved[L2] == 4 * TOKENS * 3 * (4 + 5)  # leaves of three terms
    assert moved[L1] == 2 * 4 * TOKENS * N  # the repeated rows, and the result
    assert moved[MEMORY] == 0
    far = lookup_traffic(embedding(), TOKENS, CACHES, home=L3)
    assert (far[L3], far[L2]) == (4 * TOKENS * (2 * N + 3 * 9), 0)  # all but the result


def test_no_more_of_a_table_is_touched_than_there_is():
    few, many = (touched_bytes(embedding(), rows) for rows in (1, 10**6))
    assert few == 4 * (N + 3 * (4 + 5) + N)
    assert many == 4 * (2000 * N + 3 * (41 * 4 + 60 * 5) + 7 * N)


@pytest.mark.parametrize(("precision", "item", "columns"), [("f32", 4, 32), ("int8", 1, 128)])
def test_hash_tables_are_walked_as_their_kernel_does(precision, item, columns):
    node = HashTables(("t",), np.zeros((6, 16, 40), np.float32), flips=1, precision=precision)
    size = table_size(node)
    assert (size.h, size.tau, size.n_out, size.item) == (6, 4, 40, item)
    assert size.rows == 6 * (1 + 4)
    want = gather_traffic(size, TOKENS, CACHES, Walk(columns=columns))
    assert lookup_traffic(node, TOKENS, CACHES) == want
    touched = touched_bytes(node, TOKENS)
    assert touched == pytest.approx(distinct_rows(4, 5 * TOKENS) * 6 * 40 * item)
    assert touched <= 6 * 16 * 40 * item


def test_tables_of_many_bits_have_slices_of_one_cache_line():
    node = HashTables(("t",), np.zeros((2, 512, 40), np.float32))
    assert lookup_traffic(node, 3, CACHES) == gather_traffic(
        table_size(node), 3, CACHES, Walk(columns=16)
    )


def test_the_report_says_what_tables_take_and_where_they_are():
    node = HashTables(("layer.tables",), np.zeros((128, 256, 512), np.float32))
    (line,) = notes(node, Caches())
    assert "layer.tables: 128 tables of 256 x 512: 67.1 MB, 8.0 times the memory of" in line
    assert "dense block's 8.4 MB; tables in memory (of 4 times as many hidden" in line
    assert list(notes(embedding(), CACHES)) == [
        "words: 0.096 MB, rows read from L3",
        "made: 0.00557 MB, rows read from L2",
    ]
