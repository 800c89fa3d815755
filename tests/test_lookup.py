"""The numpy definition of LookupFFN against the full softmax of eq. 5 and against loops."""

import numpy as np
import pytest

from tvmstruct.families import bh4
from tvmstruct.lookup import Lookup, entries, hash_codes
from tvmstruct.ops import Dense


def signs(tau: int) -> np.ndarray:
    """Return S of eq. 4: row i holds the bits of i as -1 and 1, most significant first."""
    bits = np.arange(1 << tau)[:, None] >> np.arange(tau - 1, -1, -1) & 1
    return 2.0 * bits - 1


def full_softmax(lookup: Lookup, x: np.ndarray, kept) -> np.ndarray:
    """Return eq. 5 with only those numerators for which ``kept(z, i)`` holds."""
    s, y = signs(lookup.tau), np.zeros((len(x), lookup.n_out))
    z = lookup.projection.apply(x).reshape(len(x), lookup.h, lookup.tau)
    for t, k in np.ndindex(z.shape[:2]):
        inner = s @ z[t, k]
        weight = np.exp(inner) / np.exp(inner).sum()
        for i in range(len(s)):
            if kept(z[t, k], i):
                factor = inner[i] if lookup.scaled else 1.0
                y[t] += factor * weight[i] * lookup.tables[k, i]
    return y if lookup.bias is None else y + lookup.bias


def random_lookup(h=3, tau=4, n=5, n_in=7, seed=0, **options) -> Lookup:
    rng = np.random.default_rng(seed)
    projection = Dense(rng.normal(size=(n_in, h * tau)))
    tables, bias = rng.normal(size=(h, 1 << tau, n)), rng.normal(size=n)
    return Lookup(projection, tables, bias=bias, **options)


@pytest.mark.parametrize("scaled", [True, False])
@pytest.mark.parametrize("flips", [0, 1, 2, 4])
def test_takes_the_numerators_within_so_many_flips(flips, scaled):
    lookup = random_lookup(flips=flips, scaled=scaled)
    x = np.random.default_rng(1).normal(size=(6, lookup.n_in))

    def kept(z, i):
        return int((signs(lookup.tau)[i] != np.where(z > 0, 1, -1)).sum()) <= flips

    assert lookup.entries == sum(kept(np.ones(lookup.tau), i) for i in range(1 << lookup.tau))
    np.testing.assert_allclose(lookup.apply(x), full_softmax(lookup, x, kept), rtol=1e-12)


def test_no_flips_takes_the_largest_numerator():
    lookup = random_lookup(seed=3)
    x = np.random.default_rng(4).normal(size=(2, 3, lookup.n_in))
    expected = full_softmax(
        lookup, x.reshape(6, -1), lambda z, i: i == int(np.argmax(signs(lookup.tau) @ z))
    )
    np.testing.assert_allclose(lookup.apply(x).reshape(6, -1), expected, rtol=1e-12)


def test_holds_any_operator_as_projection():
    rng = np.random.default_rng(5)
    op = bh4(rng.normal(size=(2, 4, 2, 4, 4)), 7, 12)
    lookup = Lookup(op, rng.normal(size=(4, 8, 3)), projection_bias=rng.normal(size=12))
    dense = Lookup(Dense(op.to_dense()), lookup.tables, lookup.projection_bias)
    x = rng.normal(size=(5, 7))
    np.testing.assert_allclose(lookup.apply(x), dense.apply(x), rtol=1e-9)
    assert lookup.params == op.params + lookup.tables.size + 12


def test_zero_and_nan_are_not_over_zero():
    z = np.array([[1.0, 0.0, -0.0, np.nan, 2.0, -1.0]])
    codes, scores = hash_codes(z, 3)
    assert codes[..., 0].tolist() == [[0b100, 0b010]]
    assert scores[0, 0, 0] == pytest.approx(1 / (4 * (1 + np.exp(-2))))
    assert np.isnan(scores[0, 1, 0])


def test_large_values_do_not_overflow():
    codes, scores = hash_codes(np.array([[1e30, -1e30]], np.float32), 2, flips=1)
    assert codes.tolist() == [[[0b10, 0b00, 0b11]]]
    assert scores[0, 0, 0] == np.float32(2e30)
    assert (scores[0, 0, 1:] == 0).all()


def test_counts_entries():
    assert [entries(8, f) for f in (0, 1, 2, 8)] == [1, 9, 37, 256]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"tables": np.zeros((3, 16))}, r"shape \(3, 16\); want \(h, 2\*\*tau, n\)"),
        ({"tables": np.zeros((3, 12, 5))}, "12 rows; want a power of two"),
        ({"tables": np.zeros((1, 1 << 21, 1))}, r"want a power of two from 2 to 2\*\*20"),
        ({"tables": np.zeros((2, 16, 5))}, "want h \\* tau = 8"),
        ({"bias": np.zeros(4)}, r"bias has shape \(4,\); want \(5,\)"),
        ({"projection_bias": np.zeros(11)}, r"projection_bias has shape \(11,\); want \(12,\)"),
        ({"flips": 5}, "flips=5; want 0 to tau=4"),
        ({"flips": -1}, "flips=-1"),
    ],
)
def test_refuses(change, message):
    rng = np.random.default_rng(0)
    parts = {"projection": Dense(rng.normal(size=(7, 12))), "tables": np.zeros((3, 16, 5))}
    with pytest.raises(ValueError, match=message):
        Lookup(**(parts | change))
