"""Dense on int8 weights against exact integer arithmetic in numpy."""

from __future__ import annotations

import re

import numpy as np
import pytest

from tests.kernels import finish, random_picks
from tests.low_precision import CHOSEN, ROWS, SHAPES, Case, build, choose, tuned
from tests.schedules.test_bf16_dense import busiest_loop
from tvmstruct.errors import TargetError
from tvmstruct.schedules.compute.dense import Epilogue
from tvmstruct.schedules.compute.low_precision import quantize, stored_error
from tvmstruct.testing import tolerance

ISA = [
    pytest.param("avx512", marks=pytest.mark.isa("avx512vnni")),
    pytest.param("avx2", marks=pytest.mark.isa("avxvnni")),
]
every_isa = pytest.mark.parametrize("isa", ISA)


def reference(x: np.ndarray, w: np.ndarray) -> np.ndarray:
    """Return what the kernel must give to the last bit: int64 sums, then two float32 factors."""
    top = np.abs(x).max(axis=1)
    inverse = np.float32(127) / np.maximum(top, np.float32(1e-30))
    inverse = np.where(top > np.float32(1e-30), inverse, 0)
    rows = np.rint(x.astype(np.float64) * inverse[:, None]).astype(np.int64)
    q, scale = quantize(w)
    sums = (rows @ q.astype(np.int64)).astype(np.float32)
    return sums * (top * np.float32(1 / 127))[:, None] * scale


def check(isa, cases):
    library = build([case.kernel for case in cases], isa)
    for case in cases:
        product = reference(case.x, case.w)
        found, message = case.run(library), f"{case.sizes} {case.epilogue} {case.rows}"
        if case.epilogue == Epilogue():
            np.testing.assert_array_equal(found, product, err_msg=message)
        want = finish(product.astype(np.float64), case.epilogue, case.bias, case.residual)
        np.testing.assert_allclose(found, want, **tolerance("float32"), err_msg=message)


@every_isa
def test_odd_sizes_are_exact(isa, rng):
    chosen = choose("int8", isa)
    check(isa, [Case(chosen, s, Epilogue(), rows, rng) for s in SHAPES for rows in ROWS])


@every_isa
def test_epilogues_on_whole_and_ragged_panels(isa, rng):
    epilogues = [
        Epilogue(True, "gelu", True),
        Epilogue(True, "relu"),
        Epilogue(False, "none", True),
    ]
    chosen = choose("int8", isa)
    check(isa, [Case(chosen, (n, 20), e, 9, rng) for e in epilogues for n in (64, 37)])


@every_isa
@pytest.mark.parametrize("rows", [0, 2, 300])
def test_rows_are_symbolic(isa, rows, rng):
    chosen = choose("int8", isa)
    case = Case(chosen, (70, 90), Epilogue(), max(rows, 2), rng)
    case.kernel = chosen.kernel(70, 90, Epilogue(), 128)
    case.x = case.x[:rows]
    check(isa, [case])


@every_isa
def test_every_choice_computes_the_same(isa, rng):
    chosen = choose("int8", isa)
    for rows, n, k, epilogue in CHOSEN:
        case = Case(chosen, (n, k), epilogue, rows, rng)
        check(isa, tuned(case, random_picks(rng, 4)))


@every_isa
def test_the_largest_sums_do_not_saturate(isa, rng):
    case = Case(choose("int8", isa), (32, 4096), Epilogue(), 4, rng)
    case.x[:] = [[1], [-1], [0.5], [-3]]
    case.w[:] = np.where(np.arange(32) % 2, 1, -1)
    case.tensors = list(choose("int8", isa).tensors(case.w).values())
    check(isa, [case])


@every_isa
def test_ties_and_signs(isa, rng):
    case = Case(choose("int8", isa), (33, 65), Epilogue(), 3, rng)
    case.x[0] = np.arange(65) % 7 - 3.5
    case.x[0, 0] = 127  # the scale of the row is exactly one
    case.x[1] = -0.0
    check(isa, [case])


@every_isa
def test_special_rows(isa, rng):
    case = Case(choose("int8", isa), (40, 37), Epilogue(bias=True), 9, rng)
    case.x[1, 36], case.x[3, 2], case.x[5, 17] = np.nan, np.inf, -np.inf
    case.x[6], case.x[7] = 0, 1e-32
    found = case.run(build([case.kernel], isa))
    assert np.isnan(found[[1, 3, 5]]).all()
    np.testing.assert_array_equal(found[[6, 7]], np.stack([case.bias] * 2))
    rest = [0, 2, 4, 8]
    want = reference(case.x[rest], case.w) + case.bias
    np.testing.assert_allclose(found[rest], want, **tolerance("float32"))


@every_isa
def test_small_and_huge_rows_keep_their_scale(isa, rng):
    case = Case(choose("int8", isa), (40, 37), Epilogue(), 2, rng)
    case.x[0] *= np.float32(1e-25)
    case.x[1] *= np.float32(1e30)
    check(isa, [case])


def test_quantizing_bounds_the_error(rng):
    w = rng.normal(size=(30, 20)).astype(np.float32)
    w[:, 3] = 0
    q, scale = quantize(w)
    assert q.min() >= -127
    assert scale[3] == 0
    assert not q[:, 3].any()
    assert (np.abs(q * scale - w) <= scale / 2 * (1 + 1e-5)).all()
    np.testing.assert_array_equal(np.abs(q).max(axis=0), np.where(scale > 0, 127, 0))
    error = np.linalg.norm(q * scale - w) / np.linalg.norm(w)
    assert stored_error(w, "int8") == pytest.approx(error)


@pytest.mark.parametrize("isa", ["avx512", "avx2"])
def test_the_inner_loop_is_dot_products_on_whole_registers(isa):
    kernel = choose("int8", isa).kernel(128, 256, Epilogue(), 64)
    loop = busiest_loop(build([kernel], isa).inspect_source("asm"), "vpdpbusd")
    loop = loop[: loop.index("\tj")]
    register, sums = ("zmm", 16) if isa == "avx512" else ("ymm", 8)
    found = len(re.findall(rf"vpdpbusd.*{register}", loop))
    assert found in (sums, 2 * sums), "LLVM may unroll once"
    assert not re.findall(r"vpmov|\(%rsp\)|call", loop), "x is rounded once per call, not per panel"


@pytest.mark.parametrize("isa", ["avx512", "avx2", "sse"])
def test_a_target_without_the_instruction_is_refused(isa):
    with pytest.raises(TargetError, match=r'needs avx512vnni or avxvnni.*"bf16" works'):
        choose("int8", isa, {"avx512bf16"})
