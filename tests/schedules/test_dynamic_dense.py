"""Dense on rounded activations and the source's integers against ONNX's definition in numpy."""

from __future__ import annotations

import re

import numpy as np
import pytest
import tvm

import tests.kernels as plain
from tests import low_precision
from tests.kernels import finish, random_picks
from tests.low_precision import CHOSEN, ROWS, SHAPES, Case, choose, tuned
from tests.schedules.test_bf16_dense import busiest_loop
from tvmstruct.schedules.compute.dense import Epilogue
from tvmstruct.schedules.compute.low_precision import DYNAMIC, recover_integers
from tvmstruct.schedules.registry import Kernel
from tvmstruct.schedules.x86.precisions import Precision
from tvmstruct.targets import ISAS
from tvmstruct.testing import tolerance

ISA = [  # with the instruction for dot products of bytes, and without
    pytest.param("avx512", marks=pytest.mark.isa("avx512vnni")),
    pytest.param("avx2", marks=pytest.mark.isa("avxvnni")),
    pytest.param("avx512 pairs", marks=pytest.mark.isa("avx512")),
    pytest.param("avx2 pairs", marks=pytest.mark.isa("avx2")),
    pytest.param("sse pairs"),
]
every_isa = pytest.mark.parametrize("isa", ISA)


def chosen(isa: str) -> Precision:
    name, *pairs = isa.split()
    return choose(DYNAMIC, name, set() if pairs else None)


def build(kernels: list[Kernel], isa: str) -> tvm.runtime.Module:
    name, *pairs = isa.split()
    if not pairs:
        return low_precision.build(kernels, name)
    return plain.build(next(i for i in ISAS if i.name == name), {k.symbol: k.func for k in kernels})


def case_of(isa, sizes, epilogue, rows, rng) -> Case:
    scale = rng.uniform(0.001, 0.02, sizes[0]).astype(np.float32)
    case = Case(chosen(isa), sizes, epilogue, rows, rng, scale)
    case.scale = scale
    return case


def reference(x: np.ndarray, w: np.ndarray, scale: np.ndarray) -> np.ndarray:
    """Return DynamicQuantizeLinear, MatMulInteger in int64, and the factors of ONNX Runtime."""
    low, high = np.float32(min(x.min(initial=0), 0)), np.float32(max(x.max(initial=0), 0))
    unit = (high - low) / np.float32(255) if high > low else np.float32(1)
    zero = np.rint(np.clip(-low / unit, 0, 255)).astype(np.int64)
    steps = np.clip(np.rint(x / unit).astype(np.int64), -zero, 255 - zero)
    integers = np.rint(w.astype(np.float64) / scale).astype(np.int64)
    return (steps @ integers).astype(np.float32) * (unit * scale)


def check(isa, cases):
    library = build([case.kernel for case in cases], isa)
    for case in cases:
        product = reference(case.x, case.w, case.scale)
        found, message = case.run(library), f"{case.sizes} {case.epilogue} {case.rows}"
        if case.epilogue == Epilogue():
            np.testing.assert_array_equal(found, product, err_msg=message)
        want = finish(product.astype(np.float64), case.epilogue, case.bias, case.residual)
        np.testing.assert_allclose(found, want, **tolerance("float32"), err_msg=message)


@every_isa
def test_odd_sizes_are_exact(isa, rng):
    check(isa, [case_of(isa, s, Epilogue(), rows, rng) for s in SHAPES for rows in ROWS])


@every_isa
@pytest.mark.parametrize("rows", [0, 2, 300])
def test_rows_are_symbolic(isa, rows, rng):
    case = case_of(isa, (70, 90), Epilogue(), max(rows, 2), rng)
    case.kernel = chosen(isa).kernel(70, 90, Epilogue(), 1000)  # several threads prepare
    case.x = case.x[:rows]
    check(isa, [case])


@every_isa
def test_every_choice_computes_the_same(isa, rng):
    for rows, n, k, epilogue in CHOSEN:
        case = case_of(isa, (n, k), epilogue, rows, rng)
        check(isa, tuned(case, random_picks(rng, 3)))


@every_isa
def test_ranges_of_one_sign_ties_and_zeros(isa, rng):
    cases = [case_of(isa, (33, 65), Epilogue(), 3, rng) for _ in range(4)]
    for number, case in enumerate(cases):
        case.kernel = cases[0].kernel
        case.x[:] = [np.abs(case.x), -np.abs(case.x), 0 * case.x, np.rint(case.x * 20) / 2][number]
    cases[3].x[0, :2] = -27.5, 100  # the unit is half of one: halves are ties
    library = build([cases[0].kernel], isa)
    for case in cases:
        want = reference(case.x, case.w, case.scale)
        np.testing.assert_array_equal(case.run(library), want)


def test_integers_come_back_from_what_they_stand_for(rng):
    scale = rng.uniform(1e-5, 3, 40).astype(np.float32)
    scale[3] = 0
    for low in (-128, -99, 0, -255):
        whole = rng.integers(low, low + 256, (300, 40))
        whole[:2, 0] = low, low + 255
        q, shift = recover_integers((whole * scale).astype(np.float32), scale)
        kept = np.delete(q.astype(int) + shift, 3, axis=1)
        np.testing.assert_array_equal(kept, np.delete(whole, 3, axis=1))


@pytest.mark.parametrize("isa", ["avx512", "avx2"])
def test_the_inner_loop_is_dot_products_on_whole_registers(isa):
    kernel = chosen(isa).kernel(128, 256, Epilogue(), 64)
    loop = busiest_loop(build([kernel], isa).inspect_source("asm"), "vpdpbusd")
    loop = loop[: loop.index("\tj")]
    register, sums = ("zmm", 16) if isa == "avx512" else ("ymm", 8)
    assert len(re.findall(rf"vpdpbusd.*{register}", loop)) in (sums, 2 * sums)
    assert not re.findall(r"vpmov|\(%rsp\)|call", loop)
