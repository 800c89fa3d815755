"""Attention whose keys are split between threads, against float64 numpy."""

from __future__ import annotations

import math
import re
from dataclasses import replace

import numpy as np
import pytest
import tvm

from tests.attention_reference import as_rows, random_heads, reference
from tests.kernels import build, call, every_isa
from tvmstruct.schedules.x86.attention import Heads
from tvmstruct.schedules.x86.streamed_attention import ranges, streamed_attention
from tvmstruct.targets import ISAS

# batch, heads, queries, keys, dim: scores with keys or with queries on the vector axis
SIZES = [
    (1, 1, 1, 700, 32),
    (2, 1, 3, 1003, 16),
    (1, 2, 37, 400, 20),
    (1, 1, 2, 515, 64),
    (1, 1, 1, 8209, 16),
]


def heads_of(isa, size, **options):
    _, heads, queries, keys, dim = size
    layout = (heads * dim, 0)
    return Heads(isa, heads, dim, queries, keys, 0.3, layout, layout, layout, **options)


@every_isa
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_ranges_of_keys_add_up(isa, size):
    batch, heads, queries, keys, dim = size
    rows = batch * queries
    h = heads_of(isa, size, mask="keys")
    kernels = {f"k{n}": streamed_attention(h, rows, n, 2).func for n in (1, 3)}
    library = build(isa, kernels)
    q, k, v = random_heads(*((batch, heads, n, dim) for n in (queries, keys, keys)))
    mask = np.zeros((batch, keys), np.float32)
    mask[0, : 2 * keys // 3] = -np.inf  # of three ranges, two see nothing
    mask[-1, -5:] = -1e4
    want = as_rows(reference(q, k, v, 0.3, mask[:, None, None]))
    for name in kernels:
        got = call(library[name], [*map(as_rows, (q, k, v)), mask], rows, heads * dim)
        np.testing.assert_allclose(got, want, atol=3e-6, err_msg=name)
    mask[0] = -np.inf
    got = call(library["k3"], [*map(as_rows, (q, k, v)), mask], rows, heads * dim)
    assert not got[:queries].any()
    q[-1, 0, -1, 0] = np.nan
    got = call(library["k3"], [*map(as_rows, (q, k, v)), np.zeros_like(mask)], rows, heads * dim)
    assert np.isnan(got[-1, :dim]).all()
    assert not np.isnan(got[:-1]).any()


def test_keys_are_split_only_where_threads_would_wait():
    h = heads_of(ISAS[0], (1, 1, 1, 100_000, 64))
    assert ranges(h, 1, 2) == 2
    assert 29 < ranges(h, 1, 32) <= 32
    assert ranges(h, 4, 2) == 1
    assert ranges(replace(h, heads=3), 1, 2) == 2
    assert ranges(replace(h, heads=16), 1, 2) == 1
    assert ranges(replace(h, key_length=100), 1, 2) == 1
    assert ranges(replace(h, causal=True), 1, 2) == 1


def test_scratch_does_not_grow_with_the_keys():
    short, long = (heads_of(ISAS[0], (1, 1, 1, keys, 64)) for keys in (1_000_000, 10_000_000))
    sizes = [_scratch_bytes(streamed_attention(h, 1, 2, 2).func) for h in (short, long)]
    assert sizes[0] == sizes[1]
    assert sizes[0] < 1 << 16


def _scratch_bytes(func: tvm.tirx.PrimFunc) -> int:
    """Return the bytes of all buffers that a kernel allocates."""
    shapes = re.findall(r"T\.alloc_buffer\(\(([\d, ]+)\)", func.script())
    assert shapes
    return sum(4 * math.prod(int(n) for n in shape.split(",") if n.strip()) for shape in shapes)
