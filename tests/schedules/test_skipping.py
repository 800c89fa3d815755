"""Zero skipping in the attention kernels against the same rule in float64 numpy."""

from __future__ import annotations

import numpy as np
import pytest

from tests.attention_reference import as_rows, random_heads
from tests.kernels import build, call, every_isa
from tests.skipping_reference import limit, reference
from tvmstruct.schedules.x86.attention import Heads, attention
from tvmstruct.schedules.x86.streamed_attention import streamed_attention

# batch, heads, queries, keys, dim, ranges of keys (0: the kernel of many tiles)
SIZES = [
    (1, 2, 37, 300, 20, 0),
    (2, 1, 1, 515, 32, 0),
    (1, 1, 3, 700, 64, 2),
    (1, 3, 20, 90, 16, 0),
    (1, 1, 1, 8209, 16, 0),
]


@every_isa
@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("skip", [(1.5, False), (0.7, True), (50.0, True)], ids=str)
def test_skips_what_lies_under_the_limit(isa, size, skip):
    batch, heads, queries, keys, dim, ranges = size
    layout, rows = (heads * dim, 0), batch * queries
    h = Heads(isa, heads, dim, queries, keys, 0.3, layout, layout, layout, skip=skip)
    q, k, v = random_heads(*((batch, heads, n, dim) for n in (queries, keys, keys)))
    if ranges:
        func = streamed_attention(h, rows, ranges, 2).func
        want = _merged(q, k, v, skip, h, ranges)
    else:
        func = attention(h, 2)
        want, _ = reference(q, k, v, 0.3, skip, h.problem.chunk)
    got = call(build(isa, {"main": func})["main"], [*map(as_rows, (q, k, v))], rows, heads * dim)
    np.testing.assert_allclose(got, as_rows(want), atol=2e-5)


@every_isa
def test_ranges_of_a_stream_skip_by_what_all_have_found(isa):
    """One thread takes the ranges in order, as if they were one; two differ in what they skip."""
    h = Heads(isa, 1, 16, 2, 8300, 0.3, (16, 0), (16, 0), (16, 0), skip=(2.5, False))
    q, k, v = random_heads((1, 1, 2, 16), (1, 1, 8300, 16), (1, 1, 8300, 16))
    library = build(isa, {f"on{n}": streamed_attention(h, 2, 3, n).func for n in (1, 2)})
    arrays = [*map(as_rows, (q, k, v))]
    want, _ = reference(q, k, v, 0.3, h.skip, h.problem.chunk)
    apart = _merged(q, k, v, h.skip, h, 3)
    assert abs(want - apart).max() > 1e-3
    np.testing.assert_allclose(call(library["on1"], arrays, 2, 16), as_rows(want), atol=2e-5)
    exact, _ = reference(q, k, v, 0.3, (50.0, False), h.problem.chunk)
    got = call(library["on2"], arrays, 2, 16)
    assert abs(got - as_rows(exact)).max() < 2 * abs(want - exact).max()
    arrays[0][1, 3] = np.nan
    got = call(library["on2"], arrays, 2, 16)
    assert np.isnan(got[1]).all()
    assert not np.isnan(got[0]).any()


def _merged(q, k, v, skip, h, ranges):
    """Return what ranges of keys find, each with a maximum of its own."""
    chunks, chunk = h.problem.chunks, h.problem.chunk
    shares, tops = [], []
    for part in range(ranges):
        keys = slice(part * chunks // ranges * chunk, (part + 1) * chunks // ranges * chunk)
        part_k, part_v = k[:, :, keys], v[:, :, keys]
        ones = np.ones_like(part_v[..., :1])
        both = np.concatenate([part_v, ones], -1)
        scores = (q @ part_k.swapaxes(-1, -2) * np.float32(0.3)).astype(np.float64)
        top = scores.max(-1, keepdims=True)
        share, _ = reference(q, part_k, both, 0.3, skip, chunk)
        weights = _total(scores, skip, chunk, top)
        shares.append(share[..., :-1] * weights)
        tops.append((top, weights))
    most = np.maximum.reduce([top for top, _ in tops])
    total = sum(weights * np.exp(top - most) for top, weights in tops)
    out = sum(s * np.exp(top - most) for s, (top, _) in zip(shares, tops, strict=True))
    return out / total


def _total(scores, skip, chunk, last):
    """Return the sum of the weights of a range under its last maximum."""
    top, total = np.full((*scores.shape[:3], 1), -np.inf), 0.0
    for first in range(0, scores.shape[3], chunk):
        part = scores[..., first : first + chunk]
        top = np.maximum(top, part.max(-1, keepdims=True))
        kept = np.where(part <= limit(top, skip), 0, np.exp(part - last))
        total = total + kept.sum(-1, keepdims=True)
    return total


@every_isa
def test_nan_is_not_skipped(isa):
    q, k, v = random_heads((1, 1, 20, 16), (1, 1, 300, 16), (1, 1, 300, 16))
    q[0, 0, 3, 5] = np.nan
    h = Heads(isa, 1, 16, 20, 300, 0.3, (16, 0), (16, 0), (16, 0), skip=(2.0, False))
    got = call(build(isa, {"main": attention(h, 2)})["main"], [*map(as_rows, (q, k, v))], 20, 16)
    assert np.isnan(got[3]).all()
    assert not np.isnan(np.delete(got, 3, 0)).any()


@every_isa
def test_a_row_whose_keys_are_all_masked_keeps_its_mean(isa):
    q, k, v = random_heads((1, 1, 20, 16), (1, 1, 30, 16), (1, 1, 30, 16))
    options = {"mask": "keys", "skip": (8.0, False)}
    h = Heads(isa, 1, 16, 20, 30, 0.3, (16, 0), (16, 0), (16, 0), **options)
    mask = np.full((1, 30), np.finfo(np.float32).min)
    arrays = [*map(as_rows, (q, k, v)), mask]
    got = call(build(isa, {"main": attention(h, 2)})["main"], arrays, 20, 16)
    want = np.broadcast_to(v[0, 0].mean(0), got.shape)
    np.testing.assert_allclose(got, want, atol=3e-6)
