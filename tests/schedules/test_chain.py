"""Compiled chains equal ``op.apply``: every expression, every ISA, odd numbers of rows."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from tests.catalogue import EXPRESSIONS, NODES, RAGGED
from tests.kernels import build, call, every_isa, finish
from tvmstruct import families, ops
from tvmstruct.schedules.compute.dense import ACTIVATIONS, Epilogue
from tvmstruct.schedules.x86 import X86Kernels
from tvmstruct.stages import lower
from tvmstruct.targets import ISAS
from tvmstruct.testing import tolerance

ROWS = (1, 3, 8, 17)
PARALLEL = 1 << 30  # multiply-adds that make the kernel choose its parallel form
FLAGS = ((True, False), (False, True), (True, True))  # bias, residual
EPILOGUES = [
    Epilogue(FLAGS[i % 3][0], activation, FLAGS[i % 3][1])
    for i, activation in enumerate(ACTIVATIONS)
]
FAMILIES = list({case.family: str(case) for case in RAGGED}.values())
REST = [name for name in EXPRESSIONS if name not in NODES]
BATCH = 10  # expressions compiled as one library


def scale_of(op: ops.Op, x: np.ndarray) -> float:
    """Return the size of the terms whose rounding may show in the result."""
    return max(1.0, float(np.abs(op.apply(np.abs(x))).max()))


def check(isa, names: list[str], epilogue: Epilogue, rng, macs: int | None = None) -> None:
    kernels = X86Kernels(isa)
    programs = {name: lower(EXPRESSIONS[name], isa.lanes) for name in names}
    made = {
        (name, rows == 1): kernels.chain(p, epilogue, rows, macs or EXPRESSIONS[name].macs)
        for name, p in programs.items()
        for rows in (1, 17)
    }
    library = build(isa, {kernel.symbol: kernel.func for kernel in made.values()})
    for name, rows in itertools.product(names, ROWS):
        op, kernel = EXPRESSIONS[name], made[name, rows == 1]
        x = rng.normal(size=(rows, op.n_in)).astype(np.float32)
        bias, residual = rng.normal(size=op.n_out), rng.normal(size=(rows, op.n_out))
        more = [bias] * epilogue.bias + [residual] * epilogue.residual
        found = call(library[kernel.symbol], [x, *programs[name].weights, *more], rows, op.n_out)
        want = finish(op.apply(x.astype(np.float64)), epilogue, bias, residual)
        bound = tolerance("float32", max(op.n_in, 4 * op.n_out), scale=scale_of(op, x))
        np.testing.assert_allclose(found, want, **bound, err_msg=f"{name}, {rows} rows")


@every_isa
def test_every_node(isa, rng):
    check(isa, list(NODES), Epilogue(), rng)


@pytest.mark.isa("avx512")
def test_every_family(rng):
    check(ISAS[0], FAMILIES, Epilogue(), rng)


@pytest.mark.slow
@every_isa
@pytest.mark.parametrize("start", range(0, len(REST), BATCH))
def test_every_other_expression(isa, start, rng):
    check(isa, REST[start : start + BATCH], Epilogue(), rng)


@every_isa
def test_every_epilogue(isa, rng):
    for epilogue in EPILOGUES:
        check(isa, ["product"], epilogue, rng)


@every_isa
def test_epilogues_of_families_and_forms_that_end_in_a_view(isa, rng):
    names = ["vvma 24x36 k=4", "kronecker 23x31 r=2", "lgp_shuffle 24x36 g=3", "permute 3-D"]
    check(isa, names, Epilogue(True, "gelu", True), rng)


@every_isa
def test_the_parallel_form(isa, rng):
    check(isa, ["vvma 24x36 k=4", "product"], Epilogue(bias=True), rng, macs=PARALLEL)


@pytest.mark.slow
@every_isa
@pytest.mark.parametrize("start", range(0, len(EXPRESSIONS), BATCH))
def test_the_parallel_form_of_every_expression(isa, start, rng):
    names = list(EXPRESSIONS)[start : start + BATCH]
    check(isa, names, Epilogue(bias=True), rng, macs=PARALLEL)


@every_isa
def test_a_layer_of_real_size(isa, rng):
    """384 x 1536 in 32 x 32 blocks: the scratch of one tile is far over the register limit."""
    v = rng.normal(size=(48, 12, 32)).astype(np.float32)
    op = families.vvma(rng.normal(size=(32, 32)).astype(np.float32) / 6, v)
    program = lower(op, isa.lanes)
    kernel = X86Kernels(isa).chain(program, Epilogue(), 33, op.macs)
    x = rng.normal(size=(33, op.n_in)).astype(np.float32)
    found = call(build(isa, {"k": kernel.func})["k"], [x, *program.weights], 33, op.n_out)
    want = op.apply(x.astype(np.float64))
    bound = tolerance("float32", op.n_in, scale=scale_of(op, x))
    np.testing.assert_allclose(found, want, **bound)


def test_equal_programs_share_a_kernel_and_different_ones_do_not(rng):
    kernels = X86Kernels(ISAS[0])

    def symbol(op, rows=8, macs=10, **epilogue):
        return kernels.chain(lower(op, 16), Epilogue(**epilogue), rows, macs).symbol

    a, b = (ops.BlockDiag(rng.normal(size=(4, 3, 5))) for _ in range(2))
    assert symbol(a) == symbol(b)
    others = {
        symbol(a),
        symbol(ops.BlockDiag(rng.normal(size=(3, 4, 5)))),
        symbol(a, rows=1),
        symbol(a, bias=True),
        symbol(a, rows=64, macs=PARALLEL),
    }
    assert len(others) == 5
