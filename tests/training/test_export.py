"""From PyTorch to the compiler: the same bits go in, the same numbers come out."""

from __future__ import annotations

import numpy as np
import pytest

import tvmstruct
from tvmstruct.errors import ModelError
from tvmstruct.recurrent_forms import antman
from tvmstruct.testing import tolerance

pytest.importorskip("torch")

import torch

from tvmstruct.training import (
    LanguageModel,
    StructuredEmbedding,
    StructuredGRU,
    StructuredLinear,
    StructuredLSTM,
    export,
)

VOCABULARY, H = 37, 24
FORMS = {
    "dense": (None, None),
    "lgp_shuffle": antman("lgp_shuffle", g_im=4, g_hm=6),
    "low_rank_lgp": antman("low_rank_lgp", g_im=4, g_hm=3, r_im=2, r_hm=2),
}


def run(model: tvmstruct.CompiledModel, *args) -> list[np.ndarray]:
    found = model(*(a.numpy() for a in args))
    return [np.asarray(a) for a in (found if isinstance(found, tuple) else (found,))]


def check_bits(source: tvmstruct.Source, module: torch.nn.Module) -> None:
    want = {n: p.detach().numpy() for n, p in module.named_parameters()}
    assert source.weights.keys() == want.keys()
    for name, array in source.weights.items():
        assert array.tobytes() == want[name].tobytes(), name


def close(got: list[np.ndarray], want) -> None:
    for a, b in zip(got, want, strict=True):
        assert a.shape == tuple(b.shape)
        np.testing.assert_allclose(a, b.numpy(), **tolerance("float32", 4 * H, scale=4))


@pytest.mark.parametrize("form", FORMS)
def test_a_language_model_with_carried_state(form: str) -> None:
    torch.manual_seed(0)
    module = LanguageModel.of(VOCABULARY, H, 2, forms=FORMS[form]).eval()
    source = export(module)
    check_bits(source, module)
    assert [s.name for s in source.outputs] == ["logits", "h", "c"]
    model = tvmstruct.compile(source, buckets="exact")
    ids = torch.randint(VOCABULARY, (7, 3))
    state = torch.randn(2, 3, H), torch.randn(2, 3, H)
    with torch.no_grad():
        logits, last = module(ids, state)
    close(run(model, ids, *state), [logits, *last])
    first, h, c = run(model, ids[:4], *state)  # in two parts, the state carried
    second, *end = run(model, ids[4:], *map(torch.from_numpy, (h, c)))
    close([np.concatenate([first, second]), *end], [logits, *last])


def test_an_lstm_alone() -> None:
    torch.manual_seed(1)
    module = StructuredLSTM.of(13, H, 2, forms=FORMS["lgp_shuffle"]).eval()
    x, state = torch.randn(4, 2, 13), (torch.randn(2, 2, H), torch.randn(2, 2, H))
    source = export(module)
    check_bits(source, module)
    with torch.no_grad():
        y, last = module(x, state)
    close(run(tvmstruct.compile(source, buckets="exact"), x, *state), [y, *last])


def test_a_gru_alone() -> None:
    torch.manual_seed(2)
    module = StructuredGRU.of(13, H, 1, forms=FORMS["low_rank_lgp"]).eval()
    x, state = torch.randn(4, 2, 13), torch.randn(1, 2, H)
    source = export(module)
    check_bits(source, module)
    with torch.no_grad():
        y, last = module(x, state)
    close(run(tvmstruct.compile(source, buckets="exact"), x, state), [y, last])


@pytest.mark.parametrize(
    ("family", "parameters"), [("vvma", {"k": 4}), ("low_rank_lgp", {"g": 3, "r": 2})]
)
def test_a_dense_layer(family: str, parameters: dict[str, int]) -> None:
    torch.manual_seed(3)
    module = StructuredLinear.of(family, 23, 31, **parameters).eval()
    source, x = export(module), torch.randn(5, 23)
    check_bits(source, module)
    with torch.no_grad():
        want = module(x)
    model = tvmstruct.compile(source, buckets="exact")
    close(run(model, x), [want])
    forms = {row.name: row.params for row in model.report().layers}
    assert sum(forms.values()) == module.operator().params


@pytest.mark.parametrize(("order", "dimension"), [(2, 9), (3, 19), (4, 16)])
def test_a_table_of_words(order: int, dimension: int) -> None:
    torch.manual_seed(4)
    module = StructuredEmbedding.of(50, dimension, order=order, r=2).eval()
    source, ids = export(module), torch.randint(50, (3, 2))
    check_bits(source, module)
    with torch.no_grad():
        want = module(ids)
    model = tvmstruct.compile(source, buckets="exact")
    close(run(model, ids), [want])
    assert "word2ket_xs" in [row.form for row in model.report().layers]


def test_a_structured_output_layer_and_table() -> None:
    torch.manual_seed(5)
    module = LanguageModel(
        StructuredEmbedding.of(VOCABULARY, H, order=2, r=3),
        StructuredLSTM.of(H, H, forms=FORMS["lgp_shuffle"]),
        StructuredLinear.of("low_rank", H, VOCABULARY, r=5),
    ).eval()
    source, ids = export(module), torch.randint(VOCABULARY, (3, 2))
    check_bits(source, module)
    with torch.no_grad():
        logits, last = module(ids)
    model = tvmstruct.compile(source, buckets="exact")
    zero = torch.zeros(1, 2, H)
    close(run(model, ids, zero, zero), [logits, *last])


def test_any_module_with_structured_layers_goes_through_torch_export() -> None:
    torch.manual_seed(6)
    module = torch.nn.Sequential(
        StructuredLinear.of("lgp_shuffle", 24, 36, g=4),
        torch.nn.ReLU(),
        StructuredLinear.of("monarch", 36, 24, b=3),
    ).eval()
    x = torch.randn(5, 24)
    with torch.no_grad():
        want = module(x)
    close(run(tvmstruct.compile(tvmstruct.from_torch(module, (x,))), x), [want])


def test_what_is_exported_stays_when_training_goes_on() -> None:
    module = StructuredLinear.of("low_rank", 8, 6, r=2).eval()
    source = export(module)
    before = {n: a.copy() for n, a in source.weights.items()}
    with torch.no_grad():
        module.weight.add_(1)
    assert all(np.array_equal(before[n], a) for n, a in source.weights.items())


@pytest.mark.parametrize(
    ("module", "message"),
    [
        (StructuredLinear.of("low_rank", 8, 6, r=2), "call model.eval"),
        (torch.nn.Linear(3, 4).eval(), "from_torch"),
        (StructuredLinear.of("low_rank", 8, 6, r=2).double().eval(), "weight is float64"),
        (StructuredLSTM.of(3, 4, batch_first=True).eval(), "batch_first"),
    ],
)
def test_refusals(module: torch.nn.Module, message: str) -> None:
    with pytest.raises(ModelError, match=message):
        export(module)
