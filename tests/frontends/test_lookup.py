"""Operators and lookups written in plain Relax mean what numpy says, and are read back."""

from __future__ import annotations

import numpy as np
import pytest

import tvmstruct
from tests import models
from tests.catalogue import EXPRESSIONS
from tests.relax_modules import module
from tvmstruct import ops
from tvmstruct.families import bh4
from tvmstruct.frontends.lookup import emit_lookup, emit_operator
from tvmstruct.lookup import Lookup
from tvmstruct.testing import tolerance


class _Builder:
    """A block builder that only emits."""

    def __init__(self, emit) -> None:
        self.emit = emit


def as_module(write, *shape):
    return module(lambda emit, x: write(_Builder(emit), x), shape)


@pytest.mark.parametrize("name", ["sum", "product", "hadamard of runs", "features repeated"])
def test_operator(name):
    op = EXPRESSIONS[name]
    x = models.rng(1).normal(size=(2, 3, op.n_in)).astype(np.float32)
    mod = as_module(lambda bb, x: emit_operator(bb, x, op), *x.shape)
    (found,) = models.run_module(mod, [x])
    np.testing.assert_allclose(found, op.apply(x), **tolerance("float32", op.n_in, scale=10))


def random_lookup(**options) -> Lookup:
    """Return three tables of 32 rows behind a BH4 of 64 features."""
    rng = models.rng(5)
    h, tau, n_in, n = 20, 5, 60, 6
    w = rng.normal(size=(2, 4, 16, 4, 4)) / np.sqrt(4 * 64)
    projection = ops.cast(bh4(w, n_in, h * tau), "float32")
    tables = rng.normal(size=(h, 1 << tau, n)).astype(np.float32)
    biases = [rng.normal(size=size).astype(np.float32) for size in (h * tau, n)]
    return Lookup(projection, tables, *biases, **options)


@pytest.mark.parametrize(
    "options", [{}, {"scaled": False}, {"flips": 1}, {"flips": 2, "scaled": False}], ids=str
)
def test_lookup_is_read_back_and_computes_what_numpy_does(options):
    lookup = random_lookup(**options)
    x = models.rng(2).normal(size=(2, 5, 60)).astype(np.float32)
    model = tvmstruct.compile(as_module(lambda bb, x: emit_lookup(bb, x, lookup), *x.shape))
    assert [r.form for r in model.report().layers] == ["bh4", "lookup"]
    want = lookup.apply(x.astype(np.float64))
    np.testing.assert_allclose(model(x), want, **tolerance("float32", 256, scale=10))
