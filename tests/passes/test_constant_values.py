"""Constant parts of a graph, computed with numpy, equal what TVM computes."""

from __future__ import annotations

import numpy as np
import pytest
from tvm import relax

from tests import models
from tests.relax_modules import R, const, module
from tvmstruct.passes.constant_values import evaluate
from tvmstruct.rewrite import Graph

C = models.weight(3, 5)


def causal_of_ranges(emit, x):
    columns = emit(R.expand_dims(emit(R.arange(0, 5, 1, "int64")), [0]))
    rows = emit(R.expand_dims(emit(R.arange(0, 3, 1, "int64")), [1]))
    keep = emit(R.less_equal(emit(R.subtract(columns, rows)), relax.const(0, "int64")))
    both = emit(R.logical_and(keep, emit(R.full((3, 5), relax.const(True, "bool"), "bool"))))
    return R.where(both, const(0.0), const(-np.inf))


CASES = {
    "ranges": causal_of_ranges,
    "triangle": lambda emit, x: R.triu(emit(R.full((3, 5), const(-2.0), "float32")), 1),
    "lower triangle": lambda emit, x: R.tril(const(C), -1),
    "layout": lambda emit, x: R.broadcast_to(
        emit(R.reshape(emit(R.permute_dims(const(C))), (1, 5, 3))), (2, 5, 3)
    ),
    "arithmetic": lambda emit, x: R.multiply(
        emit(R.negative(const(C))), emit(R.astype(emit(R.greater(const(C), const(0.1))), "float32"))
    ),
    "like": lambda emit, x: R.full_like(const(C), const(4.0)),
}


@pytest.mark.parametrize("case", CASES)
def test_equals_tvm(case):
    mod = module(CASES[case], (1,))
    (want,) = models.run_module(mod, [np.zeros(1, np.float32)])
    func = mod["main"]
    found = evaluate(Graph(func), func.body.body)
    assert found is not None
    assert found.dtype == want.dtype
    np.testing.assert_array_equal(found, want)


@pytest.mark.parametrize(
    "body",
    [
        lambda emit, x: R.add(x, const(1.0)),
        lambda emit, x: R.cumsum(const(C), 0),
        lambda emit, x: R.full((5000, 5000), const(1.0), "float32"),
    ],
    ids=["an input", "an unknown operator", "too large"],
)
def test_what_is_not_computed(body):
    func = module(body, (1,))["main"]
    assert evaluate(Graph(func), func.body.body) is None
