"""Dense on bfloat16 weights against float64 numpy on rounded values, and its inner loop."""

from __future__ import annotations

import re

import ml_dtypes
import numpy as np
import pytest

from tests.kernels import finish, random_picks
from tests.low_precision import CHOSEN, ROWS, SHAPES, Case, build, choose, tuned
from tvmstruct.schedules.compute.dense import ACTIVATIONS, Epilogue
from tvmstruct.schedules.compute.low_precision import pack_words, round_bf16, stored_error
from tvmstruct.testing import tolerance

EPILOGUES = [
    *(Epilogue(True, name, False) for name in ACTIVATIONS),
    Epilogue(False, "none", True),
    Epilogue(True, "gelu", True),
    Epilogue(True, "none", True, norm=1e-3),
]
KERNELS = [
    pytest.param("bf16", "avx512", id="dot", marks=pytest.mark.isa("avx512bf16")),
    *(
        pytest.param("bf16-weights", isa, id=f"weights-{isa}", marks=pytest.mark.isa(isa))
        for isa in ("avx512", "avx2", "sse")
    ),
]
every_kernel = pytest.mark.parametrize(("name", "isa"), KERNELS)


def rounded(a: np.ndarray) -> np.ndarray:
    return a.astype(ml_dtypes.bfloat16).astype(np.float64)


def check(name, isa, cases):
    library = build([case.kernel for case in cases], isa)
    for case in cases:
        x = rounded(case.x) if name == "bf16" else case.x.astype(np.float64)
        want = finish(x @ rounded(case.w), case.epilogue, case.bias, case.residual)
        message = f"{case.sizes} {case.epilogue} {case.rows}"
        bound = tolerance("float32", case.sizes[1])
        np.testing.assert_allclose(case.run(library), want, **bound, err_msg=message)


@every_kernel
def test_odd_sizes(name, isa, rng):
    chosen = choose(name, isa)
    check(name, isa, [Case(chosen, s, Epilogue(), rows, rng) for s in SHAPES for rows in ROWS])


@every_kernel
def test_epilogues_on_whole_and_ragged_panels(name, isa, rng):
    chosen = choose(name, isa)
    cases = [Case(chosen, (69, 20), e, 11, rng) for e in EPILOGUES]
    cases += [Case(chosen, (n, 20), EPILOGUES[-1], 1, rng) for n in (64, 37)]
    check(name, isa, cases)


@every_kernel
@pytest.mark.parametrize("rows", [0, 2, 300])
def test_rows_are_symbolic(name, isa, rows, rng):
    """A kernel that was chosen for one number of rows serves every other."""
    chosen = choose(name, isa)
    case = Case(chosen, (70, 90), Epilogue(bias=True), max(rows, 2), rng)
    case.kernel = chosen.kernel(70, 90, Epilogue(bias=True), 128)
    case.x, case.residual = case.x[:rows], case.residual[:rows]
    check(name, isa, [case])


@every_kernel
def test_every_choice_computes_the_same(name, isa, rng):
    chosen = choose(name, isa)
    for rows, n, k, epilogue in CHOSEN:
        case = Case(chosen, (n, k), epilogue, rows, rng)
        check(name, isa, tuned(case, random_picks(rng, 4)))


@every_kernel
def test_special_values_stay_in_their_row(name, isa, rng):
    case = Case(choose(name, isa), (40, 24), Epilogue(True, "gelu"), 9, rng)
    case.x[4, 3], case.x[6, 23] = np.nan, np.inf
    found = case.run(build([case.kernel], isa))
    assert np.isnan(found[4]).all()
    assert not np.isfinite(found[6]).any() or (found[6][~np.isfinite(found[6])].size > 0)
    assert np.isfinite(np.delete(found, [4, 6], axis=0)).all()


@pytest.mark.isa("avx512bf16")
@pytest.mark.parametrize("k", [16, 33])
def test_x_is_rounded_to_nearest_even(k, rng):
    """Under the identity, y is x as the kernel rounds it: ties, overflow, infinity, denormals."""
    case = Case(choose("bf16", "avx512"), (k, k), Epilogue(), 4, rng)
    case.x[0, :8] = [1 + 2**-8, 1 + 3 * 2**-8, -1 - 2**-8, 3.3e38, 1e-40, -0.0, 1e38, 65536.5]
    case.tensors = list(choose("bf16", "avx512").tensors(np.eye(k, dtype=np.float32)).values())
    want = rounded(case.x)
    want[0, 4] = 0  # a denormal number counts as zero
    np.testing.assert_array_equal(case.run(build([case.kernel], "avx512")), want)


@pytest.mark.isa("avx512bf16")
def test_x_over_the_range_becomes_infinity():
    case = Case(choose("bf16", "avx512"), (32, 32), Epilogue(), 2, np.random.default_rng(0))
    case.tensors = list(choose("bf16", "avx512").tensors(np.eye(32, dtype=np.float32)).values())
    case.x[1] = 0
    case.x[1, 5] = np.float32(3.4e38)
    assert case.run(build([case.kernel], "avx512"))[1, 5] == np.inf


@pytest.mark.parametrize(("k", "n", "width"), [(1, 1, 8), (3, 64, 32), (33, 5, 16)])
def test_packing_is_a_layout_and_zeros(k, n, width, rng):
    for w, group in ((rng.integers(1, 99, (k, n), np.int8), 4), (rng.normal(size=(k, n)), 2)):
        values = w if group == 4 else round_bf16(w).view(np.uint16)
        packed = pack_words(values, width)
        words, panels = -(-k // group), -(-n // width)
        assert packed.shape == (panels, words, width)
        assert packed.dtype == np.int32
        parts = packed.view(values.dtype).reshape(panels, words, width, group)
        dense = parts.transpose(1, 3, 0, 2).reshape(words * group, panels * width)
        np.testing.assert_array_equal(dense[:k, :n], values)
        assert not dense[k:].any()
        assert not dense[:, n:].any()


def test_packing_rounds_up_to_a_multiple(rng):
    w = round_bf16(rng.normal(size=(5, 40))).view(np.uint16)
    packed = pack_words(w, 32, multiple=16)
    assert packed.shape == (2, 16, 32)
    np.testing.assert_array_equal(packed[:, :3], pack_words(w, 32))
    assert not packed[:, 3:].any()


def test_the_error_is_that_of_the_stored_weight(rng):
    w = rng.normal(size=(30, 20)).astype(np.float32)
    error = np.linalg.norm(rounded(w) - w) / np.linalg.norm(w)
    assert stored_error(w, "bf16") == pytest.approx(error)
    assert stored_error(w, "bf16-weights") == pytest.approx(error)
    assert stored_error(np.zeros((3, 3), np.float32), "bf16") == 0
    assert stored_error(round_bf16(w).astype(np.float32), "bf16") == 0


def busiest_loop(assembly: str, operation: str) -> str:
    """Return the basic block with most of an operation."""
    blocks = re.split(r"^\.?\w+:", assembly, flags=re.M)
    return max(blocks, key=lambda text: len(re.findall(operation, text)))


def test_the_inner_loop_is_dot_products_on_whole_registers():
    kernel = choose("bf16", "avx512").kernel(128, 256, Epilogue(), 64)
    assembly = build([kernel], "avx512").inspect_source("asm")
    loop = busiest_loop(assembly, "vdpbf16ps")
    loop = loop[: loop.index("\tj")]
    assert len(re.findall(r"vdpbf16ps.*zmm", loop)) == 16
    assert not re.findall(r"vcvt|\(%rsp\)|call", loop), "x is rounded once per call, not per panel"


@pytest.mark.parametrize(("name", "isa"), [("bf16", "avx512"), ("bf16-weights", "avx2")])
def test_assembly_calls_no_library(name, isa):
    chosen = choose(name, isa)
    made = [chosen.kernel(128, 256, Epilogue(True, a), 64) for a in ACTIVATIONS]
    assembly = build(made, isa).inspect_source("asm")
    calls = set(re.findall(r"\bcallq?\s+\*?(\S+)", assembly))
    assert not {c for c in calls if re.search(r"exp|erf|tanh|fma|bf|round", c) and "tvm" not in c}
    assert not re.findall(r"callq?\s+tvmstruct_bf16_(dot|round)\b", assembly)


def test_a_target_without_the_instruction_widens():
    assert choose("bf16", "avx512").note == "x rounded to bf16, f32 sums"
    for isa in ("avx512", "avx2", "sse"):
        chosen = choose("bf16", isa, set())
        assert "the target has no avx512bf16" in chosen.note
        assert "bf16_weight_dense" in chosen.kernel(8, 8, Epilogue(), 2).symbol
