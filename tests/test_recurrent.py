"""Recurrent layers in numpy against PyTorch, and as compiled modules."""

from dataclasses import replace

import numpy as np
import pytest
import torch
import tvm
from tvm import relax

import tvmstruct
from tvmstruct import ops
from tvmstruct.errors import ModelError, UnsupportedOperatorError
from tvmstruct.families import lgp_shuffle
from tvmstruct.frontends.recurrent import Recurrence, emit_recurrent
from tvmstruct.op_text import from_json, to_json
from tvmstruct.recurrent import Activation, Cell, Recurrent
from tvmstruct.schedules.compute.low_precision import quantize
from tvmstruct.testing import tolerance

MODULES = {"lstm": torch.nn.LSTM, "gru": torch.nn.GRU, "rnn": torch.nn.RNN}
N_IN, H, STEPS, BATCH = 5, 9, 7, 3


def directions(module: torch.nn.Module, kind: str) -> list[Recurrent]:
    """Return the directions of the first layer of a torch module."""
    state = {k: v.detach().numpy() for k, v in module.state_dict().items()}
    return [
        Recurrent(
            Cell(kind, reverse=bool(end)),
            ops.Dense(state[f"weight_ih_l0{end}"].T),
            ops.Dense(state[f"weight_hh_l0{end}"].T),
            state[f"bias_ih_l0{end}"],
            state[f"bias_hh_l0{end}"],
        )
        for end in ("", "_reverse")
    ]


def module(layers, *, lengths=False, states=False) -> tvm.IRModule:
    """Return ``main(x, [lengths], [h, c])``."""
    bb = relax.BlockBuilder()
    d, h = len(layers), layers[0].h
    params = [relax.Var("x", relax.TensorType((STEPS, BATCH, layers[0].n_in), "float32"))]
    if lengths:
        params.append(relax.Var("lengths", relax.TensorType((BATCH,), "int32")))
    if states:
        kind = relax.TensorType((d, BATCH, h), "float32")
        params += [relax.Var(name, kind) for name in ("h", "c")]
    x, rest = params[0], params[1:]
    given = {"lengths": rest.pop(0)} if lengths else {}
    given |= dict(zip(("h", "c"), rest, strict=False))
    with bb.function("main", params):
        with bb.dataflow():
            out = emit_recurrent(bb, x, layers, **given)
            result = bb.emit_output(relax.Tuple([v for v in out if v is not None]))
        bb.emit_func_output(result)
    return bb.get()


@pytest.mark.parametrize("kind", MODULES)
def test_numpy_agrees_with_torch(kind):
    torch.manual_seed(0)
    theirs = MODULES[kind](N_IN, H, bidirectional=True)
    x = torch.randn(STEPS, BATCH, N_IN)
    want, state = theirs(x)
    ours = [layer.apply(x.numpy()) for layer in directions(theirs, kind)]
    last = state[0] if kind == "lstm" else state
    bound = tolerance("float32", H)
    got = np.concatenate([y for y, _, _ in ours], -1)
    np.testing.assert_allclose(got, want.detach().numpy(), **bound)
    np.testing.assert_allclose(np.stack([h for _, h, _ in ours]), last.detach().numpy(), **bound)
    if kind == "lstm":
        cells = np.stack([c for _, _, c in ours])
        np.testing.assert_allclose(cells, state[1].detach().numpy(), **bound)


@pytest.mark.parametrize("kind", MODULES)
def test_compiled_agrees_with_torch(kind):
    torch.manual_seed(1)
    theirs = MODULES[kind](N_IN, H, bidirectional=True)
    model = tvmstruct.compile(module(directions(theirs, kind)))
    x = torch.randn(STEPS, BATCH, N_IN)
    want, state = theirs(x)
    y, h, *_ = model(x.numpy())
    last = state[0] if kind == "lstm" else state
    np.testing.assert_allclose(y, want.detach().numpy(), **tolerance("float32", H))
    np.testing.assert_allclose(h, last.detach().numpy(), **tolerance("float32", H))


def test_carried_state_continues_where_the_last_call_ended():
    torch.manual_seed(2)
    layers = directions(torch.nn.LSTM(N_IN, H, bidirectional=True), "lstm")[:1]
    model = tvmstruct.compile(module(layers, states=True))
    x = np.random.default_rng(0).normal(size=(2 * STEPS, BATCH, N_IN)).astype(np.float32)
    h = c = np.zeros((1, BATCH, H), np.float32)
    parts = []
    for part in (x[:STEPS], x[STEPS:]):
        y, h, c = (np.array(v) for v in model(part, h, c))
        parts.append(y)
    want, last, memory = layers[0].apply(x.astype(float))
    np.testing.assert_allclose(np.concatenate(parts), want, **tolerance("float32", H))
    np.testing.assert_allclose(h[0], last, **tolerance("float32", H))
    np.testing.assert_allclose(c[0], memory, **tolerance("float32", H))


def test_lengths_outside_the_data_are_bounded():
    """A kernel never reads outside its arrays, whatever the lengths say."""
    layers = directions(torch.nn.GRU(N_IN, H, bidirectional=True), "gru")
    model = tvmstruct.compile(module(layers, lengths=True))
    x = np.random.default_rng(1).normal(size=(STEPS, BATCH, N_IN)).astype(np.float32)
    y, _ = model(x, np.array([-3, 10**9, 4], np.int32))
    want = [layer.apply(x, lengths=np.array([0, STEPS, 4]))[0] for layer in layers]
    np.testing.assert_allclose(y, np.concatenate(want, -1), **tolerance("float32", H))


def test_a_plan_reaches_hidden_matrices_and_structure_in_them_is_found():
    rng = np.random.default_rng(3)
    n = 4 * 16
    low = (rng.normal(size=(16, 2)) @ rng.normal(size=(2, n)) / 8).astype(np.float32)
    into = rng.normal(size=(N_IN, n)).astype(np.float32)
    exact = Recurrent(Cell("lstm"), ops.Dense(into), ops.Dense(low))
    records = tvmstruct.compile(module([exact])).report().layers
    assert [r.form for r in records if r.shape == (16, n)] == ["low_rank"]
    dense = ops.Dense(rng.normal(size=(16, n)).astype(np.float32) / 4)
    mod = module([Recurrent(Cell("lstm"), ops.Dense(into), dense)])
    name = next(r.name for r in tvmstruct.compile(mod).report().layers if r.shape == (16, n))
    entry = {"family": "lgp_shuffle", "parameters": {"g": 2}}
    planned = tvmstruct.compile(mod, plan={"version": 1, "layers": {name: entry}})
    record = next(r for r in planned.report().layers if r.name == name)
    assert record.form == "lgp_shuffle"
    assert record.params == 16 * n // 2


@pytest.mark.parametrize(
    ("cell", "groups"),
    [
        (Cell("lstm"), 5),
        (Cell("lstm", clip=0.5), 4),  # 4 does not divide the 5 units of a group
        (Cell("gru"), 2),
        (Cell("gru", reset_after=False), 5),
    ],
    ids=lambda v: str(v) if isinstance(v, int) else v.kind,
)
def test_units_in_the_order_of_groups(cell, groups):
    """Two directions, one of which is in groups, with all that has to follow their order."""
    rng, h, n = np.random.default_rng(groups), 20, cell.gates * 20
    blocks = rng.normal(size=(groups, h // groups, n // groups)) / 2
    made = [
        Recurrent(
            replace(cell, reverse=reverse),
            ops.Dense(rng.normal(size=(N_IN, n))),
            lgp_shuffle(blocks) if reverse else ops.Dense(rng.normal(size=(h, n)) / 4),
            rng.normal(size=n),
            rng.normal(size=n),
            rng.normal(size=(3, h)) if cell.kind == "lstm" else None,
        )
        for reverse in (False, True)
    ]
    made = [
        replace(la, input=ops.cast(la.input, "f4"), hidden=ops.cast(la.hidden, "f4")) for la in made
    ]
    model = tvmstruct.compile(module(made, lengths=True))
    x = rng.normal(size=(STEPS, BATCH, N_IN)).astype(np.float32)
    lengths = np.array([STEPS, 2, 5], np.int32)
    want = [layer.apply(x.astype(float), lengths=lengths) for layer in made]
    y, *last = model(x, lengths)
    np.testing.assert_allclose(
        y, np.concatenate([w[0] for w in want], -1), **tolerance("float32", h)
    )
    for k, state in enumerate(last, 1):
        np.testing.assert_allclose(state, np.stack([w[k] for w in want]), **tolerance("float32", h))


class RoundedState(ops.Dense):
    """A hidden matrix in int8 that meets states rounded to steps of ``bound / 127``."""

    bound: np.ndarray

    def apply(self, x):
        q, scale = quantize(self.w)
        steps = np.rint(x / self.bound * 127)
        return (steps @ q.astype(float)) * scale * self.bound / 127


@pytest.mark.isa("avx512vnni")
@pytest.mark.parametrize("kind", MODULES)
def test_int8_rounds_the_state(kind):
    rng, h = np.random.default_rng(7), 23
    n = Cell(kind).gates * h
    w = (rng.normal(size=(h, n)) / 5).astype(np.float32)
    into, bias = ops.Dense(np.zeros((N_IN, n), np.float32)), rng.normal(size=n).astype(np.float32)
    layer = Recurrent(Cell(kind), into, ops.Dense(w), bias)
    model = tvmstruct.compile(module([layer], states=kind == "lstm"), precision="int8")
    record = next(r for r in model.report().layers if r.shape == (h, n))
    assert record.form == "dense int8"
    x = np.zeros((STEPS, BATCH, N_IN), np.float32)
    start = np.zeros((1, BATCH, h), np.float32)
    states = []
    if kind == "lstm":  # a state over 1 is not cut off
        start[0, 1], states = 3.0, [start, start]
    y = model(x, *states)[0]
    rounded = RoundedState(w)
    object.__setattr__(rounded, "bound", np.maximum(1, np.abs(start[0]).max(1, keepdims=True)))
    want = replace(layer, hidden=rounded).apply(x, *(s[0] for s in states))[0]
    np.testing.assert_allclose(y, want, rtol=0, atol=2e-3)  # a rounding may fall the other way
    exact = layer.apply(x, *(s[0] for s in states))[0]
    assert np.abs(exact - want).max() > 4 * np.abs(y - want).max()


@pytest.mark.isa("avx512vnni")
def test_unbounded_states_stay_in_f32():
    rng, n = np.random.default_rng(8), 4 * H
    cell = Cell("lstm", tuple(map(Activation, ("sigmoid", "tanh", "relu"))))
    into = ops.Dense(rng.normal(size=(N_IN, n)).astype(np.float32))
    hidden = ops.Dense(rng.normal(size=(H, n)).astype(np.float32) / 9)
    report = tvmstruct.compile(module([Recurrent(cell, into, hidden)]), precision="int8").report()
    record = next(r for r in report.layers if r.shape == (H, n))
    assert record.form == "dense"
    assert "no known bound" in record.reason


@pytest.mark.filterwarnings("ignore:LSTM with projections")
def test_projected_states_equal_pytorch():
    torch.manual_seed(3)
    lstm = torch.nn.LSTM(N_IN, H, proj_size=4)
    state = {k: v.detach().numpy() for k, v in lstm.state_dict().items()}
    into, hidden, out = (ops.Dense(state[f"weight_{k}_l0"].T) for k in ("ih", "hh", "hr"))
    biases = (state[f"bias_{k}_l0"] for k in ("ih", "hh"))
    layer = Recurrent(Cell("lstm"), into, hidden, *biases, projection=out)
    assert (layer.h, layer.n_out) == (H, 4)
    assert layer.params == sum(a.size for a in state.values())
    x, h, c = torch.randn(STEPS, BATCH, N_IN), torch.randn(1, BATCH, 4), torch.randn(1, BATCH, H)
    want, (last, memory) = lstm(x, (h, c))
    got = layer.apply(x.numpy(), h[0].numpy(), c[0].numpy())
    for a, b in zip(got, (want, last[0], memory[0]), strict=True):
        np.testing.assert_allclose(a, b.detach().numpy(), **tolerance("float32", H))


def test_operators_survive_json():
    rng = np.random.default_rng(4)
    shared = rng.normal(size=(3, 3))
    op = ops.add(
        ops.product(ops.SharedBlockDiag(shared, 2), ops.swap(2, 3), ops.Diag(rng.normal(size=6))),
        ops.product(ops.Pad(6, 8), ops.WalshHadamard(8, 0.5), ops.Slice(8, 7, 1)),
        ops.product(ops.BlockDiag(rng.normal(size=(2, 3, 3))), ops.SharedBlockDiag(shared, 2)),
    )
    text, arrays = to_json(op)
    assert sum(a is shared for a in arrays) == 1
    again = from_json(text, arrays)
    np.testing.assert_array_equal(again.to_dense(), op.to_dense())
    for damaged in (["Dense", 9], ["Nothing", 0], [], 7, ["Product", [["Dense"]]], ["Dense", -1]):
        with pytest.raises(ModelError, match="cannot be read"):
            from_json(damaged, arrays)


def test_refusals():
    dense = ops.Dense(np.zeros((3, 12)))
    with pytest.raises(UnsupportedOperatorError, match="swish"):
        Activation("swish")
    with pytest.raises(ModelError, match="takes 1 parameters"):
        Activation("elu", (1.0, 2.0))
    with pytest.raises(UnsupportedOperatorError, match="mgu"):
        Cell("mgu")
    with pytest.raises(ModelError, match="want 3"):
        Cell("lstm", (Activation("tanh"),))
    with pytest.raises(ModelError, match="clip"):
        Cell("gru", clip=-1.0)
    with pytest.raises(ModelError, match="input matrix yields 8"):
        Recurrent(Cell("lstm"), ops.Dense(np.zeros((2, 8))), dense)
    with pytest.raises(ModelError, match=r"bias has shape \(3,\)"):
        Recurrent(Cell("lstm"), dense, dense, np.zeros(3))
    with pytest.raises(ModelError, match="only an lstm has peepholes"):
        Recurrent(
            Cell("gru"), ops.Dense(np.zeros((3, 9))), ops.Dense(np.zeros((3, 9))),
            peepholes=np.zeros((3, 3)),
        )  # fmt: skip
    square = ops.Dense(np.zeros((3, 3)))
    with pytest.raises(ModelError, match="only an lstm has a projection"):
        Recurrent(Cell("rnn"), square, square, projection=square)
    with pytest.raises(ModelError, match="yields 2 features, the hidden matrix takes 3"):
        Recurrent(Cell("lstm"), dense, dense, projection=ops.Dense(np.zeros((3, 2))))
    with pytest.raises(ModelError, match="cannot be read"):
        Recurrence.read("tvmstruct.recurrence {}")
