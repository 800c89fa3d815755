"""Attention fused with its output projection: every way to cut it computes the same."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from tests.attention_reference import as_rows, random_heads, reference
from tests.kernels import build, call, every_isa, extras, finish, random_picks
from tvmstruct.schedules.compute.dense import Epilogue, pack
from tvmstruct.schedules.x86.attention import Heads
from tvmstruct.schedules.x86.packed_dense import panel_width
from tvmstruct.schedules.x86.projected_attention import default_cut, pays, projected_attention
from tvmstruct.targets import ISAS
from tvmstruct.testing import tolerance

N = 64
# batch, heads, queries, keys, dim of q and k, dim of v: threads get blocks or whole elements
SIZES = [
    (1, 2, 150, 150, 20, 12),
    (5, 4, 17, 40, 16, 16),
    (3, 2, 70, 300, 8, 20),
    (1, 3, 40, 7, 5, 3),
]


def heads_of(isa, size, **options):
    _, heads, queries, keys, dim, value_dim = size
    return Heads(
        isa, heads, dim, queries, keys, dim**-0.5, (heads * dim, 0), (heads * dim, 0),
        (heads * value_dim, 0), value_dim, **options,
    )  # fmt: skip


@every_isa
@pytest.mark.parametrize(("size", "norm"), list(zip(SIZES, (None, 1e-3) * 2, strict=True)), ids=str)
def test_every_choice_computes_the_same(isa, size, norm, rng):
    batch, heads, queries, keys, dim, value_dim = size
    mask = {"mask": "keys"} if norm else {"causal": True}
    h, epilogue, rows = (
        heads_of(isa, size, **mask),
        Epilogue(True, "none", True, norm),
        batch * queries,
    )
    kernel = projected_attention(h, N, epilogue, rows, 2)
    built = {f"k{i}": kernel.space.build(rows, pick) for i, pick in enumerate(random_picks(rng, 1))}
    library = build(isa, built | {"default": kernel.func})
    q, k, v = random_heads(
        (batch, heads, queries, dim), (batch, heads, keys, dim), (batch, heads, keys, value_dim)
    )
    hidden = np.where(np.arange(keys) < 3 * keys // 4, 0.0, -np.inf)[None].repeat(batch, 0)
    w = rng.normal(size=(heads * value_dim, N)) / np.sqrt(heads * value_dim)
    bias, residual = rng.normal(size=N), rng.normal(size=(rows, N))
    masks = [hidden] if norm else []
    added = hidden[:, None, None] if norm else 0.0
    mixed = as_rows(reference(q, k, v, dim**-0.5, added, causal=not norm))
    want = finish(mixed @ w, epilogue, bias, residual)
    inputs = [*map(as_rows, (q, k, v)), *masks, pack(w, panel_width(isa))]
    for name in (*built, "default"):
        found = call(library[name], [*inputs, *extras(epilogue, bias, residual)], rows, N)
        np.testing.assert_allclose(found, want, **tolerance("float32", keys), err_msg=name)


def test_blocks_give_every_thread_as_much():
    h = heads_of(ISAS[0], (1, 2, 256, 256, 16, 16))
    assert default_cut(h, 256, 2).rows == 128
    assert default_cut(h, 256, 4).rows == 64
    short = replace(h, query_length=16)
    assert default_cut(short, 16 * 16, 2) == default_cut(short, 32 * 16, 4)
    assert default_cut(short, 16 * 16, 2).elements == 8


def test_few_rows_and_ragged_outputs_stay_apart():
    h = heads_of(ISAS[0], (1, 2, 256, 256, 16, 16))
    assert pays(h, 64, 256, 2)
    assert not pays(h, 64, 16, 2)
    assert not pays(h, 65, 256, 2)
