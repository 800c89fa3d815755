"""Activation and LayerNorm of a kernel, taken out of its time by difference."""

from __future__ import annotations

import numpy as np

import tvmstruct
from tvmstruct import models
from tvmstruct.profiling.difference import epilogue_shares
from tvmstruct.profiling.run import make_rows
from tvmstruct.profiling.steps import Step

SMALL = "bert?hidden=64&heads=4&ffn=96&layers=1&embeddings=false&seq=70"


def test_every_kernel_with_an_epilogue_has_its_parts():
    model = tvmstruct.compile(models.source(models.parse(SMALL)))
    bucket = next(iter(model.buckets.values()))
    assert model.compiler is not None
    assert bucket.lowered is not None
    shares = epilogue_shares(model.compiler.session, bucket.lowered)
    assert sorted(name for parts in shares.values() for name in parts) == ["LayerNorm"] * 2 + [
        "activation"
    ]
    assert all(0 <= share < 1 for parts in shares.values() for share in parts.values())


def test_parts_move_time_and_nothing_else():
    steps = [Step("a", None, (None,), 1, 100.0, 40), Step("b", None, (0,), 1, 50.0, 20)]
    counts = {"cycles": np.array([7.0, 3.0])}
    rows = make_rows(steps, [4.0, 2.0], (1.0, 1.0), counts, {"a": {"activation": 0.25}})
    found = {row.name: row for row in rows}
    assert found["activation"].seconds == 1.0
    assert found["other"].seconds == 5.0
    assert (found["activation"].bytes, found["other"].bytes) == (0, 60)
    assert found["other"].events == {"cycles": 10.0}
    assert sum(row.share for row in rows) == 1.0
