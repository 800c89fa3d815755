"""Hash and gather against the numpy definition, on every instruction set."""

from dataclasses import replace

import numpy as np
import pytest
import tvm

from tests.kernels import build, call, every_isa, extras, finish, random_picks
from tvmstruct.lookup import hash_codes
from tvmstruct.schedules.compute.dense import Epilogue
from tvmstruct.schedules.compute.hash_tables import Tables
from tvmstruct.schedules.registry import tuned_kernel
from tvmstruct.schedules.x86 import X86Kernels
from tvmstruct.schedules.x86.hash_tables import gather_alone, hash_tables, laid_out, legal
from tvmstruct.targets import ISAS

PLAIN, BIAS = Epilogue(False, "none", False, None), Epilogue(True, "none", False, None)
CASES = [  # h, tau, n, flips, scaled, dtype, epilogue
    Tables(3, 4, 5, 0, True, "f32", Epilogue(True, "none", True, 1e-5)),
    Tables(37, 3, 50, 1, False, "bf16", PLAIN),
    Tables(20, 9, 70, 0, True, "int8", BIAS),
    Tables(16, 5, 160, 2, True, "f32", Epilogue(False, "none", True, None)),
    Tables(1, 1, 1, 1, True, "int8", PLAIN),
    Tables(33, 2, 33, 0, False, "f32", BIAS),
]
ROWS = (37, 300)  # token by token in two chunks, and table by table


def reference(t: Tables, tables: np.ndarray, z: np.ndarray) -> np.ndarray:
    """Return the weighted sums of rows in float64."""
    codes, scores = hash_codes(z.astype(np.float64), t.tau, flips=t.flips, scaled=t.scaled)
    kept = t.stored(tables).astype(np.float64)
    return sum(np.einsum("te,ten->tn", scores[:, k], kept[k][codes[:, k]]) for k in range(t.h))


def arguments(t: Tables, tables: np.ndarray, lanes: int) -> list:
    return [tvm.runtime.tensor(a) for a in t.pack(tables, lanes).values()]


def check(t: Tables, function, rows: int, lanes: int, rng) -> None:
    tables = rng.normal(size=(t.h, 1 << t.tau, t.n)).astype(np.float32)
    z = rng.normal(size=(rows, t.h * t.tau)).astype(np.float32)
    bias, residual = rng.normal(size=t.n), rng.normal(size=(rows, t.n))
    packed = arguments(t, tables, lanes)
    found = call(function, [z, *packed, *extras(t.epilogue, bias, residual)], rows, t.n)
    want = finish(reference(t, tables, z), t.epilogue, bias, residual)
    np.testing.assert_allclose(found, want, rtol=1e-5, atol=1e-5 * np.abs(want).max())


@every_isa
def test_every_case(isa, rng):
    made = {(t, rows): hash_tables(isa, t, rows, 2) for t in CASES for rows in ROWS}
    library = build(isa, {kernel.symbol: kernel.func for kernel in made.values()})
    for (t, rows), kernel in made.items():
        check(t, library[kernel.symbol], rows, isa.lanes, rng)


@pytest.mark.isa("avx512")
def test_more_tokens_than_a_chunk_and_many_threads(rng):
    t = Tables(18, 3, 40, 0, True, "f32", PLAIN)
    kernels = {
        (rows, threads): hash_tables(ISAS[0], t, rows, threads)
        for rows, threads in ((9000, 2), (700, 7), (1, 8), (40, 3))
    }
    library = build(ISAS[0], {k.symbol: k.func for k in kernels.values()})
    for (rows, _), kernel in kernels.items():
        check(t, library[kernel.symbol], rows, ISAS[0].lanes, rng)


@pytest.mark.isa("avx512")
def test_any_schedule_of_its_space(rng):
    t = Tables(17, 4, 24, 0, True, "f32", BIAS)
    kernel = hash_tables(ISAS[0], t, 1500, 2)
    tuned = [tuned_kernel(kernel, 1500, pick, (i,)) for i, pick in enumerate(random_picks(rng, 3))]
    library = build(ISAS[0], {k.symbol: k.func for k in tuned})
    for k in tuned:
        check(t, library[k.symbol], 1500, ISAS[0].lanes, rng)


@every_isa
def test_nan_stays_in_range_and_in_its_row(isa, rng):
    for scaled in (True, False):
        t = Tables(5, 3, 9, 1, scaled, "f32", PLAIN)
        kernel = hash_tables(isa, t, 3, 2)
        function = build(isa, {kernel.symbol: kernel.func})[kernel.symbol]
        tables = rng.normal(size=(5, 8, 9)).astype(np.float32)
        z = rng.normal(size=(3, 15)).astype(np.float32)
        z[1, 4] = np.nan
        found = call(function, [z, *arguments(t, tables, isa.lanes)], 3, 9)
        assert np.isnan(found[1]).all()
        want = reference(t, tables, z)
        np.testing.assert_allclose(found[[0, 2]], want[[0, 2]], rtol=1e-5, atol=1e-5)


@every_isa
def test_zero_and_large_features(isa):
    t = Tables(2, 2, 3, 0, True, "f32", PLAIN)
    kernel = hash_tables(isa, t, 1, 1)
    function = build(isa, {kernel.symbol: kernel.func})[kernel.symbol]
    tables = np.arange(24, dtype=np.float32).reshape(2, 4, 3)
    z = np.array([[0.0, -0.0, 100.0, -1e30]], np.float32)
    found = call(function, [z, *arguments(t, tables, isa.lanes)], 1, 3)
    np.testing.assert_allclose(found, reference(t, tables, z), rtol=1e-6)


@pytest.mark.parametrize(("dtype", "bound"), [("bf16", 2.0**-8), ("int8", 1 / 127)])
def test_stored_tables_are_close(dtype, bound, rng):
    t = Tables(3, 4, 21, 0, True, dtype, PLAIN)
    tables = rng.normal(size=(3, 16, 21)) * np.exp(rng.normal(size=(3, 16, 1)))
    scale = np.abs(tables).max(-1, keepdims=True)
    assert (np.abs(t.stored(tables) - tables) <= bound * scale).all()


def test_a_row_of_zeros_has_a_scale_that_loses_nothing():
    t = Tables(1, 1, 4, 0, True, "int8", PLAIN)
    assert (t.stored(np.zeros((1, 2, 4))) == 0).all()


def test_slices_of_a_row_lie_in_different_sets_of_the_caches():
    large, small = (
        Tables(128, 8, 512, 0, True, "f32", PLAIN),
        Tables(3, 4, 96, 0, True, "f32", PLAIN),
    )
    for t in (large, small):
        lines = t.stored_rows(16) * t.columns(16) * 4 // 64
        assert len({cut * lines % 64 for cut in range(t.slices(16))}) == t.slices(16)
    pages = large.stored_rows(16) * large.columns(16) * 4 // 4096
    assert len({cut * pages % 256 for cut in range(16)}) == 16
    assert large.stored_rows(16) < 1.02 * (128 << 8)


@pytest.mark.parametrize("dtype", ["f32", "bf16", "int8"])
@pytest.mark.parametrize("lanes", [4, 8, 16])
@pytest.mark.parametrize(("tau", "n"), [(8, 512), (9, 768), (3, 5), (12, 100)])
def test_slices_are_whole_lines_and_hold_every_column(dtype, lanes, tau, n):
    t = Tables(2, tau, n, 0, True, dtype, PLAIN)
    columns = t.columns(lanes)
    assert columns % lanes == 0
    assert columns * t.slices(lanes) >= n > columns * (t.slices(lanes) - 1)


def test_records_of_tuning_know_everything_but_the_shapes():
    changes = [{"flips": 1}, {"scaled": False}, {"dtype": "int8"}, {"epilogue": BIAS}, {"tau": 4}]
    base = Tables(2, 3, 8, 0, True, "f32", PLAIN)
    assert base.words == "2 3 8 flips 0 scaled f32 none"
    assert len({base.words, *(replace(base, **c).words for c in changes)}) == 1 + len(changes)


def test_a_large_neighbourhood_has_no_kernel():
    assert legal(Tables(1, 8, 4, 3, True, "f32", PLAIN))
    assert not X86Kernels(ISAS[0]).hashes(Tables(1, 16, 4, 3, True, "f32", PLAIN))


@every_isa
def test_the_gather_alone_adds_up_rows_of_given_codes(isa, rng):
    t, rows, threads = Tables(37, 3, 48, 0, True, "f32", BIAS), 45, 2
    func, chunk = gather_alone(isa, t, rows, threads)
    function = build(isa, {"gather": func.with_attr("global_symbol", "gather")})["gather"]
    tables, bias = rng.normal(size=(37, 8, 48)).astype(np.float32), rng.normal(size=48)
    codes = rng.integers(0, 8, (threads, chunk, 37), np.int32) + 8 * np.arange(37, dtype=np.int32)
    scores = rng.normal(size=codes.shape).astype(np.float32)
    given = [np.stack([laid_out(t, one) for one in a]) for a in (codes, scores)]
    given = [tvm.runtime.tensor(a) for a in given]
    found = call(function, [*given, *arguments(t, tables, isa.lanes), bias.astype("f4")], rows, 48)
    sums = np.einsum("tik,tikn->tin", scores, tables.reshape(-1, 48)[codes]) + bias
    want = np.concatenate([sums[0, :23], sums[1, :22]])
    np.testing.assert_allclose(found, want, rtol=1e-5, atol=1e-5 * np.abs(want).max())
