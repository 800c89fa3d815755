"""Attention that makes q, k and v on the way, against float64 numpy."""

from __future__ import annotations

import numpy as np
import pytest

from tests.attention_reference import as_rows, reference
from tests.kernels import build, call, every_isa, extras, finish
from tvmstruct.schedules.compute.dense import Epilogue, pack, pack_heads, pad_heads
from tvmstruct.schedules.x86.attention import Heads
from tvmstruct.schedules.x86.minimal_attention import minimal_attention
from tvmstruct.schedules.x86.minimal_element import Sizes, Source
from tvmstruct.schedules.x86.packed_dense import panel_width
from tvmstruct.testing import tolerance

N = 64
# batch, heads, queries, keys, dim of q and k, dim of v, features of x
SIZES = [(1, 2, 70, 70, 20, 12, 24), (3, 3, 17, 600, 16, 16, 40), (1, 1, 1, 300, 64, 32, 33)]


@every_isa
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_matches_reference(isa, size, rng):
    batch, heads, queries, keys, dim, value_dim, features = size
    cross = queries != keys
    h = Heads(
        isa, heads, dim, queries, keys, dim**-0.5, (heads * dim, 0), (heads * dim, 0),
        (heads * value_dim, 0), value_dim, mask="keys" if cross else "none", causal=not cross,
    )  # fmt: skip
    epilogue = Epilogue(True, "none", True, 1e-3 if cross else None)
    sources = (Source(features, True), Source(features, False), Source(features, True))
    kernel = minimal_attention(Sizes(h, sources, N, epilogue), batch * queries, 2)
    xq = rng.normal(size=(batch * queries, features))
    xk = rng.normal(size=(batch * keys, features)) if cross else xq
    dims = (dim, dim, value_dim)
    ws = [rng.normal(size=(features, heads * d)) / np.sqrt(features) for d in dims]
    bs = [rng.normal(size=heads * d) for d in dims]
    w = rng.normal(size=(heads * value_dim, N)) / np.sqrt(heads * value_dim)
    bias, residual = rng.normal(size=N), rng.normal(size=(batch * queries, N))
    mask = np.where(rng.random((batch, keys)) < 0.3, -np.inf, 0.0)
    rows = [xq @ ws[0] + bs[0], xk @ ws[1], xk @ ws[2] + bs[2]]
    q, k, v = (
        x.reshape(batch, length, heads, d).transpose(0, 2, 1, 3)
        for x, length, d in zip(rows, (queries, keys, keys), dims, strict=True)
    )
    added = mask[:, None, None] if cross else 0.0
    mixed = as_rows(reference(q, k, v, dim**-0.5, added, causal=not cross))
    want = finish(mixed @ w, epilogue, bias, residual)
    width, made = panel_width(isa), []
    for source, part, b in zip(sources, ws, bs, strict=True):
        made += [pack_heads(part, heads, width)] + [pad_heads(b, heads, width)] * source.bias
    inputs = [xq, xk, xk, *made, *[mask] * cross, pack(w, width)]
    library = build(isa, {"main": kernel.func})
    got = call(library["main"], [*inputs, *extras(epilogue, bias, residual)], batch * queries, N)
    np.testing.assert_allclose(got, want, **tolerance("float32", keys))
