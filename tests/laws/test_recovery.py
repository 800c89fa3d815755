"""Exact structure is found whatever the block size and orientation, and nothing else is."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from tests.catalogue import normal
from tvmstruct import families, ops
from tvmstruct.families import FAMILIES
from tvmstruct.recovery import recover
from tvmstruct.testing import error_bound, tolerance


def ceil(a: int, b: int) -> int:
    return -(-a // b)


def vvma(n_in: int, n_out: int, k: int, *, transposed: bool) -> np.ndarray:
    v = normal(ceil(n_out, k), ceil(n_in, k), k)
    return families.vvma(normal(k, k), v, transposed=transposed).to_dense()[:n_in, :n_out]


def krons(r: int, a: tuple[int, int], b: tuple[int, int]) -> np.ndarray:
    return families.kronecker(normal(r, *a), normal(r, *b)).to_dense()


def blocks(n_in: int, n_out: int, g: int, *, shuffled: bool) -> np.ndarray:
    w = normal(g, ceil(n_in, g), ceil(n_out, g))
    form = families.lgp_shuffle if shuffled else families.block_diagonal
    return form(w).to_dense()[:n_in, :n_out]


def monarch(n_in: int, n_out: int, b: int, r: int) -> np.ndarray:
    return families.monarch(normal(b, n_in // b, b * r), normal(b, b * r, n_out // b)).to_dense()


MEMBERS: dict[str, tuple[np.ndarray, str, dict[str, Any]]] = {
    f"vvma {shape} k={k} transposed={transposed}": (
        vvma(*shape, k, transposed=transposed),
        "vvma",
        {"k": k, "transposed": transposed},
    )
    for shape in ((192, 288), (288, 192), (200, 328))
    for k in (16, 32, 48)
    for transposed in (False, True)
} | {
    "rank 12": (normal(192, 12) @ normal(12, 288), "low_rank", {"r": 12}),
    "rank 70": (normal(288, 70) @ normal(70, 192), "low_rank", {"r": 70}),
    "3 krons": (krons(3, (16, 12), (12, 24)), "kronecker", {"r": 3, "b": (12, 24)}),
    "1 kron": (krons(1, (24, 9), (12, 32)), "kronecker", {"r": 1}),
    "2 krons, cropped": (krons(2, (14, 17), (14, 17))[:192, :280], "kronecker", {"r": 2}),
    "block diagonal": (blocks(192, 288, 4, shuffled=False), "block_diagonal", {"g": 4}),
    "lgp-shuffle": (blocks(192, 288, 8, shuffled=True), "lgp_shuffle", {"g": 8}),
    "lgp-shuffle, ragged": (blocks(190, 288, 7, shuffled=True), "lgp_shuffle", {"g": 7}),
    "monarch": (monarch(192, 288, 8, 1), "monarch", {"b": 8, "r": 1}),
    "monarch of rank 4": (monarch(288, 192, 4, 4), "monarch", {"b": 4, "r": 4}),
}


@pytest.mark.parametrize("name", MEMBERS)
def test_members_come_back(name: str) -> None:
    w, family, parameters = MEMBERS[name]
    stored = w.astype(np.float32)
    found = recover(stored)
    assert found.fit is not None, found.why
    assert found.fit.family == family
    assert parameters.items() <= found.fit.parameters.items()
    x = normal(3, w.shape[0])
    scale = float(np.linalg.norm(w)) / np.sqrt(w.shape[1])
    np.testing.assert_allclose(
        found.fit.op.apply(x.astype(np.float32)),
        x @ w,
        **tolerance("float32", 1, scale=10 * scale),
    )
    assert found.fit.op.params == FAMILIES[family].params(*w.shape, **found.fit.parameters)
    assert "fewer multiply-adds" in found.why


def test_products_computed_in_float32_are_within_the_tolerance() -> None:
    p, q = normal(192, 12).astype(np.float32), normal(12, 288).astype(np.float32)
    found = recover(p @ q)
    assert found.fit is not None
    assert found.fit.parameters == {"r": 12}
    op = families.monarch(normal(8, 24, 8), normal(8, 8, 36))
    stored = ops.cast(op, np.float32).apply(np.eye(192, dtype=np.float32))
    assert recover(stored).fit is not None


def test_the_cheapest_form_wins_and_the_others_are_reported() -> None:
    w = krons(1, (24, 9), (12, 24)).astype(np.float32)  # also VVMA with k = 24
    found = recover(w)
    assert found.fit is not None
    assert found.fit.family == "kronecker"
    assert "vvma" in {alternative.family for alternative in found.alternatives}
    tied = recover(krons(1, (24, 9), (24, 24)).astype(np.float32))
    assert tied.fit is not None
    assert tied.fit.family == "vvma"
    assert tied.fit.op.macs == tied.alternatives[0].macs
    rank_one = recover((normal(64, 1) @ normal(1, 96)).astype(np.float32))
    assert rank_one.fit is not None
    assert rank_one.fit.family == "low_rank"  # a tie with one Kronecker product: table order
    assert rank_one.alternatives[0].macs == rank_one.fit.op.macs


@pytest.mark.parametrize("shape", [(192, 288), (288, 192), (100, 40), (16, 16), (17, 333)])
def test_random_weights_are_left_alone(shape: tuple[int, int]) -> None:
    found = recover(normal(*shape).astype(np.float32))
    assert found.fit is None
    assert found.why.startswith("no exact structure found")
    assert ": tried low rank, VVMA, sums of up to 4" in found.why
    assert "nearest: VVMA k=" in found.why


@pytest.mark.parametrize("name", ["rank 12", "3 krons", "monarch", "lgp-shuffle"])
def test_a_member_with_noise_is_left_alone(name: str) -> None:
    w = MEMBERS[name][0]
    noise = normal(*w.shape) * np.linalg.norm(w) / np.sqrt(w.size)
    assert recover((w + 1e-4 * noise).astype(np.float32)).fit is None
    assert recover((w + 1e-5 * noise).astype(np.float32)).fit is None


def test_one_wrong_entry_is_enough_to_decline() -> None:
    w = MEMBERS["3 krons"][0].copy()
    w[5, 7] += np.abs(w).max()
    found = recover(w)
    assert found.fit is None
    assert "passed the sampled test but not the full one" in found.why


@pytest.mark.parametrize("transposed", [False, True])
def test_zero_columns_rows_and_blocks_do_not_hide_vvma(transposed: bool) -> None:
    m, v = normal(24, 24), normal(8, 12, 24)
    m[:, 3], m[5], v[2], v[:, 7], v[4, 4] = 0, 0, 0, 0, 0
    v[:, :, 11] = 0
    w = families.vvma(m, v, transposed=transposed).to_dense().astype(np.float32)
    found = recover(w)
    assert found.fit is not None, found.why
    assert found.fit.parameters == {"k": 24, "transposed": transposed}


def test_mostly_zero_vvma_is_found() -> None:
    v = np.zeros((8, 12, 24))
    for i, j in ((0, 3), (2, 9), (5, 1), (7, 7), (6, 2)):
        v[i, j] = normal(24)
    w = families.vvma(normal(24, 24), v).to_dense().astype(np.float32)
    found = recover(w)
    assert found.fit is not None, found.why
    assert found.fit.error <= error_bound("float32", 1)


@pytest.mark.parametrize("scale", [1e-30, 1e-6, 1e6, 1e30])
def test_scale_does_not_matter(scale: float) -> None:
    found = recover((scale * MEMBERS["rank 12"][0]).astype(np.float32))
    assert found.fit is not None, found.why
    assert found.fit.parameters == {"r": 12}
    assert recover((scale * normal(64, 96)).astype(np.float32)).fit is None


@pytest.mark.parametrize("stored", ["float16", "bfloat16"])
@pytest.mark.parametrize("name", ["rank 12", "vvma (192, 288) k=32 transposed=True", "3 krons"])
def test_half_precision_is_reported_but_not_replaced(name: str, stored: str) -> None:
    w, family, _ = MEMBERS[name]
    bits = 11 if stored == "float16" else 8
    mantissa, exponent = np.frexp(w)
    rounded = np.ldexp(np.round(mantissa * 2.0**bits) / 2.0**bits, exponent)
    found = recover(rounded.astype(np.float32), stored_dtype=stored)
    assert found.fit is None
    assert found.why.startswith(f"looks like {FAMILIES[family].title}")
    assert found.alternatives[0].family == family


def test_weights_of_8_bits_are_reported_but_not_replaced() -> None:
    w, _, _ = MEMBERS["rank 12"]
    scale = np.abs(w).max() / 127
    found = recover((np.round(w / scale) * scale).astype(np.float32), stored_dtype="int8")
    assert found.fit is None


@pytest.mark.parametrize("stored", ["float16", "bfloat16"])
def test_random_half_precision_looks_like_nothing(stored: str) -> None:
    found = recover(normal(192, 288).astype(np.float16).astype(np.float32), stored_dtype=stored)
    assert found.why.startswith("no exact structure found")


BROKEN = normal(32, 32)
BROKEN[3, 4] = np.nan
INFINITE = normal(32, 32)
INFINITE[9, 1] = -np.inf


@pytest.mark.parametrize(
    ("w", "why"),
    [
        (np.zeros((64, 64)), "weight is all zeros"),
        (BROKEN, "weight has NaN or infinite entries"),
        (INFINITE, "weight has NaN or infinite entries"),
        (normal(8, 512), "weight is 8x512; a side under 16 saves nothing"),
        (normal(4, 32, 32), "weight has rank 3, want 2"),
    ],
    ids=["zeros", "nan", "inf", "tiny", "3-D"],
)
def test_weights_that_cannot_be_tested_are_declined(w: np.ndarray, why: str) -> None:
    assert recover(w) == recover(w)
    assert recover(w).why == why
    assert recover(w).fit is None


def test_unknown_stored_dtype_is_refused() -> None:
    with pytest.raises(ValueError, match="stored_dtype='int4'; want one of float64, float32"):
        recover(normal(32, 32), stored_dtype="int4")


@pytest.mark.parametrize("place", [(0, 0), (100, 50)])
def test_one_huge_entry_hides_nothing(place: tuple[int, int]) -> None:
    w = normal(192, 288).astype(np.float32)
    w[place] = 3e38
    assert recover(w).fit is None
    w[place] = 1e9
    assert recover(w).fit is None
