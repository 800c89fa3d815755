"""The split feed-forward kernel: every way to cut it computes the same."""

from __future__ import annotations

import numpy as np
import pytest

from tests.kernels import activate, build, call, every_isa, extras, finish, random_picks
from tvmstruct.schedules.compute.dense import Epilogue, pack
from tvmstruct.schedules.x86.feed_forward import feed_forward
from tvmstruct.schedules.x86.packed_dense import panel_width
from tvmstruct.testing import tolerance

SIZES = (20, 384, 64)  # k, hidden, n


@every_isa
@pytest.mark.parametrize(("rows", "norm"), [(37, None), (48, 1e-3)])
def test_every_choice_computes_the_same(isa, rows, norm, rng):
    k, hidden, n = SIZES
    down = Epilogue(True, "none", True, norm)
    kernel = feed_forward(isa, SIZES, Epilogue(True, "gelu"), down, 16)
    picks = random_picks(rng, 5)
    built = {f"k{i}": kernel.space.build(rows, pick) for i, pick in enumerate(picks)}
    library = build(isa, built | {"default": kernel.func})
    x, residual = rng.normal(size=(rows, k)), rng.normal(size=(rows, n))
    w1, w2 = rng.normal(size=(k, hidden)) / np.sqrt(k), rng.normal(size=(hidden, n))
    w2 /= np.sqrt(hidden)
    b1, b2 = rng.normal(size=hidden), rng.normal(size=n)
    want = finish(activate("gelu", x @ w1 + b1) @ w2, down, b2, residual)
    packed1, packed2 = (pack(w, panel_width(isa)) for w in (w1, w2))
    for name in (*built, "default"):
        found = call(library[name], [x, packed1, b1, packed2, *extras(down, b2, residual)], rows, n)
        np.testing.assert_allclose(found, want, **tolerance("float32", hidden), err_msg=name)
