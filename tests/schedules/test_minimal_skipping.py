"""Attention that leaves value rows out, against the same rule in float64 numpy."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pytest

from tests.attention_reference import as_rows
from tests.kernels import build, call, every_isa
from tests.skipping_reference import reference
from tvmstruct.schedules.compute.dense import Epilogue, pack, pack_heads, pad_heads
from tvmstruct.schedules.x86.attention import Heads
from tvmstruct.schedules.x86.minimal_attention import minimal_attention
from tvmstruct.schedules.x86.minimal_element import Sizes, Source, tile_problem
from tvmstruct.schedules.x86.packed_dense import panel_width

N, FEATURES = 32, 33


@dataclass(frozen=True)
class Case:
    """Sizes of an attention, what it skips, and how large a share of the values is not made."""

    batch: int
    heads: int
    queries: int
    keys: int
    dim: int
    value_dim: int
    skip: tuple[float, bool]
    zero_ratio: float
    gone: tuple[float, float]
    mask: str = "none"
    causal: bool = False
    kv_heads: int = 0

    @property
    def value_heads(self) -> int:
        return self.kv_heads or self.heads


CASES = {
    "nothing": Case(1, 2, 37, 37, 8, 8, (200.0, False), 0.99, (0, 0)),
    "masked keys alone": Case(3, 1, 37, 37, 24, 8, (200.0, False), 0.99, (0.2, 0.5), "keys"),
    "some, causal": Case(1, 2, 37, 37, 24, 24, (1.5, False), 0.8, (0.1, 0.7), causal=True),
    "most, shared": Case(2, 4, 37, 300, 24, 8, (1.0, False), 0.9, (0.5, 0.99), "keys", kv_heads=2),
    "raw, by query": Case(1, 2, 70, 150, 8, 24, (0.7, True), 0.8, (0.1, 0.9), "full"),
    "none weighs": Case(1, 1, 5, 150, 8, 24, (1.0, False), 1.0, (0.05, 0.9)),
    "all weigh": Case(2, 1, 5, 5, 24, 8, (2.5, False), 0.0, (0.1, 0.95)),
    "few queries": Case(1, 2, 3, 300, 32, 16, (2.5, False), 0.7, (0.1, 0.95)),
    "more keys than queries, causal": Case(
        1, 1, 5, 9, 8, 8, (2.0, False), 0.8, (0.4, 0.9), causal=True
    ),
    "one": Case(1, 1, 1, 1, 8, 24, (1.0, False), 0.99, (0, 0)),
}


@dataclass(frozen=True)
class Inputs:
    """Rows that feed q and k, v, their weights and biases, the projection and the mask."""

    xs: list[np.ndarray]
    ws: list[np.ndarray]
    bs: list[np.ndarray]
    w: np.ndarray
    mask: np.ndarray | None

    @classmethod
    def draw(cls, case: Case) -> Inputs:
        rng = np.random.default_rng(7)
        c, rows = case, (case.queries, case.keys, case.keys)
        widths = (c.heads * c.dim, c.value_heads * c.dim, c.value_heads * c.value_dim)
        mask = None
        if c.mask != "none":
            shape = (c.batch, c.keys) if c.mask == "keys" else (1, 1, c.queries, c.keys)
            mask = np.where(rng.random(shape) < 0.3, -np.inf, 0.0)
        return cls(
            [rng.normal(size=(c.batch * n, FEATURES)) for n in rows],
            [rng.normal(size=(FEATURES, n)) / np.sqrt(FEATURES) for n in widths],
            [rng.normal(size=n) for n in widths],
            rng.normal(size=(c.heads * c.value_dim, N)) / np.sqrt(c.heads * c.value_dim),
            mask,
        )

    def heads(self, case: Case) -> list[np.ndarray]:
        """Return q, k and v (batch, heads, length, dim), repeated where heads share."""
        counts = (case.heads, case.value_heads, case.value_heads)
        lengths = (case.queries, case.keys, case.keys)
        found = []
        for x, w, b, count, length in zip(self.xs, self.ws, self.bs, counts, lengths, strict=True):
            rows = (x @ w + b).reshape(case.batch, length, count, -1).transpose(0, 2, 1, 3)
            found.append(np.repeat(rows, case.heads // count, axis=1))
        return found


def heads_of(isa, case: Case) -> Heads:
    c = case
    layouts = ((c.heads * c.dim, 0), (c.value_heads * c.dim, 0), (c.value_heads * c.value_dim, 0))
    return Heads(
        isa, c.heads, c.dim, c.queries, c.keys, c.dim**-0.5, *layouts, c.value_dim, c.mask,
        ("queries",), c.causal, c.kv_heads, c.skip,
    )  # fmt: skip


def run(isa, case: Case, given: Inputs) -> np.ndarray:
    source, epilogue = Source(FEATURES, True), Epilogue(False, "none", False)
    sizes = Sizes(heads_of(isa, case), (source,) * 3, N, epilogue, case.zero_ratio)
    rows = case.batch * case.queries
    kernel = minimal_attention(sizes, rows, 2)
    width, made = panel_width(isa), []
    counts = (case.heads, case.value_heads, case.value_heads)
    for w, b, count in zip(given.ws, given.bs, counts, strict=True):
        made += [pack_heads(w, count, width), pad_heads(b, count, width)]
    masks = [] if given.mask is None else [given.mask]
    arrays = [*given.xs, *made, *masks, pack(given.w, width)]
    return call(build(isa, {"main": kernel.func})["main"], arrays, rows, N)


def expected(isa, case: Case, given: Inputs) -> tuple[np.ndarray, np.ndarray]:
    mask = 0.0 if given.mask is None else given.mask
    if case.mask == "keys":
        mask = mask[:, None, None]
    chunk = tile_problem(heads_of(isa, case)).chunk
    out, gone = reference(
        *given.heads(case), case.dim**-0.5, case.skip, chunk, mask=mask, causal=case.causal,
        zero_ratio=case.zero_ratio,
    )  # fmt: skip
    return as_rows(out) @ given.w, gone


@every_isa
@pytest.mark.parametrize("name", CASES)
def test_leaves_out_the_values_that_hardly_a_query_weighs(isa, name):
    case = CASES[name]
    given = Inputs.draw(case)
    want, gone = expected(isa, case, given)
    least, most = case.gone
    assert least <= gone.mean() <= most
    for b, h in np.ndindex(gone.shape[:2]):  # what is not read may be anything
        if case.heads == 1:
            given.xs[2].reshape(case.batch, case.keys, -1)[b, gone[b, h]] = np.nan
    np.testing.assert_allclose(run(isa, case, given), want, atol=2e-5)


@every_isa
def test_a_query_without_a_made_value_or_a_key_gives_zeros(isa):
    case = Case(2, 1, 5, 9, 8, 8, (0.3, False), 0.0, (1, 1), "keys")
    given = Inputs.draw(case)
    given.mask[0], given.mask[1] = 0, -np.inf
    _, gone = expected(isa, case, given)
    assert gone.all()
    np.testing.assert_array_equal(run(isa, case, given), 0)
