"""Products on VTA: every stream equals integer numpy bit for bit, and is portable."""

from __future__ import annotations

import numpy as np
import pytest
import tvm

from tests.vta.integer_reference import linear
from tvmstruct import ops
from tvmstruct.errors import InputError, VtaError, VtaMemoryError
from tvmstruct.schedules.compute.tile_matmul import (
    Matmul,
    Tile,
    TileEpilogue,
    TileNest,
    TileShape,
)
from tvmstruct.schedules.vta import vta_linear
from tvmstruct.schedules.vta.nest import default_nest, estimate, nests
from tvmstruct.schedules.vta.replay import replay
from tvmstruct.schedules.vta.tile_matmul import schedule_tile_matmul
from tvmstruct.vta.config import DEFAULT, Config
from tvmstruct.vta.portable import Level, check

SMALL = Config(log_uop_buff_size=6, log_inp_buff_size=9, log_wgt_buff_size=12, log_acc_buff_size=11)
WIDE = Config(log_batch=1)


def int8(rng, *shape: int) -> np.ndarray:
    return rng.integers(-128, 128, shape).astype(np.int8)


def vector(rng, op: ops.Op) -> np.ndarray:
    return rng.integers(-5000, 5000, op.n_out).astype(np.int32)


OPERATORS = {
    "ragged": lambda rng: ops.Dense(int8(rng, 37, 50)),
    "single tile": lambda rng: ops.Dense(int8(rng, 16, 16)),
    "one output": lambda rng: ops.Dense(int8(rng, 65, 1)),
    "small blocks": lambda rng: ops.BlockDiag(int8(rng, 6, 10, 7)),
    "blocks of tiles": lambda rng: ops.BlockDiag(int8(rng, 3, 48, 32)),
    "shared blocks": lambda rng: ops.SharedBlockDiag(int8(rng, 5, 9), 12),
    "shared tiles": lambda rng: ops.SharedBlockDiag(int8(rng, 32, 16), 3),
}


def compare(kernel, op: ops.Op, bias, shift, relu: bool, rng) -> None:
    launch = kernel.launch
    x = int8(rng, launch.x.rows, op.n_in)
    found = check(launch.insn, launch.image(x), launch.base, launch.config, Level.RTL)
    assert not found
    want = linear(op, bias, shift, x, relu=relu)
    assert want.any()
    np.testing.assert_array_equal(kernel.run(x), want)


@pytest.mark.parametrize("name", OPERATORS)
@pytest.mark.parametrize("rows", [1, 5])
def test_products_equal_integers(name, rows):
    rng = np.random.default_rng(rows)
    op = OPERATORS[name](rng)
    bias, shift = vector(rng, op), rng.integers(0, 20, op.n_out)
    compare(vta_linear(op, bias, shift, False, rows), op, bias, shift, False, rng)


@pytest.mark.parametrize(
    ("bias", "shift", "relu"),
    [(0, 0, False), (1 << 7, 8, True), (40000, 9, False), (-3, 17, True), (0, 30, False)],
)
def test_epilogues_with_numbers_for_all_channels(bias, shift, relu):
    rng = np.random.default_rng(shift)
    op = ops.Dense(int8(rng, 48, 33))
    added = np.full(op.n_out, bias, np.int32)
    kernel = vta_linear(op, added, shift, relu, 3)
    x = int8(rng, 3, op.n_in)
    np.testing.assert_array_equal(kernel.run(x), linear(op, added, shift, x, relu=relu))


def test_no_bias_is_none_or_zero():
    rng = np.random.default_rng(0)
    op = ops.Dense(int8(rng, 20, 20))
    launches = [vta_linear(op, bias, 5, False, 2).launch for bias in (None, np.zeros(20))]
    assert launches[0].insn == launches[1].insn


@pytest.mark.parametrize("config", [SMALL, WIDE], ids=["small", "batch of two"])
def test_other_designs(config):
    rng = np.random.default_rng(3)
    op = ops.Dense(int8(rng, 90, 70))
    bias, shift = vector(rng, op), rng.integers(4, 18, op.n_out)
    compare(vta_linear(op, bias, shift, True, 7, config), op, bias, shift, True, rng)


def test_every_nest_computes_the_same():
    rng = np.random.default_rng(5)
    op = ops.BlockDiag(int8(rng, 4, 48, 64))
    bias, shift = vector(rng, op), rng.integers(4, 9, op.n_out)
    seen = set()
    for seed in range(6):
        draws = np.random.default_rng(seed)

        def pick(name, options, default, draws=draws):
            return int(draws.choice(options))

        kernel = vta_linear(op, bias, shift, False, 6, DEFAULT, pick)
        if kernel.launch.insn not in seen:
            seen.add(kernel.launch.insn)
            compare(kernel, op, bias, shift, False, rng)
    assert len(seen) > 3


def test_the_definition_computes_the_same_on_a_cpu():
    """Descriptions of intrinsics are what their implementations do on VTA."""
    rng = np.random.default_rng(7)
    shape, tile = TileShape(5, 2, 2, 3), Tile(1, 16, 16)
    nest, epilogue = TileNest(2, 1, 2, 1, 3, hoist=False), TileEpilogue(True, shift_tiles=1)
    definition = Matmul(shape, tile, nest, epilogue)
    func = definition.func.with_attr("global_symbol", "main")
    built = tvm.compile(tvm.IRModule({"main": func}), target=tvm.target.Target({"kind": "llvm"}))
    w = int8(rng, 2, 2, 3, 16, 16)  # (g, m, k, out, in)
    op = ops.BlockDiag(w.transpose(0, 2, 4, 1, 3).reshape(2, 48, 32))
    bias, shift, x = vector(rng, op), rng.integers(3, 9, 64), int8(rng, 5, 96)
    tiles = [np.ascontiguousarray(a, np.int32).reshape(2, 2, 1, 16) for a in (bias, shift)]
    y = tvm.runtime.tensor(np.zeros((5, 2, 2, 1, 16), np.int8))
    args = [x.reshape(5, 2, 3, 1, 16), w, *tiles]
    built["main"](*map(tvm.runtime.tensor, args), y)
    want = linear(op, bias, shift, x, relu=False)
    np.testing.assert_array_equal(y.numpy().reshape(5, 64), want)
    np.testing.assert_array_equal(vta_linear(op, bias, shift, False, 5).run(x), want)


def test_streams_are_shared_by_layers_of_one_shape():
    rng = np.random.default_rng(9)
    kernels = [vta_linear(ops.Dense(int8(rng, 32, 48)), None, 6, False, 4) for _ in range(2)]
    first, second = (kernel.launch for kernel in kernels)
    assert first.insn == second.insn
    assert first.region("w0.0").data != second.region("w0.0").data


@pytest.mark.parametrize(
    ("clipped", "least"), [(False, 0.88), (True, 0.78)], ids=["plain", "requantised"]
)
def test_utilisation_of_the_matrix_unit(clipped, least):
    """256 x 256 x 256, by the cycle model; resets of sums do not count as work."""
    from tvmstruct.schedules.registry import pick_default
    from tvmstruct.schedules.vta.chain import Chain, Product
    from tvmstruct.schedules.vta.requantise import NONE, Requantise
    from tvmstruct.vta.cycles import predict
    from tvmstruct.vta.isa import decode_stream

    class Plain(Requantise):
        epilogue = NONE

    op = ops.Dense(np.ones((256, 256), np.int8))
    kind = Requantise if clipped else Plain
    after = kind(np.zeros(256, np.int32), np.full(256, 8, np.int32))
    launch = Chain([Product(op, after)], 256, DEFAULT, pick_default).launch(
        "gemm", np.arange(256), np.arange(256)
    )
    assert predict(decode_stream(launch.insn)).cycles <= 256 * 16 * 16 / least


@pytest.mark.parametrize("sizes", [(64, 1, 8, 8), (1, 8, 3, 2), (20, 1, 7, 5)])
def test_replay_is_near_the_cycle_model(sizes):
    n, g, m, k = sizes
    rng = np.random.default_rng(0)
    op = ops.BlockDiag(int8(rng, g, 16 * k, 16 * m))
    shape, epilogue = TileShape(n, g, m, k), TileEpilogue(shifts=(7,))
    nest = default_nest(shape, epilogue, DEFAULT)
    cycles = vta_linear(op, None, 7, False, n).predict().cycles
    assert abs(replay(nest, shape, epilogue, DEFAULT) / cycles - 1) < 0.1
    others = [n for n in nests(shape, epilogue, DEFAULT)][
        :: 1 + len(list(nests(shape, epilogue, DEFAULT))) // 20
    ]
    best = estimate(nest, shape, epilogue, DEFAULT)
    assert best <= np.median([estimate(o, shape, epilogue, DEFAULT) for o in others])


def test_refusals():
    rng = np.random.default_rng(0)
    op = ops.Dense(int8(rng, 16, 16))
    with pytest.raises(VtaError, match=r"shifts from -1 to -1; want 0 to 30"):
        vta_linear(op, None, -1, False, 1)
    with pytest.raises(VtaError, match="want int8, is quantisation missing"):
        vta_linear(ops.Dense(np.ones((4, 4))), None, 0, False, 1)
    with pytest.raises(VtaError, match="Diag is no product with a matrix"):
        vta_linear(ops.Diag(np.ones(4, np.int8)), None, 0, False, 1)
    with pytest.raises(InputError, match="want int8 rows, 1 of them"):
        vta_linear(op, None, 0, False, 1).run(np.zeros((2, 16), np.int8))
    with pytest.raises(InputError, match="x has 15 features; want 16"):
        vta_linear(op, None, 0, False, 1).run(np.zeros((1, 15), np.int8))


def test_what_does_not_fit_is_not_spilled():
    tiny = Config(log_acc_buff_size=6)  # a single accumulator tile, and bias needs another
    op = ops.Dense(np.ones((16, 16), np.int8))
    with pytest.raises(VtaMemoryError, match="does not fit on chip"):
        vta_linear(op, np.arange(16), 0, False, 1, tiny)


def test_golden(golden):
    shape, nest = TileShape(4, 1, 2, 3), TileNest(2, 1, 2, 1, 3)
    definition = Matmul(shape, Tile(1, 16, 16), nest, TileEpilogue(bias=True, shifts=(7,)))
    scheduled = schedule_tile_matmul(definition).with_attr("global_symbol", "tile_matmul")
    golden("vta_tile_matmul_4x32x48_bias", scheduled.script())
