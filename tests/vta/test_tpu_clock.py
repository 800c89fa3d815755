"""Equations 2 and 3 of VVMA, and every row of its Tables 1 to 3 that prints clocks."""

import pytest

from tvmstruct.errors import InputError
from tvmstruct.vta.tpu_clock import ROWS, dense_clocks, vvma_clocks

TOLERANCE = 0.02
ROUNDING = 0.005  # tables print three digits


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.label)
def test_clocks_are_those_printed(row):
    assert row.clocks == pytest.approx(row.printed_clocks, rel=TOLERANCE)


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.label)
def test_layer_lists_have_the_printed_parameters(row):
    assert row.params == pytest.approx(row.printed_params, rel=ROUNDING)


def test_every_row_of_the_tables_is_there():
    assert [row.table for row in ROWS] == [1] * 8 + [2] * 5 + [3] * 3
    assert len({row.label for row in ROWS}) == len(ROWS)


@pytest.mark.parametrize(
    ("n", "m", "k", "t", "dense", "vvma"),
    [
        (1024, 1024, 32, 1, 1024 * 97, 96 + 1024),
        (33, 65, 32, 5, 2 * 3 * (96 + 5), 96 + 2 * 3 * 5),  # ragged: blocks are filled up
        (7, 5, 16, 3, 51, 51),  # one block: nothing to share
    ],
)
def test_equations(n, m, k, t, dense, vvma):
    assert dense_clocks(m, n, k, t) == dense
    assert vvma_clocks(m, n, k, t) == vvma


@pytest.mark.parametrize("name", ["inputs", "outputs", "k", "t"])
@pytest.mark.parametrize("clocks", [dense_clocks, vvma_clocks])
def test_sizes_below_one_are_refused(clocks, name):
    sizes = {"inputs": 8, "outputs": 8, "k": 4, "t": 1, name: 0}
    with pytest.raises(InputError, match=f"{name} is 0"):
        clocks(**sizes)
