"""Einsum as transposes and one matmul equals numpy's."""

from __future__ import annotations

import numpy as np
import pytest
from onnx import helper

import tvmstruct
from tests import models
from tests.relax_modules import operators
from tvmstruct.testing import tolerance

SIZES = dict(zip("bhqkdn", (2, 3, 5, 7, 4, 6), strict=True))
PRODUCTS = [
    "bqhd,bkhd->bhqk",
    "bkhd,bqhd->bhqk",
    "bhqk,bkhd->bqhd",
    "bqd,dn->bqn",
    "qd,kd",
    "bqd,bkn->bn",
]
OTHERS = ["bqd->dbq", "bqd->b", "b...,...d->b...d", "qd,dk,kn->qn"]


def model_of(equation):
    terms = equation.split("->")[0].split(",")
    arrays = {
        f"x{i}": models.weight(*(SIZES[c] for c in t.replace("...", "q")), seed=i)
        for i, t in enumerate(terms)
    }
    node = helper.make_node("Einsum", list(arrays), ["y"], equation=equation)
    inputs = [models.value(n, a.shape) for n, a in arrays.items()]
    return models.make_model([node], inputs, [models.value("y", None)]), arrays


@pytest.mark.parametrize("equation", [*PRODUCTS, *OTHERS])
def test_equals_numpy(equation):
    proto, arrays = model_of(equation)
    mod = tvmstruct.from_onnx(proto).at({n: a.shape for n, a in arrays.items()})
    assert operators(mod).count("relax.matmul") == (equation in PRODUCTS)
    (found,) = models.run_module(mod, list(arrays.values()))
    np.testing.assert_allclose(
        found, np.einsum(equation, *arrays.values()), **tolerance("float32", 16)
    )


def test_rows_of_the_result_stand_left():
    """So the scores come out as (batch, heads, queries, keys), without a transpose after."""
    for equation in PRODUCTS[:2]:
        proto, arrays = model_of(equation)
        names = operators(tvmstruct.from_onnx(proto).at({n: a.shape for n, a in arrays.items()}))
        assert names[-2:] == ["relax.matmul", "relax.reshape"]
