"""Chains in one launch: structured operators stay on VTA, and VVMA wins."""

from __future__ import annotations

import numpy as np
import pytest

from tests.vta.integer_reference import linear
from tvmstruct import ops
from tvmstruct.errors import InputError, VtaError
from tvmstruct.families.kronecker import kronecker
from tvmstruct.families.vvma import vvma
from tvmstruct.schedules.vta import vta_chain, vta_kernels
from tvmstruct.vta.config import Config
from tvmstruct.vta.integer import IntLinear, Reorder, factors
from tvmstruct.vta.portable import Level, check


def int8(rng, *shape: int) -> np.ndarray:
    return rng.integers(-128, 128, shape).astype(np.int8)


def steps_of(op: ops.Op, rng, *, vector: bool = True) -> list:
    """Return the int8 steps of an operator, requantised so that their results fill int8."""
    found = []
    for part in factors(op):
        if isinstance(part, Reorder):
            found.append(part)
            continue
        depth = next(iter(part.arrays())).shape[-2]
        shift = round(np.log2(128 * np.sqrt(depth)))
        n = part.n_out
        bias = rng.integers(-3000, 3000, n) if vector else np.full(n, 1 << (shift - 1))
        amounts = rng.integers(shift - 1, shift + 2, n) if vector else np.full(n, shift)
        found.append(IntLinear(part, bias.astype(np.int32), amounts.astype(np.int32)))
    return found


def expected(steps, x: np.ndarray) -> np.ndarray:
    for step in steps:
        if isinstance(step, Reorder):
            padded = np.concatenate([x, np.zeros((len(x), 1), np.int8)], axis=1)
            x = padded[:, step.index]
        else:
            x = linear(step.op, step.bias, step.shift, x, relu=step.relu)
    return x


def compare(kernel, steps, n_in: int, rng) -> None:
    launch = kernel.launch
    x = int8(rng, launch.x.rows, n_in)
    inner = x if kernel.before is None else kernel.before.run(x)
    assert not check(launch.insn, launch.image(inner), launch.base, launch.config, Level.RTL)
    want = expected(steps, x)
    assert np.unique(want).size > 20
    np.testing.assert_array_equal(kernel.run(x), want)


CHAINS = {
    "low rank": lambda rng: ops.Dense(int8(rng, 70, 20)) @ ops.Dense(int8(rng, 20, 50)),
    "lgp shuffle": lambda rng: ops.BlockDiag(int8(rng, 4, 24, 20)) @ ops.swap(4, 20),
    "shuffle first": lambda rng: ops.swap(4, 24) @ ops.BlockDiag(int8(rng, 4, 24, 20)),
    "dense after blocks": lambda rng: (
        ops.BlockDiag(int8(rng, 4, 24, 20)) @ ops.swap(4, 20) @ ops.Dense(int8(rng, 80, 33))
    ),
    "blocks after dense": lambda rng: (
        ops.Dense(int8(rng, 33, 72)) @ ops.swap(6, 12) @ ops.BlockDiag(int8(rng, 6, 12, 20))
    ),
    "aligned blocks": lambda rng: (
        ops.Dense(int8(rng, 33, 72)) @ ops.BlockDiag(int8(rng, 6, 12, 20))
    ),
    "cropped": lambda rng: (
        ops.BlockDiag(int8(rng, 3, 16, 24)) @ ops.Slice(72, 60) @ ops.Dense(int8(rng, 60, 40))
    ),
    "padded": lambda rng: (
        ops.Dense(int8(rng, 40, 30)) @ ops.Pad(30, 36) @ ops.BlockDiag(int8(rng, 3, 12, 20))
    ),
    "tiles move": lambda rng: (
        ops.BlockDiag(int8(rng, 2, 16, 48))
        @ ops.Permute((2, 3, 16), (1, 0, 2))
        @ ops.BlockDiag(int8(rng, 3, 32, 16))
    ),
    "kronecker": lambda rng: kronecker(int8(rng, 1, 32, 16), int8(rng, 1, 16, 32)),
    "kronecker of two by two": lambda rng: kronecker(int8(rng, 1, 32, 32), int8(rng, 1, 32, 32)),
    "vvma": lambda rng: vvma(int8(rng, 16, 16), int8(rng, 16, 32, 16)),
    "vvma transposed": lambda rng: vvma(int8(rng, 16, 16), int8(rng, 32, 16, 16), transposed=True),
}


@pytest.mark.parametrize("name", CHAINS)
def test_chains_equal_integers(name):
    rng = np.random.default_rng(len(name))
    op = CHAINS[name](rng)
    steps = steps_of(op, rng)
    compare(vta_chain(steps, 3), steps, op.n_in, rng)


def test_vvma_beats_dense_six_times():
    """1024 x 1024, k = 16, one row: all cycles of a launch, int8 between the factors."""
    rng = np.random.default_rng(0)
    dense = steps_of(ops.Dense(int8(rng, 1024, 1024)), rng, vector=False)
    most = vta_chain(dense, 1).predict().cycles
    for transposed in (False, True):
        op = vvma(int8(rng, 16, 16), int8(rng, 64, 64, 16), transposed=transposed)
        steps = steps_of(op, rng, vector=False)
        kernel = vta_chain(steps, 1)
        compare(kernel, steps, 1024, rng)
        assert kernel.predict().cycles * 6 <= most


def test_relu_between_and_zeros_at_the_ends():
    rng = np.random.default_rng(1)
    first, second = steps_of(ops.Dense(int8(rng, 30, 24)) @ ops.Dense(int8(rng, 24, 20)), rng)
    first = IntLinear(first.op, first.bias, first.shift, relu=True)
    before = Reorder(np.r_[np.arange(29, 0, -1), -1])
    after = Reorder(np.r_[-1, np.arange(20)])
    steps = [before, first, second, after]
    compare(vta_chain(steps, 2), steps, 30, rng)


def test_many_micro_ops_and_tiny_memories():
    config = Config(
        log_uop_buff_size=5, log_inp_buff_size=9, log_wgt_buff_size=12, log_acc_buff_size=11
    )
    rng = np.random.default_rng(2)
    op = vvma(int8(rng, 16, 16), int8(rng, 16, 16, 16))
    steps = steps_of(op, rng)
    kernel = vta_chain(steps, 2, config)
    compare(kernel, steps, op.n_in, rng)


def test_refusals():
    rng = np.random.default_rng(0)
    op = ops.BlockDiag(int8(rng, 4, 24, 20)) @ ops.swap(4, 20) @ ops.BlockDiag(int8(rng, 4, 20, 8))
    with pytest.raises(VtaError, match="neither whole tiles nor transpositions of 16 tiles"):
        vta_chain(steps_of(op, rng), 1)
    with pytest.raises(InputError, match="no linear step"):
        vta_chain([Reorder(np.arange(4))], 1)


@pytest.mark.parametrize(
    ("blocks", "rows", "transposed"), [((2, 4, 16), 3, False), ((16, 24, 16), 1, True)]
)
def test_diagonals_go_where_the_cycle_model_says(blocks, rows, transposed):
    """Few blocks leave tiles of the matrix unit mostly empty; many keep the ALU busy longer."""
    rng = np.random.default_rng(3)
    k = blocks[2]
    op = vvma(int8(rng, k, k), int8(rng, *blocks), transposed=transposed)
    steps = steps_of(op, rng)
    kernel, stock = (vta_chain(steps, rows, portable=portable) for portable in (False, True))
    x = int8(rng, rows, op.n_in)
    np.testing.assert_array_equal(kernel.run(x), expected(steps, x))
    np.testing.assert_array_equal(stock.run(x), kernel.run(x))
    assert kernel.predict().cycles <= stock.predict().cycles
    assert kernel.portable == (blocks[0] * blocks[1] > 64)


def test_diagonals_in_the_alu_of_wide_lanes_and_tiles():
    rng = np.random.default_rng(4)
    op = vvma(int8(rng, 48, 48), int8(rng, 2, 3, 48))
    steps = steps_of(op, rng)
    config = Config(log_batch=1)
    kernel = vta_chain(steps, 3, config, portable=False)
    assert not kernel.portable
    x = int8(rng, 3, op.n_in)
    np.testing.assert_array_equal(kernel.run(x), expected(steps, x))


def test_steps_that_cannot_meet_are_launches_of_their_own():
    rng = np.random.default_rng(5)
    op = (
        ops.BlockDiag(int8(rng, 4, 24, 20))
        @ ops.swap(4, 20)
        @ ops.BlockDiag(int8(rng, 4, 20, 24))
        @ ops.Dense(int8(rng, 96, 30))
    )
    steps = steps_of(op, rng)
    kernels = vta_kernels(steps, 2)
    assert len(kernels) == 2
    x = y = int8(rng, 2, op.n_in)
    for kernel in kernels:
        y = kernel.run(y)
    np.testing.assert_array_equal(y, expected(steps, x))


def test_small_blocks_stay_apart_where_one_launch_is_slower():
    rng = np.random.default_rng(6)
    op = ops.SharedBlockDiag(int8(rng, 3, 4), 9) @ ops.swap(9, 4)
    op = op @ ops.SharedBlockDiag(int8(rng, 3, 4), 12)
    steps = steps_of(op, rng)
    with pytest.raises(VtaError, match=r"one launch takes \d+ cycles, but 2 launches \d+ and"):
        vta_chain(steps, 16)
    assert len(vta_kernels(steps, 16)) == 2
    compare(vta_chain(steps, 1), steps, op.n_in, rng)
