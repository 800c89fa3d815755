"""Ids that are divided before they index a table: how many there are, and that lookups are safe."""

from __future__ import annotations

import numpy as np
import pytest
from onnx import helper

import tvmstruct
from tests import models
from tvmstruct.frontends.ranges import node_range


def lookup(*steps: tuple[str, int]):
    """Return the model that applies operators with a constant to ids and looks 5 rows up."""
    weights = {"table": models.weight(5, 3)}
    nodes, index = [], "ids"
    for i, (kind, number) in enumerate(steps):
        weights[f"c{i}"] = np.array(number, np.int64)
        nodes.append(helper.make_node(kind, [index, f"c{i}"], [f"v{i}"]))
        index = f"v{i}"
    nodes.append(helper.make_node("Gather", ["table", index], ["out"]))
    inputs = [models.value("ids", ["n"], models.INT64)]
    return models.make_model(nodes, inputs, [models.value("out", ["n", 3])], weights)


@pytest.mark.parametrize(
    ("steps", "tokens"),
    [
        ([("Div", 7)], {"ids": 35}),
        ([("Div", 2), ("Div", 3)], {"ids": 30}),
        ([("Div", -7)], {}),
        ([("Mod", 5)], {}),
        ([("Mul", 2)], {}),
    ],
    ids=str,
)
def test_a_row_stands_for_as_many_ids_as_are_divided_by(steps, tokens):
    assert tvmstruct.from_onnx(lookup(*steps)).token_inputs == tokens


def test_the_rows_are_those_of_the_quotient():
    model = lookup(("Div", 7))
    source = tvmstruct.from_onnx(model)
    ids = np.arange(35)
    assert "where" not in source.at({"ids": (35,)}).script()  # proven to stay in the table
    compiled = tvmstruct.compile(source, buckets="exact")
    np.testing.assert_array_equal(compiled(ids), models.run_onnx(model, {"ids": ids})[0])


@pytest.mark.parametrize(
    ("kind", "number", "by", "want"),
    [
        ("Div", (0, 34), (7, 7), (0, 4)),
        ("Mod", (0, 34), (7, 7), (0, 6)),
        ("Mod", (2, 4), (7, 7), (0, 4)),
        ("Div", (-1, 34), (7, 7), None),
        ("Mod", (0, 34), (-7, -7), None),
        ("Div", (0, 34), (0, 0), None),
        ("Div", (0, 34), (1, 7), None),
    ],
)
def test_bounds_of_quotients_and_remainders(kind, number, by, want):
    assert node_range(helper.make_node(kind, ["x", "y"], ["z"]), [number, by], {}) == want
