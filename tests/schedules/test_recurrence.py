"""All steps of a recurrent layer in one kernel, against the numpy definition, on every ISA."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from unittest import mock

import numpy as np
import pytest
import tvm

from tests.kernels import GUARD, build, every_isa
from tvmstruct import ops
from tvmstruct.recurrent import PARAMETERS, Activation, Cell, Recurrent
from tvmstruct.schedules.compute.recurrence import (
    Layout,
    Recurrence,
    Side,
    hidden_parts,
    pack_units,
)
from tvmstruct.schedules.registry import Kernel
from tvmstruct.schedules.x86 import recurrence as kernels
from tvmstruct.stages import lower
from tvmstruct.targets import ISAS, Isa
from tvmstruct.testing import tolerance

STEPS = 5


@dataclass(frozen=True)
class Case:
    """Cells side by side, the form of their hidden matrices, and what there is beside them."""

    cells: tuple[Cell, ...]
    h: int
    batch: int
    form: str = "dense"
    lengths: bool = False
    bias: bool = True
    peepholes: bool = False
    threads: int = 1
    team: bool = False  # whether threads share a step, however short it is

    def __str__(self) -> str:
        kinds = "+".join(c.kind for c in self.cells)
        return f"{kinds}-{self.h}x{self.batch}-{self.form}-{self.threads}{'-team' * self.team}"


def activations(*names: str) -> tuple[Activation, ...]:
    return tuple(map(Activation, names))


LSTM, GRU, RNN = Cell("lstm"), Cell("gru"), Cell("rnn")
BACK = replace(LSTM, reverse=True)
CASES = [
    Case((LSTM,), 7, 1),
    Case((LSTM, BACK), 37, 3, lengths=True, peepholes=True, threads=2),
    Case((replace(LSTM, coupled=True, clip=0.3),), 70, 5, threads=2, peepholes=True, bias=False),
    Case((GRU, replace(GRU, reverse=True)), 33, 4, lengths=True),
    Case((replace(GRU, reset_after=False, clip=0.7),), 48, 1, threads=2),
    Case((replace(GRU, reset_after=False),), 24, 2, "blocks", lengths=True),
    Case((RNN,), 130, 3, bias=False, threads=2),
    Case((replace(LSTM, activations=activations("hardsigmoid", "softsign", "elu")),), 16, 2),
    Case((replace(LSTM, activations=activations("sigmoid", "relu", "leakyrelu")),), 9, 1),
    Case((LSTM,), 40, 1, "blocks"),
    Case((LSTM, BACK), 24, 3, "low_rank", lengths=True, threads=2),
    Case((RNN,), 36, 11, "low_rank", threads=2),
    Case((LSTM,), 36, 5, "low_rank", lengths=True, threads=2, team=True),
    Case((replace(GRU, reset_after=False),), 40, 1, "blocks", threads=2, team=True),
]


def matrix(case: Case, gates: int, rng: np.random.Generator) -> ops.Op:
    """Return a hidden operator whose products keep their size."""
    h, n = case.h, gates * case.h
    if case.form == "dense":
        return ops.Dense(rng.normal(size=(h, n)) / h**0.5)
    if case.form == "blocks":
        w = rng.normal(size=(4, h // 4, n // 4)) / (h / 4) ** 0.5
        return ops.product(ops.BlockDiag(w), ops.swap(4, n // 4))
    left, right = rng.normal(size=(h, 6)) / h**0.5, rng.normal(size=(6, n)) / 6**0.5
    return ops.product(ops.Dense(left), ops.Dense(right))


def layers(case: Case, rng: np.random.Generator) -> list[Recurrent]:
    made = []
    for cell in case.cells:
        n = cell.gates * case.h
        bias = rng.normal(size=n) if case.bias else None
        holes = rng.normal(size=(3, case.h)) if case.peepholes else None
        into = ops.Dense(rng.normal(size=(3, n)))
        made.append(Recurrent(cell, into, matrix(case, cell.gates, rng), None, bias, holes))
    return made


def products(layer: Recurrent) -> list[tuple[ops.Op, int]]:
    """Return the hidden operator in the parts that a step multiplies with, and their gates."""
    out = []
    for first, gates in hidden_parts(layer.cell):
        start, stop = first * layer.h, (first + gates) * layer.h
        if isinstance(layer.hidden, ops.Dense):
            out.append((ops.Dense(layer.hidden.w[:, start:stop]), gates))
        elif gates < layer.cell.gates:
            whole = layer.hidden.n_out
            out.append((ops.product(layer.hidden, ops.Slice(whole, stop, start)), gates))
        else:
            out.append((layer.hidden, gates))
    return out


def kernel_of(isa: Isa, case: Case, made: Sequence[Recurrent]) -> Kernel:
    sides = tuple(Side(la.cell, case.bias, la.peepholes is not None) for la in made)
    programs = [
        [None if isinstance(op, ops.Dense) else lower(op, isa.lanes) for op, _ in products(la)]
        for la in made
    ]
    static = Recurrence(sides, case.h, case.batch, case.lengths)
    with mock.patch.object(kernels, "PHASE_MACS", 0 if case.team else kernels.PHASE_MACS):
        return kernels.recurrence(isa, static, programs, case.threads)


def weights(isa: Isa, layer: Recurrent) -> list[np.ndarray]:
    packed, layout = list[np.ndarray](), Layout(1, layer.h, isa.lanes)
    for op, gates in products(layer):
        if isinstance(op, ops.Dense):
            packed.append(
                pack_units(op.w[None].astype(np.float32), gates, layout, kernels.unit_width("f32"))
            )
        else:
            packed += lower(op, isa.lanes).weights
    vectors = (v for v in (layer.hidden_bias, layer.peepholes) if v is not None)
    return [*packed, *(layout.pad(v.reshape(-1, layer.h)).reshape(-1) for v in vectors)]


@pytest.fixture(scope="module")
def libraries() -> dict:
    """Return the kernels of all cases as one library for each ISA."""
    made = {}
    for isa in ISAS:
        kernels = {
            str(i): kernel_of(isa, case, layers(case, np.random.default_rng(i))).func
            for i, case in enumerate(CASES)
        }
        made[isa.name] = build(isa, kernels)
    return made


@every_isa
@pytest.mark.parametrize("number", range(len(CASES)), ids=lambda i: str(CASES[i]))
def test_agrees_with_the_definition(libraries, isa, number):
    case, rng = CASES[number], np.random.default_rng(number)
    made = layers(case, rng)
    d, rows, lstm = len(made), STEPS * case.batch, case.cells[0].kind == "lstm"
    x = rng.normal(size=(STEPS, case.batch, 3))
    h, c = rng.normal(size=(2, d, case.batch, case.h))
    lengths = rng.integers(0, STEPS + 1, case.batch).astype(np.int32) if case.lengths else None
    want = [la.apply(x, h[i], c[i], lengths) for i, la in enumerate(made)]
    arguments = [] if lengths is None else [lengths]
    arguments += [s.reshape(-1, case.h) for s in (h, c)[: 1 + lstm]]
    for layer in made:
        z = layer.input.apply(x).reshape(rows, -1)
        arguments += [z, *weights(isa, layer)]
    shapes = [(rows, d * case.h), *[(d * case.batch, case.h)] * (1 + lstm)]
    flat = [np.full(np.prod(s) + 64, GUARD, np.float32) for s in shapes]
    held = [tvm.runtime.tensor(f) for f in flat]
    results = [np.from_dlpack(t) for t in held]
    outs = [
        tvm.runtime.from_dlpack(r[: np.prod(s)].reshape(s))
        for r, s in zip(results, shapes, strict=True)
    ]
    arrays = [np.ascontiguousarray(a, np.int32 if a is lengths else np.float32) for a in arguments]
    libraries[isa.name][str(number)](*map(tvm.runtime.tensor, arrays), *outs)
    y = np.concatenate([w[0] for w in want], -1)
    expected = [y, np.stack([w[1] for w in want]), np.stack([w[2] for w in want] if lstm else [0])]
    bound = tolerance("float32", case.h)
    for result, shape, value in zip(results, shapes, expected, strict=False):
        np.testing.assert_allclose(result[: np.prod(shape)], value.reshape(-1), **bound)
        assert (result[np.prod(shape) :] == GUARD).all(), "wrote past the end of a result"


def test_every_activation():
    """One kernel for each activation would be slow to build: a cell may have any in any place."""
    x = np.random.default_rng(0).normal(size=(2, 4)) * 3
    host = ISAS[0]
    names, kernels, made = list(PARAMETERS), {}, {}
    for name in names:
        cell = Cell("rnn", activations(name))
        eye = ops.Dense(np.eye(4))
        made[name] = Recurrent(cell, eye, ops.Dense(np.eye(4)))
        case = Case((cell,), 4, 2, bias=False)
        kernels[name] = kernel_of(host, case, [made[name]]).func
    library = build(host, kernels)
    for name in names:
        z, start = x.reshape(-1, 2, 4).astype(np.float32), np.ones((2, 4), np.float32)
        out = [tvm.runtime.tensor(np.empty((2, 4), np.float32)) for _ in range(2)]
        arguments = [start, z.reshape(2, 4), *weights(host, made[name])]
        library[name](*map(tvm.runtime.tensor, arguments), *out)
        want = made[name].apply(z.astype(float), start)[0]
        np.testing.assert_allclose(
            out[0].numpy(), want[0], **tolerance("float32", 4, scale=4.0), err_msg=name
        )
