"""Dense on AMX tiles: its instructions, and its loops run on emulated tile registers.

No test machine needs AMX: `EmulatedTiles` does with plain loops what the instructions do. Where
the CPU has AMX, the last tests run the real ones.
"""

from __future__ import annotations

import re
from dataclasses import replace

import numpy as np
import pytest
import tvm
from tvm.script.ir_builder import tirx as T

from tests.kernels import finish, random_picks
from tests.low_precision import Case, build, target
from tests.schedules.test_bf16_dense import rounded
from tests.schedules.test_int8_dense import reference
from tvmstruct.schedules.builder import loops
from tvmstruct.schedules.compute.dense import Epilogue
from tvmstruct.schedules.registry import Pick
from tvmstruct.schedules.x86.amx import ROWS, Bf16, Int8, choose_blocks, tile_dense, tile_problem
from tvmstruct.schedules.x86.precisions import precision
from tvmstruct.targets import ISAS, resolve
from tvmstruct.testing import tolerance

AVX512 = ISAS[0]
SAPPHIRE_RAPIDS = resolve("llvm -mcpu=sapphirerapids")
SIZES = [(32, 32, 32), (33, 7, 33), (100, 130, 45), (9, 64, 64), (260, 40, 1100)]  # rows, n, k
EPILOGUE = Epilogue(True, "gelu", True, norm=1e-3)


class EmulatedTiles:
    """Eight tiles of 16 rows of 16 words in memory."""

    def __init__(self, group: int) -> None:
        self.group = group

    def begin(self) -> None:
        self.words = T.alloc_buffer((8 * ROWS * ROWS,), "int32", scope="global")

    def _at(self, tile: int, row, column):
        return (tile * ROWS + row) * ROWS + column

    def zero(self, tile: int) -> None:
        with loops(ROWS, ROWS) as (i, j):
            T.buffer_store(self.words, T.int32(0), [self._at(tile, i, j)])

    def load(self, tile: int, buffer, offset, stride: int) -> None:
        with loops(ROWS, ROWS) as (i, j):
            place = i * stride + j
            if buffer.dtype == "uint8":
                value = T.reinterpret("int32", buffer[T.ramp(offset + place * 4, 1, 4)])
            else:
                at = offset + place
                _, words, width = buffer.shape if len(buffer.shape) == 3 else (1, 1, 1)
                flat = len(buffer.shape) == 1
                value = buffer[
                    at if flat else (at // (words * width), at // width % words, at % width)
                ]
            T.buffer_store(self.words, value, [self._at(tile, i, j)])

    def dot(self, total: int, left: int, right: int) -> None:
        product = self._bf16 if self.group == 2 else self._int8
        with loops(ROWS, ROWS, ROWS) as (i, j, p):
            at = [self._at(total, i, j)]
            a, b = self.words[self._at(left, i, p)], self.words[self._at(right, p, j)]
            T.buffer_store(self.words, product(self.words[at[0]], a, b), at)

    def _bf16(self, total, a, b):
        value = T.reinterpret("float32", total)
        for part in (lambda w: w << 16, lambda w: w & T.int32(-65536)):
            value = value + T.reinterpret("float32", part(a)) * T.reinterpret("float32", part(b))
        return T.reinterpret("int32", value)

    def _int8(self, total, a, b):
        for i in range(4):
            unsigned = (a >> (8 * i)) & 255
            signed = (b << (24 - 8 * i)) >> 24
            total = total + unsigned * signed
        return total

    def store(self, tile: int, buffer, offset, stride: int) -> None:
        with loops(ROWS, ROWS) as (i, j):
            value = self.words[self._at(tile, i, j)]
            if buffer.dtype == "float32":
                value = T.reinterpret("float32", value)
            T.buffer_store(buffer, value, [offset + i * stride + j])

    def end(self) -> None:
        pass


def emulated(
    name: str, sizes, epilogue: Epilogue, rng, pick: Pick | None = None
) -> tuple[Case, tvm.runtime.Module]:
    """Return a case whose kernel runs on emulated tiles, with ``pick`` at fixed rows."""
    rows, n, k = sizes
    case = Case(precision(name, AVX512, SAPPHIRE_RAPIDS.features), (n, k), epilogue, rows, rng)
    arithmetic = {"bf16": Bf16, "int8": Int8}[name]
    problem = tile_problem(AVX512, n, k, epilogue, rows)
    if pick is not None:
        problem = choose_blocks(problem, rows, pick)
    func = tile_dense(problem, arithmetic(problem, EmulatedTiles(arithmetic.group)))
    func = func.with_attr("global_symbol", "emulated").with_attr("tirx.is_scheduled", True)
    case.kernel = replace(case.kernel, symbol="emulated", func=func)
    return case, build([case.kernel], "avx512")


@pytest.mark.isa("avx512bf16")
@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_bf16_loops(sizes, rng):
    case, library = emulated("bf16", sizes, EPILOGUE, rng)
    want = finish(rounded(case.x) @ rounded(case.w), EPILOGUE, case.bias, case.residual)
    np.testing.assert_allclose(case.run(library), want, **tolerance("float32", sizes[2]))


@pytest.mark.isa("avx512")
@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_int8_loops_are_exact(sizes, rng):
    case, library = emulated("int8", sizes, Epilogue(), rng)
    np.testing.assert_array_equal(case.run(library), reference(case.x, case.w))


@pytest.mark.isa("avx512")
@pytest.mark.parametrize("sizes", [(33, 70, 33), (260, 40, 1100)], ids=str)
def test_every_choice_computes_the_same(sizes, rng):
    for pick in random_picks(rng, 3):
        case, library = emulated("int8", sizes, Epilogue(), rng, pick)
        np.testing.assert_array_equal(case.run(library), reference(case.x, case.w))


@pytest.mark.isa("avx512bf16")
def test_no_rows(rng):
    case, library = emulated("bf16", (1, 40, 33), Epilogue(), rng)
    case.x = case.x[:0]
    assert case.run(library).shape == (0, 40)


@pytest.mark.parametrize(("name", "product"), [("bf16", "tdpbf16ps"), ("int8", "tdpbusd")])
def test_instructions(name, product):
    chosen = precision(name, AVX512, SAPPHIRE_RAPIDS.features)
    assert chosen.note.endswith("AMX")
    kernel = chosen.kernel(128, 2048, Epilogue(), 64)
    mod = tvm.IRModule({"k": kernel.func.with_attr("global_symbol", "k")})
    assembly = tvm.compile(mod, target=SAPPHIRE_RAPIDS.target).mod.inspect_source("asm")
    found = re.findall(r"\b(ldtilecfg|tilerelease|tilezero|tileloadd|tilestored|tdp\w+)", assembly)
    assert [found[0], found[-1]] == ["ldtilecfg", "tilerelease"]
    assert found.count(product) == found.count("tileloadd") > 0
    assert found.count("tilestored") == found.count("tilezero") > 0


@pytest.mark.parametrize("name", ["bf16", "int8"])
def test_one_thread(name):
    """Preparing x and loading the shapes of tiles in one loop nest share small buffers."""
    kernel = precision(name, AVX512, SAPPHIRE_RAPIDS.features).kernel(64, 45, Epilogue(), 12)
    mod = tvm.IRModule({"k": kernel.func.with_attr("global_symbol", "k")})
    assert "ldtilecfg" in tvm.compile(mod, target=SAPPHIRE_RAPIDS.target).mod.inspect_source("asm")


def test_few_rows_use_vectors_on_the_same_weight():
    for name in ("bf16", "int8"):
        chosen = precision(name, AVX512, SAPPHIRE_RAPIDS.features)
        assert "amx" in chosen.kernel(64, 100, Epilogue(), 9).symbol
        assert "amx" not in chosen.kernel(64, 100, Epilogue(), 8).symbol


@pytest.mark.isa("avx512bf16")
@pytest.mark.isa("avx512vnni")
@pytest.mark.parametrize("rows", [1, 8])
def test_the_vector_kernels_read_weights_packed_for_tiles(rows, rng):
    for name in ("bf16", "int8"):
        chosen = precision(name, AVX512, SAPPHIRE_RAPIDS.features)
        case = Case(chosen, (70, 45), Epilogue(), rows, rng)
        found = case.run(build([case.kernel], "avx512"))
        want = reference(case.x, case.w) if name == "int8" else rounded(case.x) @ rounded(case.w)
        np.testing.assert_allclose(found, want, **tolerance("float32", 45))


def test_a_target_without_amx_does_not_use_it():
    chosen = precision("bf16", AVX512, target("avx512").features)
    assert not chosen.note.endswith("AMX")


@pytest.mark.isa("amx-bf16")
@pytest.mark.isa("amx-int8")
@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_on_the_cpu(sizes, rng):
    rows, n, k = sizes
    for name in ("bf16", "int8"):
        chosen = precision(name, AVX512, SAPPHIRE_RAPIDS.features)
        case = Case(chosen, (n, k), Epilogue(), rows, rng)
        mod = tvm.IRModule({case.kernel.symbol: case.kernel.func})
        found = case.run(tvm.compile(mod, target=resolve("host").target).mod)
        want = reference(case.x, case.w) if name == "int8" else rounded(case.x) @ rounded(case.w)
        np.testing.assert_allclose(found, want, **tolerance("float32", k))
