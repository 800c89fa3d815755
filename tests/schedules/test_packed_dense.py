"""Packed dense against float64 numpy, its intrinsic, its goldens and its assembly."""

from __future__ import annotations

import re

import numpy as np
import pytest
import tvm

from tests.kernels import build, call, every_isa, extras, finish
from tvmstruct.schedules.compute.dense import ACTIVATIONS, Epilogue, pack, row_segments
from tvmstruct.schedules.x86 import X86Kernels
from tvmstruct.schedules.x86.intrinsics import _tile_description, fma_tile
from tvmstruct.schedules.x86.packed_dense import HEIGHTS, VECTORS
from tvmstruct.targets import ISAS
from tvmstruct.testing import tolerance

ROWS = (1, 3, 8, 17)
SHAPES = [  # (n, k): whole panels, ragged panels, single columns, depths cut into chunks
    (1, 1), (7, 33), (33, 7), (1, 400), (64, 64), (400, 1000), (31, 4096), (32, 2049), (96, 17),
    (40, 1),
]  # fmt: skip
EPILOGUES = [
    *(Epilogue(True, name, False) for name in ACTIVATIONS),
    Epilogue(False, "none", True),
    Epilogue(True, "none", True, norm=1e-5),
    Epilogue(True, "gelu", norm=0.1),
    Epilogue(True, "gelu", True),
]


def case(isa, n, k, epilogue, rows, rng):
    kernel = X86Kernels(isa).packed_dense(n, k, epilogue, rows)
    x, w = rng.normal(size=(rows, k)), rng.normal(size=(k, n)) / np.sqrt(k)
    x, w = x.astype(np.float32), w.astype(np.float32)
    bias, residual = rng.normal(size=n), rng.normal(size=(rows, n))
    more = extras(epilogue, bias, residual)
    want = finish(x.astype(np.float64) @ w, epilogue, bias, residual)
    return kernel, [x, pack(w, X86Kernels(isa).panel_width), *more], want


def check(isa, problems, rng):
    cases = [(case(isa, *problem, rng), problem) for problem in problems]
    library = build(isa, {kernel.symbol: kernel.func for (kernel, _, _), _ in cases})
    for (kernel, arrays, want), problem in cases:
        n, k, _, rows = problem
        found = call(library[kernel.symbol], arrays, rows, n)
        np.testing.assert_allclose(found, want, **tolerance("float32", k), err_msg=str(problem))


@every_isa
def test_odd_sizes(isa, rng):
    plain = Epilogue()
    check(isa, [(n, k, plain, rows) for n, k in SHAPES for rows in ROWS], rng)


@every_isa
def test_epilogues_on_whole_and_ragged_panels(isa, rng):
    check(isa, [(37, 20, e, rows) for e in EPILOGUES for rows in (1, 11)], rng)


@every_isa
@pytest.mark.parametrize("rows", [0, 2, 300])
def test_rows_are_symbolic(isa, rows, rng):
    """A kernel that was chosen for one number of rows serves every other."""
    kernel, _, _ = case(isa, 70, 90, Epilogue(bias=True), 128, rng)
    _, arrays, want = case(isa, 70, 90, Epilogue(bias=True), max(rows, 2), rng)
    arrays[0] = arrays[0][:rows]
    found = call(build(isa, {"k": kernel.func})["k"], arrays, rows, 70)
    np.testing.assert_allclose(found, want[:rows], **tolerance("float32", 90))


@every_isa
@pytest.mark.parametrize("activation", ["gelu", "relu"])
def test_nan_stays_nan_and_in_its_row(isa, activation, rng):
    kernel, arrays, _ = case(isa, 40, 24, Epilogue(True, activation, False), 9, rng)
    arrays[0][4, 3] = np.nan
    found = call(build(isa, {"k": kernel.func})["k"], arrays, 9, 40)
    np.testing.assert_array_equal(np.isnan(found).all(axis=1), np.arange(9) == 4)
    np.testing.assert_array_equal(np.isnan(found).any(axis=1), np.arange(9) == 4)


@pytest.mark.parametrize(("n", "k", "width"), [(1, 1, 8), (64, 3, 32), (33, 5, 16)])
def test_packing_is_a_layout_and_zeros(n, k, width, rng):
    w = rng.normal(size=(k, n))
    packed = pack(w, width)
    assert packed.shape == (-(-n // width), k, width)
    unpacked = packed.transpose(1, 0, 2).reshape(k, -1)
    np.testing.assert_array_equal(unpacked[:, :n], w)
    assert not unpacked[:, n:].any()


@pytest.mark.parametrize("heights", [(8, 4, 2, 1), (6, 4, 2, 1), (5, 3, 1)])
@pytest.mark.parametrize("kind", [int, np.int64], ids=["known", "open"])  # one is no int
@pytest.mark.parametrize("m", [0, 1, 4, 5, 7, 8, 21, 47])
def test_segments_cover_every_row_once(m, kind, heights):
    covered = [
        int(s.start) + t * s.height + i
        for s in row_segments(kind(m), heights)
        for t in range(int(s.count))
        for i in range(s.height)
    ]
    assert covered == list(range(m))


@every_isa
@pytest.mark.parametrize("height", [1, 2, 4])
@pytest.mark.parametrize(("depth", "ahead"), [(2, None), (12, (12, 16)), (33, None)])
def test_the_intrinsic_does_what_its_description_says(isa, height, depth, ahead, rng):
    name = fma_tile(isa, height, 2, depth, ahead=ahead)
    described = _tile_description(height, 2 * isa.lanes, depth)
    schedule = tvm.s_tir.Schedule(described)
    schedule.tensorize(schedule.get_loops(schedule.get_sblock("update"))[0], name)
    library = build(isa, {"described": described, "implemented": schedule.mod["main"]})
    width = 2 * isa.lanes
    a, b = rng.normal(size=(height, depth)), rng.normal(size=(depth, width))
    c = rng.normal(size=(height, width)).astype(np.float32)
    results = []
    for name in ("described", "implemented"):
        out = tvm.runtime.tensor(c.copy())
        inputs = [tvm.runtime.tensor(v.astype(np.float32)) for v in (a, b)]
        library[name](*inputs, out)
        results.append(out.numpy())
    np.testing.assert_allclose(*results, **tolerance("float32", depth))
    want = c + a.astype(np.float32).astype(np.float64) @ b.astype(np.float32)
    np.testing.assert_allclose(results[1], want, **tolerance("float32", depth))


GOLDENS = {
    "packed_dense_avx512_64x96_bias_relu": (0, 64, 96, Epilogue(True, "relu"), 8),
    "packed_dense_avx512_40x48_single_row": (0, 40, 48, Epilogue(), 1),
    "packed_dense_avx2_32x4096_residual": (1, 32, 4096, Epilogue(True, "none", True), 8),
}


@pytest.mark.parametrize("name", GOLDENS)
def test_golden(name, golden):
    isa, n, k, epilogue, rows = GOLDENS[name]
    func = X86Kernels(ISAS[isa]).packed_dense(n, k, epilogue, rows).func
    golden(name, func.with_attr("global_symbol", "packed_dense").script())


def test_the_first_tiles_fetch_the_next_panel():
    kernel = X86Kernels(ISAS[0]).packed_dense(128, 256, Epilogue(), 64)
    assembly = build(ISAS[0], {"k": kernel.func}).inspect_source("asm")
    assert "prefetcht1" in assembly
    single = X86Kernels(ISAS[0]).packed_dense(128, 256, Epilogue(), 1)
    assert "prefetch" not in build(ISAS[0], {"k": single.func}).inspect_source("asm")


@pytest.mark.parametrize("isa", ISAS, ids=lambda isa: isa.name)
def test_assembly_calls_no_library_and_takes_no_workspace(isa):
    kernels = X86Kernels(isa)
    made = [kernels.packed_dense(128, 256, Epilogue(True, a), 64) for a in ACTIVATIONS]
    made += [kernels.packed_dense(128, 256, Epilogue(True, "gelu", True), 1)]
    assembly = build(isa, {k.symbol: k.func for k in made}).inspect_source("asm")
    calls = set(re.findall(r"\bcallq?\s+\*?(\S+)", assembly))
    libm = {c for c in calls if re.search(r"exp|erf|tanh|fma|pow|sqrt", c)}
    assert not libm
    assert "TVMBackendAllocWorkspace" not in assembly


def test_the_inner_loop_is_fma_on_whole_registers():
    kernel = X86Kernels(ISAS[0]).packed_dense(128, 256, Epilogue(), 64)
    assembly = build(ISAS[0], {"k": kernel.func}).inspect_source("asm")
    blocks = re.split(r"^\.?\w+:", assembly, flags=re.M)
    busiest = max(blocks, key=lambda text: len(re.findall(r"vfmadd\w+ps", text)))
    fused = re.findall(r"vfmadd\w+ps.*", busiest)
    assert len(fused) >= HEIGHTS["avx512"][0] * VECTORS
    assert all("zmm" in line for line in fused)
    assert not re.findall(r"vmovup?s?\s+%zmm\d+,.*\(%rsp\)", busiest), "accumulators are spilled"


def test_no_activation_takes_the_registers_of_the_sums():
    """AVX2 has 16: an epilogue beside the products made LLVM spill sums in every step of k."""
    kernels = X86Kernels(ISAS[1])
    made = [kernels.packed_dense(64, 384, Epilogue(True, a), 64) for a in ACTIVATIONS]
    assembly = build(ISAS[1], {k.symbol: k.func for k in made}).inspect_source("asm")
    blocks = [text.split("\tj")[0] for text in re.split(r"^\.?\w+:", assembly, flags=re.M)]
    steps = [text for text in blocks if len(re.findall("vfmadd231ps", text)) >= 8]
    assert len(steps) >= 2 * len(made), "two chunks of the depth each"
    assert not [text for text in steps if re.search(r"%ymm\d+, -?\d*\(%rsp\)", text)]


def test_the_key_of_a_kernel_is_all_that_its_code_depends_on():
    kernels = X86Kernels(ISAS[0])
    a = kernels.packed_dense(64, 32, Epilogue(), 8)
    assert kernels.packed_dense(64, 32, Epilogue(), 9) is a
    others = [
        kernels.packed_dense(32, 64, Epilogue(), 8),
        kernels.packed_dense(64, 32, Epilogue(), 1),
        kernels.packed_dense(64, 32, Epilogue(), 5000),
        kernels.packed_dense(64, 32, Epilogue(bias=True), 8),
        X86Kernels(ISAS[1]).packed_dense(64, 32, Epilogue(), 8),
    ]
    assert len({k.symbol for k in [a, *others]}) == 6
