"""What skipping saves and loses, against a loop over single weights."""

from __future__ import annotations

from dataclasses import replace
from math import exp, isnan

import numpy as np
import pytest

from tests.attention_reference import random_heads
from tvmstruct.errors import InputError
from tvmstruct.skip_analysis import EXP_OPS, SkipStatistics, analyse, find_zeros
from tvmstruct.skip_schedules import utilisations
from tvmstruct.skipping import Skip

GRAIN = {"chunk": 5, "tile": 4, "group": 3, "threads": 2}
CASES = {
    "relative": (Skip(1.5), {}),
    "raw": (Skip(0.2, raw=True), {}),
    "causal": (Skip(1.5), {"causal": True}),
    "masked": (Skip(1.5), {"masked": True}),
    "shared keys": (Skip(0.1, raw=True), {"kv_heads": 2, "causal": True}),
    "ratio": (Skip(0.5, zero_ratio=0.7), {}),
    "ratio, causal": (Skip(0.5, zero_ratio=0.7), {"causal": True, "kv_heads": 1}),
}


def problem(kv_heads=4, masked=False, causal=False, keys=13):
    q, k, v = random_heads((2, 4, 11, 6), (2, kv_heads, keys, 6), (2, kv_heads, keys, 7))
    mask = None
    if masked:
        mask = np.zeros((2, 1, 1, keys), np.float32)
        mask[1, ..., 8:] = -np.inf
        mask[0, ..., 3] = np.finfo(np.float32).min
    return {"q": q, "k": k, "v": v, "scale": 0.8, "mask": mask, "causal": causal}


def limit(skip, top):
    threshold = np.float32(skip.threshold)
    far = threshold if skip.raw else np.float32(top) - threshold
    return min(far, top - max(abs(top), np.float32(1)) * np.float32(2**-22))


def naive(q, k, v, scale, mask, causal, skip, chunk, tile, group, threads, makes_values=False):
    """Return zeros, executed, error, cosine, v_gen and its rows, one weight after the other."""
    (batch, heads, queries, _), keys, width = q.shape, k.shape[2], v.shape[3]
    share = heads // k.shape[1]
    zero, gone = naive_zeros(q, k, scale, mask, causal, skip, chunk, makes_values)
    read = (
        ~zero & ~np.repeat(gone, heads // gone.shape[1], 1)[:, :, None] if makes_values else ~zero
    )
    visible = whole = executed = 0
    exact = np.zeros((batch, heads, queries, width))
    got = np.zeros_like(exact)
    for b, h, i in np.ndindex(batch, heads, queries):
        scores = (q[b, h] @ k[b, h // share].T)[i] * np.float32(scale)
        for j in range(keys):
            if mask is not None:
                scores[j] += np.broadcast_to(mask, zero.shape)[b, h, i, j]
            if causal and j > i:
                scores[j] = -np.inf
            visible += not (causal and j > i)
        top = max(scores)
        for j in range(keys):
            weight = exp(float(scores[j]) - float(top))
            exact[b, h, i] += weight * v[b, h // share, j]
            got[b, h, i] += weight * v[b, h // share, j] * read[b, h, i, j]
        exact[b, h, i] /= sum(exp(float(s) - float(top)) for s in scores)
        kept = scores[~zero[b, h, i]]
        got[b, h, i] /= sum(exp(float(s) - float(top)) for s in kept)
    for b, h, j in np.ndindex(batch, heads, keys):
        for first in range(0, queries, tile):
            rows = range(first, min(first + tile, queries))
            if causal and j // chunk * chunk > rows[-1]:
                continue
            whole += len(rows) * (EXP_OPS + width)
            executed += len(rows) * EXP_OPS * (not zero[b, h, rows, j].all())
            for start in range(first, rows[-1] + 1, group):
                some = range(start, min(start + group, rows[-1] + 1))
                executed += len(some) * width * read[b, h, some, j].any()
    hidden = np.triu(np.ones((queries, keys), bool), 1) if causal else False
    lengths = np.linalg.norm(exact, axis=-1) * np.linalg.norm(got, axis=-1)
    cosines = (exact * got).sum(-1) / np.where(lengths == 0, 1, lengths)  # 0: no value was made
    return {
        "zeros": (zero & ~np.asarray(hidden)).sum() / visible,
        "executed": executed / whole,
        "error": np.linalg.norm(exact - got) / np.linalg.norm(exact),
        "cosine": cosines.mean(),
        "v_gen": gone.mean(),
        "value_rows": gone.size,
    }


def naive_zeros(q, k, scale, mask, causal, skip, chunk, makes_values):
    """Return which weights are zero, and which values are not made by head or by head of k."""
    (batch, heads, queries, _), keys = q.shape, k.shape[2]
    share = heads // k.shape[1]
    zero = np.zeros((batch, heads, queries, keys), bool)
    for b, h, i in np.ndindex(batch, heads, queries):
        scores = (q[b, h] @ k[b, h // share].T)[i] * np.float32(scale)
        if mask is not None:
            scores += np.broadcast_to(mask, zero.shape)[b, h, i]
        if causal:
            scores[i + 1 :] = -np.inf
        for j in range(keys):
            seen = max(scores[: (j // chunk + 1) * chunk])
            zero[b, h, i, j] = scores[j] <= limit(skip, seen)
    readers = 1 if makes_values else share
    gone = np.zeros((batch, heads // readers, keys), bool)
    for b, g, j in np.ndindex(gone.shape):
        first = j if causal else 0
        column = zero[b, g * readers : (g + 1) * readers, first:, j]
        gone[b, g, j] = column.all() or column.mean() > skip.zero_ratio
    return zero, gone


@pytest.mark.parametrize("makes_values", [False, True])
@pytest.mark.parametrize("name", CASES)
def test_the_statistics_are_those_of_a_loop(name, makes_values):
    skip, options = CASES[name]
    given = problem(**options) | {"skip": skip, "makes_values": makes_values}
    got, want = analyse(**given, **GRAIN), naive(**given, **GRAIN)
    assert 0 < want["zeros"] < 1
    for field, value in want.items():
        assert getattr(got, field) == pytest.approx(value, rel=1e-6), field
    assert got.unmade == (round(got.v_gen * got.value_rows) if makes_values else None)
    assert 0 < got.v_gen < 1 or skip.zero_ratio == 0.99


def test_values_of_late_keys_count_the_queries_that_see_them():
    given = problem(causal=True)
    given["k"] *= 0  # every query weighs all that it sees
    got = analyse(**given, skip=Skip(1), makes_values=True, **GRAIN)
    assert (got.unmade, got.value_rows) == (2 * 4 * 2, 2 * 4 * 13)  # keys 11 and 12 of every head


@pytest.mark.parametrize("makes_values", [False, True])
def test_bands_of_queries_change_nothing(monkeypatch, makes_values):
    given = problem(causal=True, masked=True) | {"makes_values": makes_values}
    whole = analyse(**given, skip=Skip(1), **GRAIN)
    monkeypatch.setattr("tvmstruct.skip_analysis.BAND", 60)
    parts = analyse(**given, skip=Skip(1), **GRAIN)
    assert parts.error == pytest.approx(whole.error)
    assert (parts.zeros, parts.executed, parts.v_gen) == (whole.zeros, whole.executed, whole.v_gen)
    assert parts.utilisation == whole.utilisation


@pytest.mark.parametrize("skip", [Skip(200), Skip(-1e6, raw=True)])
def test_far_thresholds_skip_nothing(skip):
    got = analyse(**problem(), skip=skip, **GRAIN)
    assert (got.zeros, got.executed, got.error, got.cosine, got.v_gen) == (0, 1, 0, 1, 0)


def test_what_underflows_is_skipped_without_error():
    got = analyse(**problem(masked=True), skip=Skip(1e30), **GRAIN)
    assert got.zeros > 0
    assert (got.error, got.cosine) == (0, 1)


def test_zeros_and_error_fall_as_the_threshold_rises():
    found = [analyse(**problem(), skip=Skip(t), **GRAIN) for t in (0.1, 0.5, 1, 2, 4)]
    for less, more in zip(found[1:], found, strict=False):
        assert less.zeros < more.zeros
        assert less.executed >= more.executed
        assert less.error <= more.error
        assert less.cosine >= more.cosine


@pytest.mark.parametrize("threshold", [0.0, 1e30])
def test_a_raw_threshold_keeps_the_maximum(threshold):
    scores = np.float32([[-3, -2, -2.5, -4], [1, 0.5, 7, 3e8], [-np.inf, -1e-30, -1, -2]])
    zero, _ = find_zeros(scores, Skip(threshold, raw=True), chunk=4)
    assert not zero[np.arange(3), scores.argmax(1)].any()
    assert zero[0].sum() == 3


def test_a_chunk_sees_no_later_maximum():
    scores = np.float32([[0, -1, 9, 8, 0, 0]])
    zero, top = find_zeros(scores, Skip(4), chunk=2)
    assert zero.tolist() == [[False, False, False, False, True, True]]
    assert top == 9


def test_nan_is_neither_skipped_nor_a_maximum():
    scores = np.float32([[np.nan, 0, -9, -np.inf]])
    zero, top = find_zeros(scores, Skip(4), chunk=4)
    assert zero.tolist() == [[False, False, True, True]]
    assert top == 0
    given = problem()
    given["q"][0, 0, 0, 0] = np.nan
    assert isnan(analyse(**given, skip=Skip(4), **GRAIN).error)


def test_a_query_without_keys_gives_zeros():
    given = problem(masked=True)
    given["mask"][1] = -np.inf
    got = analyse(**given, skip=Skip(300), **GRAIN)
    assert (got.error, got.cosine) == (0, 1)
    assert got.zeros >= 0.5


def test_a_single_tile_is_dealt_out_by_chunks():
    given = problem(keys=200)
    given["q"] = given["q"][:, :, :1]
    grain = {**GRAIN, "threads": 40}
    assert min(analyse(**given, skip=Skip(1), **grain).utilisation.values()) > 0.5


@pytest.mark.parametrize("threads", [2, 32])
def test_only_the_dynamic_scheduler_keeps_threads_busy(threads):
    rng = np.random.default_rng(1)
    costs = 0.1 + rng.random((16, 1)) ** 3 * rng.random((16, 64)) ** 2  # some heads skip most
    found = utilisations(costs, threads)
    assert list(found) == ["head-first", "chunk-first", "random", "dynamic"]
    assert all(0 < share <= 1 for share in found.values())
    assert found["dynamic"] >= max(0.9, *found.values())


def test_schedulers_of_equal_and_of_no_work():
    assert set(utilisations(np.ones((4, 8)), 4).values()) == {1.0}
    assert set(utilisations(np.zeros((4, 8)), 4).values()) == {1.0}
    assert utilisations(np.ones((1, 1)), 4)["dynamic"] == 0.25
    heads = np.repeat([[1.0], [3.0]], 6, axis=1)
    assert utilisations(heads, 2)["head-first"] == pytest.approx(2 / 3)
    assert utilisations(heads.T, 2)["chunk-first"] == pytest.approx(2 / 3)


def test_statistics_in_words():
    got = SkipStatistics(0.71, 0.45, 1.2e-3, 0.999, 0.1, {"dynamic": 0.98}, 2)
    assert str(got) == (
        "71% of weights are zero, 55% of softmax and weighted sum saved, error 1.2e-03, "
        "2 threads busy 98%"
    )
    assert "saved, 7 of 20 value rows not made, error" in str(replace(got, unmade=7, value_rows=20))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"chunk": 0}, "chunk=0; want at least 1"),
        ({"threads": 0}, "threads=0; want at least 1"),
        ({"q": np.zeros((2, 4, 6), np.float32)}, "want .batch, heads, length, dim. each"),
        ({"q": np.zeros((2, 3, 11, 6), np.float32)}, r"q \(2, 3, 11, 6\), k .* a multiple"),
        ({"v": np.zeros((2, 4, 12, 7), np.float32)}, "keys of v = those of k"),
        ({"mask": np.zeros((2, 1, 1, 12), np.float32)}, r"mask \(2, 1, 1, 12\) .*\(2, 4, 11, 13\)"),
    ],
)
def test_what_does_not_fit_is_refused(change, message):
    with pytest.raises(InputError, match=message):
        analyse(**{**problem(), "skip": Skip(1), **GRAIN, **change})
