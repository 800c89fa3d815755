"""nn.LSTM, nn.GRU and nn.RNN in `from_torch`, against PyTorch."""

import numpy as np
import pytest

import tvmstruct
from tvmstruct.errors import UnsupportedOperatorError

torch = pytest.importorskip("torch")
nn, randn = torch.nn, torch.randn
pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def flat(value):
    if isinstance(value, torch.Tensor):
        return [value.numpy()]
    return [array for part in value for array in flat(part)]


def assert_same(module, source, *args, atol=1e-6):
    got = tvmstruct.compile(source).run(
        {s.name: a.numpy() for s, a in zip(source.inputs, args, strict=True)}
    )
    with torch.no_grad():
        want = flat(module(*args))
    for a, b in zip(got.values(), want, strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=atol)


def test_stacked_bidirectional_lstm_of_any_batch_and_length():
    module = nn.LSTM(5, 9, num_layers=3, bidirectional=True, batch_first=True).eval()
    source = tvmstruct.from_torch(
        module, (randn(3, 6, 5),), dynamic_shapes={"input": {0: "batch", 1: "steps"}}
    )
    assert [s.shape for s in source.outputs] == [
        ("batch", "steps", 18), (6, "batch", 9), (6, "batch", 9)
    ]  # fmt: skip
    assert_same(module, source, randn(2, 9, 5))


def test_weights_are_held_once_under_their_names():
    module = nn.LSTM(5, 9, num_layers=2).eval()
    source = tvmstruct.from_torch(module, (randn(4, 3, 5),), dynamic_shapes={"input": {1: "batch"}})
    source.at({"input": (4, 7, 5)})
    shapes = {name: array.shape for name, array in source.weights.items()}
    assert shapes == {
        "weight_ih_l0": (5, 36), "weight_hh_l0": (9, 36), "bias_ih_l0": (36,),
        "weight_ih_l1": (9, 36), "weight_hh_l1": (9, 36), "bias_ih_l1": (36,),
    }  # fmt: skip


class Carried(nn.Module):
    """GRU, RNN and LSTM one after the other, with states that go in and come out."""

    def __init__(self):
        super().__init__()
        self.gru = nn.GRU(5, 8, num_layers=2, bias=False)
        self.rnn = nn.RNN(8, 3, nonlinearity="relu", bidirectional=True)
        self.lstm = nn.LSTM(6, 7)

    def forward(self, x, h, a, b):
        y, h = self.gru(x, h)
        z, k = self.rnn(y)
        out, (a, b) = self.lstm(z, (a, b))
        return out, h, k, a, b


def test_carried_states_continue_a_sequence():
    module = Carried().eval()
    args = randn(6, 3, 5), randn(2, 3, 8), randn(1, 3, 7), randn(1, 3, 7)
    assert_same(module, tvmstruct.from_torch(module, args), *args)


class Projected(nn.Module):
    """LSTMs that project their state; the second continues from states that are given."""

    def __init__(self):
        super().__init__()
        self.first = nn.LSTM(5, 13, num_layers=2, proj_size=6, bidirectional=True)
        self.second = nn.LSTM(12, 9, proj_size=4, bias=False, bidirectional=True)

    def forward(self, x, h, c):
        y, (a, b) = self.first(x)
        z, (h, c) = self.second(y, (h, c))
        return z, a, b, h, c


@pytest.mark.parametrize("steps", [1, 6])
def test_projected_states(steps):
    module = Projected().eval()
    args = randn(steps, 3, 5), randn(2, 3, 4), randn(2, 3, 9)
    source = tvmstruct.from_torch(module, args)
    names = {n: a.shape for n, a in source.weights.items()}
    assert names["first.weight_hr_l0"] == (13, 6)
    assert names["first.weight_hh_l0"] == (6, 52)
    assert_same(module, source, *args)


def test_one_projected_direction():
    module = nn.LSTM(5, 8, proj_size=3).eval()
    args = (randn(4, 2, 5),)
    assert_same(module, tvmstruct.from_torch(module, args), *args)


def test_a_weight_that_another_layer_reads_keeps_its_own_layout():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.rnn = nn.RNN(5, 20)

        def forward(self, x):
            return self.rnn(x)[0] @ self.rnn.weight_ih_l0

    module = Tied().eval()
    x = randn(4, 2, 5)
    source = tvmstruct.from_torch(module, (x,))
    assert {"rnn.weight_ih_l0", "rnn.weight_ih_l0.gates"} <= set(source.tensors)
    assert_same(module, source, x)


def test_half_precision_is_computed_in_float32():
    module, x = nn.GRU(5, 4).eval().half(), randn(6, 3, 5).half()
    source = tvmstruct.from_torch(module, (x,))
    assert source.outputs[0].dtype == "float16"
    assert_same(module, source, x, atol=2e-3)


@pytest.mark.parametrize(
    ("module", "why"),
    [
        (nn.GRU(5, 4).double().eval(), "computes in float64"),
    ],
    ids=["double"],
)
def test_what_cannot_be_compiled_is_named(module, why):
    x = randn(6, 3, 5, dtype=next(module.parameters()).dtype)
    with pytest.raises(UnsupportedOperatorError, match=why):
        tvmstruct.from_torch(module, (x,))


def test_computed_weights_are_refused():
    class Scaled(nn.Module):
        def __init__(self):
            super().__init__()
            self.rnn = nn.RNN(5, 4, bias=False)

        def forward(self, x):
            weights = [w * 2 for w in self.rnn.parameters()]
            return torch.rnn_tanh(
                x, x.new_zeros(1, 3, 4), weights, False, 1, 0.0, False, False, False
            )

    with pytest.raises(UnsupportedOperatorError, match=r"rnn_tanh.*computed at run time"):
        tvmstruct.from_torch(Scaled().eval(), (randn(6, 3, 5),))
