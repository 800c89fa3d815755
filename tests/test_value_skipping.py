"""V-Gen skipping: ``skip=`` where attention makes its own values, ``memory="minimal"``."""

from __future__ import annotations

from functools import cache

import numpy as np

import tvmstruct
from tvmstruct import models, skip_measure
from tvmstruct.skip_analysis import analyse
from tvmstruct.skipping import Skip

SIZES = "hidden=64&heads=4&ffn=96&layers=1&embeddings=false"
NAMES = {"bert": f"bert?{SIZES}&seq=70", "transformer": f"transformer?{SIZES}&seq=33"}
BUCKETS = {"bert": {"sequence": 70}, "transformer": {"source": 33, "target": 33}}
SKIP = Skip(3)  # random weights make flat scores
LOSSLESS = Skip(3, zero_ratio=1)  # beyond the zeros


@cache
def compiled(name: str, memory: str, skip: Skip) -> tvmstruct.CompiledModel:
    source = models.source(models.parse(NAMES[name]))
    bucket = BUCKETS[name] | {"batch": 2}
    return tvmstruct.compile(source, memory=memory, skip=skip, buckets=[bucket], threads=1)


def output(model: tvmstruct.CompiledModel, inputs: dict[str, np.ndarray]) -> np.ndarray:
    (found,) = model.run(inputs).values()
    return found


def test_values_that_no_query_weighs_change_nothing():
    inputs = models.parse(NAMES["transformer"]).inputs(batch=2)
    want = output(compiled("transformer", "auto", LOSSLESS), inputs)
    got = output(compiled("transformer", "minimal", LOSSLESS), inputs)
    np.testing.assert_allclose(got, want, atol=2e-5)


def test_measuring_says_how_many_values_are_not_made():
    model = compiled("transformer", "minimal", LOSSLESS)
    found = model.measure_skip(models.parse(NAMES["transformer"]).inputs(batch=2))
    records = [r for r in model.report().layers if r.form == "attention"]
    assert list(found) == [r.name for r in records]
    assert len(found) == 3
    for record in records:
        got = found[record.name]
        assert got.unmade is not None
        assert got.value_rows == 2 * 4 * 33
        assert got.v_gen == got.unmade / got.value_rows
        assert f"{got.unmade} of {got.value_rows} value rows not made" in record.reason
        assert "values that no query weighs are not made" in record.reason
    assert max(s.v_gen for s in found.values()) > 0


def test_the_measured_operands_are_those_of_the_usual_kernels(monkeypatch):
    seen = []

    def watch(q, k, v, **options):
        seen.append([q.copy(), k.copy(), v.copy(), options | {"mask": options["mask"].copy()}])
        return analyse(q, k, v, **options)

    monkeypatch.setattr(skip_measure, "analyse", watch)
    inputs = models.parse(NAMES["bert"]).inputs(batch=2)
    for memory in ("auto", "minimal"):
        compiled("bert", memory, SKIP).measure_skip(inputs)
    usual, made = seen
    for a, b in zip(made[:3], usual[:3], strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5)
    np.testing.assert_array_equal(made[3].pop("mask"), usual[3].pop("mask"))
    assert made[3] == usual[3] | {"makes_values": True}
