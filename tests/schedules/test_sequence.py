"""Layers in a row as one kernel equal their operators one after the other."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from tests.catalogue import EVEN, RAGGED, normal
from tests.kernels import build, call, every_isa, finish, gamma_and_beta
from tvmstruct import families
from tvmstruct.ops import Dense, Op
from tvmstruct.parts import lower_parts
from tvmstruct.schedules.compute.dense import ACTIVATIONS, Epilogue
from tvmstruct.schedules.compute.sequence import Member
from tvmstruct.schedules.x86 import X86Kernels, sequence
from tvmstruct.targets import ISAS
from tvmstruct.testing import tolerance

WIDTH = 19
FAMILIES = list({case.family: case for case in RAGGED}.values())
MODES = {"none": 1, "team": 5, "rows": 6}  # rows for which threads share the work so


class Layers:
    """Dense, structured, dense, the first once more, with epilogues and an early residual."""

    def __init__(self, isa, op: Op, rows: int, activation: str) -> None:
        self.isa, self.rows = isa, rows
        first, last = Dense(normal(WIDTH, op.n_in)), Dense(normal(op.n_out, WIDTH))
        self.ops = [first, op, last, first]
        self.epilogues = [
            Epilogue(bias=True, activation=activation),
            Epilogue(norm=1e-3),
            Epilogue(bias=True, residual=True, norm=1e-3),
            Epilogue(),
        ]
        self.tensors: list[np.ndarray] = []
        self.members: list[Member] = []
        known: dict[int, tuple[int, ...]] = {}
        self.biases = [normal(op.n_out) for op in self.ops]
        for i, (op, epilogue) in enumerate(zip(self.ops, self.epilogues, strict=True)):
            program = lower_parts(op, isa.lanes, 2)
            if id(op) not in known:
                known[id(op)] = self._take(program.weights)
            numbers = known[id(op)]
            numbers += self._take([self.biases[i]] * epilogue.bias)
            if epilogue.norm is not None:
                numbers += self._take(gamma_and_beta(op.n_out))
            self.members.append(Member(program, epilogue, i, 0 if i == 2 else None, numbers))

    def _take(self, arrays) -> tuple[int, ...]:
        first = len(self.tensors)
        self.tensors += list(arrays)
        return tuple(range(first, len(self.tensors)))

    def kernel(self, threads: int = 2):
        """Return the kernel."""
        return sequence.sequence(self.isa, self.members, [WIDTH], self.rows, threads)

    def expected(self, x: np.ndarray) -> np.ndarray:
        """Return the result in float64."""
        y = x.astype(np.float64)
        for op, epilogue, bias in zip(self.ops, self.epilogues, self.biases, strict=True):
            y = finish(op.apply(y), epilogue, bias, x)
        return y

    def check(self, function, seed: int = 0) -> None:
        """Compare the result of the compiled kernel."""
        x = np.random.default_rng(seed).normal(size=(self.rows, WIDTH)).astype(np.float32)
        want = self.expected(x)
        found = call(function, [x, *self.tensors], self.rows, want.shape[1])
        bound = tolerance("float32", 512, scale=float(np.abs(want).max()))
        np.testing.assert_allclose(found, want, **bound)


@pytest.fixture
def eager(monkeypatch):
    """Let threads share however little work."""
    monkeypatch.setattr(sequence, "WAKE_MACS", -1)
    monkeypatch.setattr(sequence, "PHASE_MACS", 0)


@every_isa
@pytest.mark.parametrize("mode", MODES)
def test_every_family_between_dense_layers(isa, mode, eager):
    activations = list(ACTIVATIONS)
    made = {}
    for i, case in enumerate(FAMILIES):
        if i % len(MODES) != (list(MODES).index(mode) + ISAS.index(isa)) % len(MODES):
            continue  # every family in every mode on one of the instruction sets
        layers = Layers(isa, case.member(), MODES[mode], activations[i % len(activations)])
        made[str(case)] = layers, layers.kernel(1 if mode == "none" else 2)
    library = build(isa, {k.symbol: k.func for _, k in made.values()})
    for layers, kernel in made.values():
        layers.check(library[kernel.symbol])


@every_isa
@pytest.mark.parametrize("mode", MODES)
def test_parts_of_an_operator(isa, mode, eager):
    case = next(case for case in EVEN if case.family == "bh4")
    layers = Layers(isa, case.member(), MODES[mode], "tanh")
    assert layers.members[1].program.parts == 2
    kernel = layers.kernel(1 if mode == "none" else 2)
    layers.check(build(isa, {kernel.symbol: kernel.func})[kernel.symbol])


@every_isa
def test_threads_share_only_what_is_worth_it(isa):
    layers = Layers(isa, FAMILIES[0].member(), 1, "relu")
    assert "parallel" not in layers.kernel().func.script()


@every_isa
def test_calls_from_many_threads(isa, eager):
    layers = Layers(isa, FAMILIES[0].member(), 1, "gelu")
    kernel = layers.kernel()
    function = build(isa, {kernel.symbol: kernel.func})[kernel.symbol]
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda seed: layers.check(function, seed), range(40)))


ROWS = {1: True, 7: True, 8: True, 16: True, 9: False, 18: False}


@pytest.mark.parametrize("rows", ROWS)
def test_rows_that_fit_a_tile_are_joined(rows):
    kernels = X86Kernels(next(isa for isa in ISAS if isa.name == "avx512"), threads=2)
    assert kernels.joins(FAMILIES[0].member(), "f32", rows) == ROWS[rows]


def test_dense_layers_keep_one_packed_weight_and_large_ones_a_kernel_of_their_own():
    kernels, structured = X86Kernels(ISAS[0], threads=2), families.low_rank(*_factors(2048, 512))
    assert not kernels.joins(Dense(normal(24, 24)), "f32", 1)
    assert kernels.joins(structured, "f32", 1)
    assert not kernels.joins(structured, "f32", 2)


def _factors(n: int, r: int) -> tuple[np.ndarray, np.ndarray]:
    return np.zeros((n, r)), np.zeros((r, n))
