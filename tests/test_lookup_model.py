"""LookupFFN from a module to compiled code: every precision of the tables, and the report."""

import numpy as np
import pytest
from tvm import relax

import tvmstruct
from tvmstruct.families import bh4
from tvmstruct.frontends.lookup import emit_lookup
from tvmstruct.lookup import Lookup
from tvmstruct.ops import Dense

R = relax.op


def lookup_module(lookup: Lookup, rows: int):
    """Return ``layer_norm(x + lookup(x))`` of x (rows, n), as encoders have it."""
    bb = relax.BlockBuilder()
    n = lookup.n_in
    x = relax.Var("x", relax.TensorType((rows, n), "float32"))
    ones, zeros = (relax.const(np.full(n, v, np.float32)) for v in (1, 0))
    with bb.function("main", [x]):
        with bb.dataflow():
            total = bb.emit(R.add(emit_lookup(bb, x, lookup), x))
            out = bb.emit_output(bb.emit(R.nn.layer_norm(total, ones, zeros, axes=[-1])))
        bb.emit_func_output(out)
    return bb.get()


def make(rng, projection, *, h: int, tau: int, n: int, flips: int = 0) -> Lookup:
    tables = rng.normal(size=(h, 1 << tau, n)).astype(np.float32)
    bias = rng.normal(size=n).astype(np.float32)
    return Lookup(projection, tables, bias=bias, flips=flips)


def expected(lookup: Lookup, x: np.ndarray) -> np.ndarray:
    y = x + lookup.apply(x.astype(np.float64))
    centred = y - y.mean(-1, keepdims=True)
    return centred / np.sqrt((centred**2).mean(-1, keepdims=True) + 1e-5)


@pytest.mark.parametrize("precision", ["f32", "bf16", "int8"])
def test_a_layer_with_bh4_in_every_precision(precision, rng):
    w = rng.normal(size=(1, 4, 16, 4, 4)) / 16
    lookup = make(rng, bh4(w.astype(np.float32), 50, 60), h=12, tau=5, n=50)
    x = rng.normal(size=(37, 50)).astype(np.float32)
    model = tvmstruct.compile(lookup_module(lookup, 37), precision=precision)
    found, want = model(x), expected(lookup, x)
    if precision == "f32":
        np.testing.assert_allclose(found, want, rtol=1e-4, atol=1e-4)
    else:  # a feature near zero may hash to another row once the projection is rounded
        error = np.linalg.norm(found - want, axis=1) / np.linalg.norm(want, axis=1)
        assert np.median(error) < 0.03
    tables = next(r for r in model.report().layers if r.form.startswith("lookup"))
    size = lookup.tables.size
    stored = {"f32": 4 * size, "bf16": 2 * size, "int8": size + 4 * 12 * 32}[precision]
    assert tables.bytes == stored + 4 * 50
    assert (tables.error == 0) == (precision == "f32")
    assert tables.error < 0.01
    assert "dense block 50-200-50" in tables.reason
    projection = next(r for r in model.report().layers if not r.form.startswith("lookup"))
    assert projection.form.split()[0] == "bh4"


def test_a_dense_projection_and_neighbours(rng):
    projection = Dense(rng.normal(size=(20, 12)).astype(np.float32))
    lookup = make(rng, projection, h=3, tau=4, n=20, flips=1)
    x = rng.normal(size=(5, 20)).astype(np.float32)
    model = tvmstruct.compile(lookup_module(lookup, 5))
    np.testing.assert_allclose(model(x), expected(lookup, x), rtol=1e-4, atol=1e-4)
    assert {r.form for r in model.report().layers} == {"dense", "lookup"}


def test_one_kernel_takes_bias_residual_and_normalisation(rng):
    projection = Dense(rng.normal(size=(20, 12)).astype(np.float32))
    model = tvmstruct.compile(lookup_module(make(rng, projection, h=3, tau=4, n=20), 5))
    model(np.zeros((5, 20), np.float32))
    assert "3 tables of 16 x 20" in str(model.energy())
    report = tvmstruct.profile(model, {"x": (5, 20)})
    assert {row.name for row in report.rows if row.calls} == {"lookup hash", "lookup gather"}


def test_tables_that_a_precision_cannot_hold_stay(rng):
    projection = Dense(rng.normal(size=(20, 12)).astype(np.float32))
    lookup = make(rng, projection, h=3, tau=4, n=20)
    tables = lookup.tables.astype(np.float64)
    tables[0, 0, 0] = 3.4e38  # more than the largest bfloat16
    lookup = Lookup(projection, tables.astype(np.float32))
    model = tvmstruct.compile(lookup_module(lookup, 5), precision="bf16")
    record = next(r for r in model.report().layers if r.form.startswith("lookup"))
    assert record.bytes == 4 * lookup.tables.size
