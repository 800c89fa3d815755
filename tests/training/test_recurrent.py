"""Structured LSTM and GRU layers against PyTorch's, and against their own numpy form."""

from __future__ import annotations

import numpy as np
import pytest

from tvmstruct.errors import ModelError
from tvmstruct.ops import Dense
from tvmstruct.planning import LayerPlan
from tvmstruct.recurrent import Activation, Cell, Recurrent
from tvmstruct.recurrent_forms import antman
from tvmstruct.testing import tolerance

pytest.importorskip("torch")

import torch

from tvmstruct.training import StructuredGRU, StructuredLSTM, convert

PAIRS = {"lstm": (torch.nn.LSTM, StructuredLSTM), "gru": (torch.nn.GRU, StructuredGRU)}
N_IN, H, STEPS, BATCH = 11, 14, 5, 3
FORMS = {
    "lgp_shuffle": antman("lgp_shuffle", g_im=3, g_hm=2),
    "lgp_dense": antman("lgp_dense", g_im=3, g_hm=2),
    "low_rank_lgp": antman("low_rank_lgp", g_im=2, g_hm=3, r_im=2, r_hm=3),
    "low_rank": (LayerPlan("low_rank", {"r": 4}), LayerPlan("low_rank", {"r": 3})),
    "vvma": (LayerPlan("vvma", {"k": 4}), LayerPlan("vvma", {"k": 7})),
    "kronecker": (LayerPlan("kronecker", {"r": 2}), LayerPlan("kronecker", {"r": 2})),
    "dense and shuffled": (None, antman("lgp_shuffle", g_im=1, g_hm=7)[1]),
}


def states(kind: str, layers: int):
    h, c = (torch.randn(layers, BATCH, H) for _ in range(2))
    return (h, c) if kind == "lstm" else h


def flat(state) -> list[torch.Tensor]:
    return list(state) if isinstance(state, tuple) else [state]


@pytest.mark.parametrize("kind", PAIRS)
@pytest.mark.parametrize("batch_first", [False, True])
@pytest.mark.parametrize("given", [False, True])
def test_dense_layers_are_pytorchs(kind: str, batch_first: bool, given: bool) -> None:
    torch.manual_seed(0)
    theirs = PAIRS[kind][0](N_IN, H, 3, batch_first=batch_first)
    plan = {"weight_hh_l1": LayerPlan("low_rank", {"r": H})}  # exact: the full rank
    ours, _ = convert(theirs, plan)
    assert isinstance(ours, PAIRS[kind][1])
    x = torch.randn(BATCH, STEPS, N_IN) if batch_first else torch.randn(STEPS, BATCH, N_IN)
    state = states(kind, 3) if given else None
    want, got = theirs(x, state), ours(x, state)
    bound = tolerance("float32", N_IN + H, scale=4)
    for a, b in zip([got[0], *flat(got[1])], [want[0], *flat(want[1])], strict=True):
        np.testing.assert_allclose(a.detach().numpy(), b.detach().numpy(), **bound)


@pytest.mark.parametrize("kind", PAIRS)
@pytest.mark.parametrize("name", FORMS)
def test_structured_layers_are_their_numpy_form(kind: str, name: str) -> None:
    torch.manual_seed(1)
    module = PAIRS[kind][1].of(N_IN, H, 2, forms=FORMS[name])
    x, state = torch.randn(STEPS, BATCH, N_IN), states(kind, 2)
    y, last = module(x, state)
    want, finals = x.numpy(), []
    for k, layer in enumerate(module.recurrent()):
        want, *final = layer.apply(want, *(s[k].numpy() for s in flat(state)))
        finals.append(final)
    bound = tolerance("float32", N_IN + H, scale=4)
    np.testing.assert_allclose(y.detach().numpy(), want, **bound)
    for part, tensor in enumerate(flat(last)):
        stacked = np.stack([f[part] for f in finals])
        np.testing.assert_allclose(tensor.detach().numpy(), stacked, **bound)


@pytest.mark.parametrize("kind", PAIRS)
def test_parameters_are_counted_and_come_back_bit_for_bit(kind: str) -> None:
    module = PAIRS[kind][1].of(N_IN, H, 2, forms=FORMS["low_rank_lgp"])
    layers = module.recurrent()
    assert sum(layer.params for layer in layers) == sum(p.numel() for p in module.parameters())
    again = PAIRS[kind][1](layers)
    for (name, a), (other, b) in zip(
        module.named_parameters(), again.named_parameters(), strict=True
    ):
        assert name == other
        assert torch.equal(a, b)
    first = dict(module.named_parameters())["layers.1.hidden.weight_1"]
    assert np.array_equal(list(layers[1].hidden.arrays())[1], first.detach().numpy())


def test_a_sequence_in_two_parts_is_one_sequence() -> None:
    module = StructuredLSTM.of(N_IN, H, 2, forms=FORMS["lgp_shuffle"])
    x = torch.randn(STEPS, BATCH, N_IN)
    whole, end = module(x)
    first, state = module(x[:2])
    second, last = module(x[2:], state)
    torch.testing.assert_close(torch.cat([first, second]), whole)
    torch.testing.assert_close(last, end)


def test_dropout_lies_between_layers_and_only_while_training() -> None:
    module = StructuredLSTM.of(N_IN, H, 2, dropout=0.5)
    x = torch.randn(STEPS, BATCH, N_IN)
    torch.manual_seed(2)
    a, _ = module.train()(x)
    b, _ = module(x)
    assert not torch.equal(a, b)
    alone = StructuredLSTM.of(N_IN, H, 1, dropout=0.5).train()
    assert torch.equal(alone(x)[0], alone(x)[0])
    module.eval()
    assert torch.equal(module(x)[0], module(x)[0])


def test_initial_states_of_the_gates_have_pytorchs_spread() -> None:
    """The sums of the gates of a first step have the variance of ``nn.LSTM``'s."""
    torch.manual_seed(4)
    theirs = torch.nn.LSTM(60, 120)
    want = theirs.weight_ih_l0.var() * 60 + theirs.weight_hh_l0.var() * 120
    for name in ("lgp_shuffle", "low_rank_lgp", "vvma"):
        module = StructuredLSTM.of(60, 120, forms=FORMS[name]).layers[0]
        got = (module.input.operator().to_dense() ** 2).sum() / 480
        got += (module.hidden.operator().to_dense() ** 2).sum() / 480
        assert got == pytest.approx(float(want.detach()), rel=0.2), name


def layer(n_in: int, h: int, **options) -> Recurrent:
    cell = Cell("lstm", **options)
    zero = [np.zeros((n, 4 * h), np.float32) for n in (n_in, h)]
    return Recurrent(cell, *map(Dense, zero))


@pytest.mark.parametrize(
    ("layers", "message"),
    [
        ([layer(5, 4), layer(5, 4)], "5 -> 4 below 5 -> 4"),
        ([layer(5, 4, clip=1.0)], "is not the lstm of PyTorch"),
        ([layer(5, 4, activations=(Activation("relu"),) * 3)], "is not the lstm of PyTorch"),
    ],
)
def test_refused_layers(layers: list[Recurrent], message: str) -> None:
    with pytest.raises(ModelError, match=message):
        StructuredLSTM(layers)


def test_a_layer_of_another_kind_is_refused() -> None:
    with pytest.raises(ModelError, match="lstm layer in a gru"):
        StructuredGRU([layer(5, 4)])


@pytest.mark.parametrize(
    ("x", "state", "message"),
    [
        ((STEPS, N_IN), None, "want .s, b, 11."),
        ((STEPS, BATCH, N_IN + 1), None, "want .s, b, 11."),
        ((STEPS, BATCH, N_IN), (2, BATCH + 1, H), "want 2 of .2, 3, 14."),
    ],
)
def test_refused_inputs(x, state, message: str) -> None:
    module = StructuredLSTM.of(N_IN, H, 2)
    given = None if state is None else (torch.zeros(state), torch.zeros(state))
    with pytest.raises(ModelError, match=message):
        module(torch.zeros(x), given)
