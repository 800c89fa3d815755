"""Laws of least squares over the leaves of an expression."""

from __future__ import annotations

import numpy as np
import pytest

from tests.catalogue import CASES, EXPRESSIONS, NODES, Case, normal
from tvmstruct import ops
from tvmstruct.families import FAMILIES, bh4
from tvmstruct.fit import complete, fit, sketch, truncate
from tvmstruct.testing import error_bound, tolerance

FITTABLE = {
    name: op for name, op in EXPRESSIONS.items() if op.params and name != "array used twice"
}


def perturb(op: ops.Op, size: float) -> ops.Op:
    rng = np.random.default_rng(11)  # of its own: a result must not depend on the tests before
    return ops.map_arrays(op, lambda a: a + size * rng.normal(size=a.shape))


@pytest.mark.parametrize("op", FITTABLE.values(), ids=FITTABLE.keys())
def test_fit_starts_at_the_template_and_never_gets_worse(op: ops.Op) -> None:
    w = op.to_dense()
    template = perturb(op, 0.3)
    errors = [fit(template, w, sweeps=sweeps).error for sweeps in (1, 2, 8)]
    start = float(np.linalg.norm(template.to_dense() - w) / np.linalg.norm(w))
    assert errors[0] < start
    noise = 10 * error_bound("float64", w.size)  # a least-squares solve may lose a digit
    assert errors == sorted(errors, reverse=True) or errors[0] <= noise
    assert fit(op, w, sweeps=2).error <= noise


@pytest.mark.parametrize(
    "name", ["dense wide", "block diagonal", "shared block diagonal", "diagonal"]
)
def test_fit_of_a_single_leaf_is_exact_from_any_start(name: str) -> None:
    w = NODES[name].to_dense()
    found = fit(perturb(NODES[name], 10.0), w, sweeps=1)
    assert found.error <= error_bound("float64", w.size)


@pytest.mark.parametrize("case", [c for c in CASES if c.family == "bh4"], ids=str)
def test_fit_comes_back_to_a_bh4_member_nearby(case: Case) -> None:
    (n_in, n_out), b = case.shape, case.parameters["b"]
    width = ops.next_power_of_two(n_in)
    scale = 1 / np.sqrt(b * width)
    weights = scale * normal(-(-n_out // width), 4, width // b, b, b)
    member = bh4(weights, n_in, n_out)
    near = bh4(weights + 0.02 * scale * normal(*weights.shape), n_in, n_out)
    start = np.linalg.norm(near.to_dense() - member.to_dense()) / np.linalg.norm(member.to_dense())
    found = fit(near, member.to_dense(), sweeps=40)
    assert found.error < start / 20


def test_fit_keeps_the_expression_and_the_dtype() -> None:
    case = next(c for c in CASES if c.family == "low_rank_lgp")
    template = case.member()
    found = fit(template, normal(*case.shape).astype(np.float32), sweeps=2)
    assert ops.describe(found.op) == ops.describe(template)
    assert {a.dtype for a in found.op.arrays()} == {np.dtype(np.float32)}


def test_fit_refuses_what_it_cannot_do() -> None:
    with pytest.raises(ValueError, match=r"template is 3x7 but the weight is 7x3; .* transposed"):
        fit(NODES["dense wide"], normal(7, 3))
    shared = NODES["array used twice"]
    with pytest.raises(ValueError, match="uses one array twice"):
        fit(shared, normal(shared.n_in, shared.n_out))


@pytest.mark.parametrize("shape", [(40, 30), (30, 40), (5, 60), (3, 2, 50, 40)], ids=str)
def test_truncate_is_the_svd(shape: tuple[int, ...]) -> None:
    x = normal(*shape)
    u, s, vt = np.linalg.svd(x, full_matrices=False)
    left, right = truncate(x, 4)
    expected = (u[..., :4] * s[..., None, :4]) @ vt[..., :4, :]
    missed = np.linalg.norm(x - left @ right) - np.linalg.norm(x - expected)
    assert missed <= error_bound("float64", x.size) * np.linalg.norm(x)


@pytest.mark.parametrize("shape", [(60, 90), (90, 60), (4, 30, 50)], ids=str)
def test_sketch_finds_a_wide_range_of_singular_values(shape: tuple[int, ...]) -> None:
    left = normal(*shape[:-1], 6) * np.logspace(0, -4, 6)
    x = left @ normal(*shape[:-2], 6, shape[-1])
    found = np.matmul(*sketch(x, 6))
    assert np.linalg.norm(x - found) <= error_bound("float32", 1) * np.linalg.norm(x)


def test_complete_ignores_what_is_not_known() -> None:
    known = np.ones((20, 15), bool)
    known[15:, 10:] = False
    x = normal(2, 20, 3) @ normal(2, 3, 15)
    spoiled = np.where(known, x, 99.0)
    np.testing.assert_allclose(
        np.matmul(*complete(spoiled, known, 3)), x, **tolerance("float64", 4096, scale=100)
    )


def test_families_without_a_closed_form_improve_on_their_start() -> None:
    w = normal(24, 36)
    for family, parameters in (("low_rank_lgp", {"g": 4, "r": 3}), ("bh4", {"b": 4})):
        few, many = (FAMILIES[family].nearest(w, **parameters, sweeps=s).error for s in (1, 10))
        assert many <= few
