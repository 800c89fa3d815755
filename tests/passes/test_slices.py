"""Slices of one axis, and which of them rows can be read through."""

from __future__ import annotations

import numpy as np
import pytest
from tvm import relax

from tests.relax_modules import R, module
from tvmstruct.passes.factors import Factor
from tvmstruct.passes.slices import in_place
from tvmstruct.passes.views import arrange_array, view
from tvmstruct.rewrite import Graph

SLICES = {
    "begin and end": (lambda e, x: R.strided_slice(x, [1], [2], [5]), np.s_[:, 2:5], True),
    "from the end": (lambda e, x: R.strided_slice(x, [-1], [-2], [4]), np.s_[:, :, 2:], True),
    "even parts": (lambda e, x: e(R.split(x, 3, 1))[1], np.s_[:, 2:4], True),
    "uneven parts": (lambda e, x: e(R.split(x, [1, 4], 1))[2], np.s_[:, 4:], True),
    "one place": (lambda e, x: R.take(x, relax.const(3), 1), np.s_[:, 3], True),
    "steps": (lambda e, x: R.strided_slice(x, [1], [0], [6], [2]), np.s_[:, ::2], False),
    "two axes": (lambda e, x: R.strided_slice(x, [0, 1], [1, 2], [2, 5]), np.s_[1:2, 2:5], False),
    "a part of two loops": (
        lambda e, x: R.strided_slice(e(R.reshape(e(R.permute_dims(x)), (24, 2))), [0], [2], [5]),
        None,
        False,
    ),
}


@pytest.mark.parametrize("case", SLICES)
def test_slices(case):
    body, index, seen = SLICES[case]
    func = module(body, (2, 6, 4))["main"]
    found = view(Graph(func), func.body.body, "x", slices=True)
    assert found.sliced == seen
    assert view(Graph(func), func.body.body, "x").root.same_as(func.params[0]) is False
    if seen:
        array = np.arange(48).reshape(2, 6, 4)
        rest = array.reshape(-1)[found.offset :]
        np.testing.assert_array_equal(arrange_array(rest, "x", found.axes), array[index])


def loops(*pairs):
    return [Factor(size, {"x": stride} if stride else {}) for size, stride in pairs]


@pytest.mark.parametrize(
    ("rows", "columns", "offset", "width"),
    [
        (loops((2, 36), (3, 12)), loops((2, 2), (2, 1)), 4, 12),
        (loops((2, 36), (3, 12)), loops((2, 2), (2, 1)), 9, None),  # over the end of a row
        (loops((3, 12), (2, 36)), loops((4, 1)), 0, None),  # rows in another order
        (loops((2, 36), (3, 12)), loops((2, 6), (2, 1)), 0, None),  # heads apart from each other
        (loops((6, 12)), loops((2, 0), (2, 1)), 0, None),  # repeated
        (loops((2, 36)), loops((4, 1)), 12, 36),  # one position of each of two batches
        (loops((5, 12)), loops((4, 1)), 0, None),  # some of the rows
    ],
)
def test_in_place(rows, columns, offset, width):
    root = relax.Var("x", relax.TensorType([6, 12], "float32"))
    assert in_place(root, "x", offset, rows, columns) == width
