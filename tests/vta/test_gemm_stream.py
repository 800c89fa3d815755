"""Tiled products as VTA programs: what they occupy and how long they take."""

import numpy as np
import pytest

from tvmstruct.errors import VtaConfigError
from tvmstruct.vta import gemm_stream
from tvmstruct.vta.config import DEFAULT, Config, Memory
from tvmstruct.vta.cycles import STANDARD, predict
from tvmstruct.vta.isa import Gemm, Load, encode_stream, encode_uops
from tvmstruct.vta.simulator import simulate

SHAPES = [(256, 256, 256), (1, 100, 77), (37, 320, 48)]


@pytest.mark.parametrize(
    "config", [DEFAULT, Config(log_batch=2, log_block=3)], ids=lambda c: c.name
)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_every_tiling_stays_within_the_scratchpads(shape, config):
    tilings = list(gemm_stream.tilings(*shape, config))
    assert tilings
    for tiling in tilings[:: max(1, len(tilings) // 9)]:
        stream = gemm_stream.program(tiling, config, most=3)
        encode_stream(stream, config)  # every field fits
        for load in (i for i in stream if isinstance(i, Load)):
            assert load.sram_base + load.y_size * load.x_size <= config.depth(load.memory)
        rows, inputs, outputs = shape
        assert tiling.m * config.batch >= rows
        assert tiling.steps * tiling.tk * config.block_in >= inputs
        assert tiling.n * config.block_out >= outputs


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_program_multiplies_every_tile_once(shape):
    tiling = gemm_stream.best_tiling(*shape, DEFAULT, STANDARD)
    stream = gemm_stream.program(tiling, DEFAULT)
    done = sum(i.tile_ops for i in stream if isinstance(i, Gemm) and not i.reset)
    assert done == tiling.results * tiling.steps * tiling.tm * tiling.tk * tiling.tn
    assert done >= tiling.m * tiling.k * tiling.n
    assert predict(stream).matrix_cycles == done


def test_double_buffering_keeps_the_matrix_unit_busy():
    tiling = gemm_stream.best_tiling(256, 256, 256, DEFAULT, STANDARD)
    found = predict(gemm_stream.program(tiling, DEFAULT, requantise=False))
    assert found.utilisation > 0.88


def test_pace_of_the_first_chunks_gives_the_whole():
    shape = (256, 512, 1024)
    tiling = gemm_stream.best_tiling(*shape, DEFAULT, STANDARD)
    assert tiling.results > 2 * gemm_stream.SIMULATED
    whole = predict(gemm_stream.program(tiling, DEFAULT)).cycles
    assert gemm_stream.cycles(*shape, DEFAULT, STANDARD) == pytest.approx(whole, rel=0.01)


def test_estimate_orders_tilings_as_the_cycle_model():
    found = sorted(
        gemm_stream.tilings(64, 256, 256, DEFAULT), key=lambda t: t.estimate(DEFAULT, STANDARD)
    )
    first, middle, last = (
        predict(gemm_stream.program(t, DEFAULT)).cycles
        for t in (found[0], found[len(found) // 2], found[-1])
    )
    assert first < middle < last


def test_buffers_of_one_tile_are_refused():
    small = Config(log_inp_buff_size=4)
    assert small.depth(Memory.INP) == 1
    with pytest.raises(VtaConfigError, match="no two tiles"):
        gemm_stream.best_tiling(16, 16, 16, small, STANDARD)


def tiles(matrix, rows, columns):
    """Return ``matrix`` as [i][j] tiles of ``rows`` x ``columns``, row by row."""
    i, j = matrix.shape[0] // rows, matrix.shape[1] // columns
    return np.ascontiguousarray(matrix.reshape(i, rows, j, columns).transpose(0, 2, 1, 3))


@pytest.mark.parametrize(
    "config", [DEFAULT, Config(log_batch=2, log_block=3)], ids=lambda c: c.name
)
@pytest.mark.parametrize("chunks", [(12, 5, 3), (5, 2, 2), (1, 1, 1)], ids=str)
def test_program_computes_the_product(config, chunks, rng):
    """In the functional simulator, every rule of portable programs checked, against numpy."""
    m, k, n, (tm, tk, tn) = 12, 5, 3, chunks
    tiling = gemm_stream.Tiling(m, k, n, tm, tk, tn)
    full = [-(-a // b) * b for a, b in ((m, tm), (n, tn))], tiling.steps * tk
    (rows, columns), depth = full
    batch, ci, co = config.batch, config.block_in, config.block_out
    x = rng.integers(-128, 128, (rows * batch, depth * ci))
    w = rng.integers(-128, 128, (columns * co, depth * ci))
    tiling = gemm_stream.Tiling(rows, depth, columns, tm, tk, tn)
    base, image, bases = 0x10000, bytearray(), []
    parts = (
        (Memory.UOP, encode_uops(gemm_stream.uops(tiling, config), config)),
        (Memory.INP, tiles(x, batch, ci).astype(np.int8).tobytes()),
        (Memory.WGT, tiles(w, co, ci).astype(np.int8).tobytes()),
        (Memory.OUT, bytes(rows * columns * config.tile_bytes(Memory.OUT))),
    )
    for memory, data in parts:
        image += bytes(-len(image) % 4096)
        bases.append((base + len(image)) // config.tile_bytes(memory))
        image += data
    stream = gemm_stream.program(tiling, config, bases=tuple(bases))
    after = simulate(stream, bytes(image), base, config).dram
    start = bases[3] * config.tile_bytes(Memory.OUT) - base
    out = after[start : start + rows * columns * batch * co].view(np.int8)
    want = np.clip((x @ w.T) >> 8, -128, 127)
    np.testing.assert_array_equal(out.reshape(rows, columns, batch, co), tiles(want, batch, co))
    assert predict(stream, config).cycles > tiling.m * tiling.k * tiling.n
