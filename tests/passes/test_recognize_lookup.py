"""Every spelling of LookupFFN becomes hash tables, with the numbers of ONNX Runtime."""

from __future__ import annotations

import numpy as np
import pytest

import tvmstruct
from tests import models
from tests.attention_spellings import Builder
from tests.lookup_spellings import REFUSED, SPELLINGS, TAU, H, N
from tests.relax_modules import nodes, transform
from tvmstruct.layers import HashTables, LayerTable
from tvmstruct.passes.clip_gathers import ClipGathers
from tvmstruct.passes.recognize_lookup import RecognizeLookup
from tvmstruct.testing import tolerance

BOUND = tolerance("float32", 256)
COMPILED = ("least_significant_first", "neighbours", "two_indices", "logarithms")


def recognised(proto):
    """Return the hash tables of a model, what the module still calls, and what was refused."""
    table = LayerTable()
    rule = RecognizeLookup(table, {}, {})
    mod, log = transform(tvmstruct.from_onnx(proto).at(), ClipGathers(), rule)
    found = [node for node in nodes(mod, table) if isinstance(node, HashTables)]
    return found, mod, log.rejected


@pytest.mark.parametrize("spelling", SPELLINGS, ids=lambda s: s.name)
def test_spelling(spelling):
    proto, _ = spelling.model()
    (node,), mod, refused = recognised(proto)
    assert not refused
    assert node.tables.shape == (H, 1 << TAU, N)
    assert (node.scaled, node.flips) == (spelling.scaled, spelling.flips)
    assert (node.bias is not None) == spelling.bias
    text = mod.script()
    assert "R.take" not in text
    assert "R.exp" not in text


@pytest.mark.parametrize("name", COMPILED)
def test_compiled(name):
    (spelling,) = [s for s in SPELLINGS if s.name == name]
    proto, inputs = spelling.model()
    model = tvmstruct.compile(tvmstruct.from_onnx(proto))
    (found,) = model.run(inputs).values()
    (want,) = models.run_onnx(proto, inputs)
    np.testing.assert_allclose(found, want, **BOUND)
    (record,) = [r for r in model.report().layers if r.form == "lookup"]
    assert record.shape == (H, 1 << TAU, N)
    assert record.macs == H * N * (1 + TAU * spelling.flips)
    assert record.bytes == 4 * (H * N << TAU) + 4 * N * spelling.bias


@pytest.mark.parametrize("name", REFUSED)
def test_refused(name):
    build, why = REFUSED[name]
    builder = Builder()
    found, _, refused = recognised(builder.build(build(builder)))
    assert not found
    ((_, _, reason),) = refused
    assert why in reason


def test_a_refusal_reaches_the_report():
    build, why = REFUSED["threshold"]
    builder = Builder()
    proto = builder.build(build(builder))
    model = tvmstruct.compile(tvmstruct.from_onnx(proto))
    (record,) = [r for r in model.report().layers if "recognize_lookup" in r.form]
    assert why in record.reason
    (found,) = model.run(builder.inputs).values()
    (want,) = models.run_onnx(proto, builder.inputs)
    np.testing.assert_allclose(found, want, **BOUND)


@pytest.mark.parametrize(
    ("precision", "form", "bound"),
    [
        ("bf16-weights", "lookup bf16", 0.01),
        pytest.param("int8", "lookup int8", 0.02, marks=pytest.mark.isa("avx512vnni")),
    ],
)
def test_tables_in_lower_precision(precision, form, bound):
    (spelling,) = [s for s in SPELLINGS if s.name == "public_code"]
    proto, inputs = spelling.model()
    model = tvmstruct.compile(tvmstruct.from_onnx(proto), precision=precision)
    (record,) = [r for r in model.report().layers if r.form.startswith("lookup")]
    assert record.form == form
    assert 0 < record.error < bound
    item, scales = (2, 0) if precision != "int8" else (1, H << TAU)
    assert record.bytes == item * (H * N << TAU) + 4 * scales
    (found,), (want,) = model.run(inputs).values(), models.run_onnx(proto, inputs)
    assert np.linalg.norm(found - want) < 0.1 * np.linalg.norm(want)


def test_more_neighbours_than_a_kernel_takes_are_refused():
    class Kernels:
        def hashes(self, tables):
            return tables.entries < 5

    (spelling,) = [s for s in SPELLINGS if s.name == "neighbours"]
    proto, _ = spelling.model()
    rule = RecognizeLookup(LayerTable(), {}, {}, Kernels())
    _, log = transform(tvmstruct.from_onnx(proto).at(), ClipGathers(), rule)
    ((_, _, why),) = log.rejected
    assert why == "no kernel reads 5 rows a table"
