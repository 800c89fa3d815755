"""``skip=``: what it takes and refuses."""

from __future__ import annotations

import numpy as np
import pytest

import tvmstruct
from tvmstruct import models
from tvmstruct.errors import InputError
from tvmstruct.skipping import Skip

BERT = "bert?hidden=64&heads=4&ffn=96&layers=1&embeddings=false&seq=70"


@pytest.mark.parametrize(
    "value", [8, 8.0, np.float32(8), {"threshold": 8}, {"threshold": 8, "raw": False}, Skip(8)]
)
def test_one_skip_in_many_spellings(value):
    skip = Skip.of(value)
    assert skip == Skip(8)
    assert isinstance(skip, tvmstruct.Skip)
    assert isinstance(skip.threshold, float)


def test_none_is_none_and_raw_takes_any_number():
    assert Skip.of(None) is None
    assert Skip.of({"threshold": -2, "raw": True}) == Skip(-2.0, raw=True)
    assert str(Skip(8)) == "scores more than 8 below the maximum"
    assert "at most -2" in str(Skip(-2, raw=True))


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (0, "threshold is 0.0, want a positive distance .* raw=True"),
        (-1, "threshold is -1.0, want a positive"),
        (1e-60, "threshold is 1e-60, want a positive"),
        (float("inf"), "threshold is inf; want a finite"),
        (float("nan"), "threshold is nan; want a finite"),
        ({"threshold": 1e39, "raw": True}, r"threshold is 1e\+39; want a finite"),
        ({"threshold": "8"}, "threshold is '8'; want a number"),
        ({"threshold": True}, "threshold is True; want a number"),
        ({"threshold": 8, "raw": 1}, "raw is 1; want True or False"),
        ({"raw": True}, "skip={'raw': True}; want a number such as 8"),
        ({"threshold": 8, "raws": True}, "skip={'threshold': 8, 'raws': True}; want a number"),
        (True, "skip=True; want a number"),
        ("8", "skip='8'; want a number"),
    ],
)
def test_what_is_no_skip_is_refused(value, message):
    with pytest.raises(InputError, match=message):
        Skip.of(value)


@pytest.mark.parametrize(
    ("memory", "why"), [("minimal", "cannot skip yet"), ("baseline", "skip nothing")]
)
def test_a_memory_that_cannot_skip_is_refused(memory, why):
    source = models.source(models.parse(BERT))
    with pytest.raises(InputError, match=f'memory="{memory}" and skip=8: .*{why}'):
        tvmstruct.compile(source, memory=memory, skip=8)
