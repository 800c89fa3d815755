"""LookupFFN layers in PyTorch: numpy's values, true gradients, the compiler's result."""

from __future__ import annotations

import numpy as np
import pytest

import tvmstruct
from tvmstruct.families import bh4
from tvmstruct.lookup import Lookup
from tvmstruct.ops import Dense
from tvmstruct.testing import tolerance

pytest.importorskip("torch")

import torch

from tvmstruct.training import StructuredLookup, export

RNG = np.random.default_rng(0)


def lookup(flips: int = 0, scaled: bool = True, dtype: str = "float64") -> Lookup:
    return Lookup(
        Dense(RNG.normal(size=(11, 6)).astype(dtype)),
        RNG.normal(size=(2, 8, 5)).astype(dtype),
        RNG.normal(size=6).astype(dtype),
        RNG.normal(size=5).astype(dtype),
        flips,
        scaled,
    )


@pytest.mark.parametrize("flips", [0, 1, 3])
@pytest.mark.parametrize("scaled", [False, True])
@pytest.mark.parametrize("batch", [(), (4,), (2, 3)], ids=str)
def test_forward_is_the_numpy_layer(flips: int, scaled: bool, batch: tuple[int, ...]) -> None:
    layer = lookup(flips, scaled)
    x = RNG.normal(size=(*batch, 11))
    y = StructuredLookup(layer)(torch.from_numpy(x)).detach().numpy()
    np.testing.assert_allclose(y, layer.apply(x), **tolerance("float64", 20, scale=10))


@pytest.mark.parametrize("flips", [0, 1])
def test_gradients(flips: int) -> None:
    """Every parameter's, against finite steps that turn no bit."""
    module = StructuredLookup(lookup(flips))
    x = torch.from_numpy(RNG.normal(size=(3, 11)))
    names = dict(module.named_parameters())
    assert set(names) == {"projection.weight", "projection.bias", "tables", "bias"}

    def f(*arrays: torch.Tensor) -> torch.Tensor:
        given = dict(zip(names, arrays, strict=True))
        return torch.func.functional_call(module, given, (x,))

    torch.autograd.gradcheck(f, tuple(names.values()))


def test_the_layer_comes_back_bit_for_bit() -> None:
    layer = lookup(1, dtype="float32")
    back = StructuredLookup(layer).lookup()
    assert (back.flips, back.scaled, back.params) == (1, True, layer.params)
    for a, b in (
        (back.tables, layer.tables),
        (back.bias, layer.bias),
        (back.projection_bias, layer.projection_bias),
        (back.projection.to_dense(), layer.projection.to_dense()),
    ):
        assert a is not None
        assert b is not None
        assert a.tobytes() == b.tobytes()


@pytest.mark.parametrize("tau", [4, 6])
def test_initial_output_has_the_variance_of_a_dense_layer(tau: int) -> None:
    torch.manual_seed(0)
    layers = [StructuredLookup.of(64, 80, h=16, tau=tau, b=8) for _ in range(4)]
    x = torch.randn(600, 64)
    z = torch.stack([layer.projection(x) for layer in layers])
    assert z.var().item() == pytest.approx(1, rel=0.15)
    y = torch.stack([layer(x) for layer in layers])
    assert y.square().mean().item() == pytest.approx(1 / 3, rel=0.25)


def test_it_learns() -> None:
    """Its projection too: frozen, the same steps leave more of the loss."""
    x = torch.randn(256, 16, generator=torch.Generator().manual_seed(0))
    y = torch.stack([x[:, 0] * x[:, 1], x[:, 2].abs()], 1)

    def left(frozen: bool) -> float:
        torch.manual_seed(1)
        layer = StructuredLookup.of(16, 2, h=8, tau=4, family="low_rank", r=8)
        layer.projection.requires_grad_(not frozen)
        optimiser = torch.optim.Adam([p for p in layer.parameters() if p.requires_grad], 0.02)
        for _ in range(100):
            optimiser.zero_grad()
            loss = (layer(x) - y).square().mean()
            loss.backward()
            optimiser.step()
        return loss.item()

    assert left(frozen=False) < 0.8 * left(frozen=True) < 0.8 * y.var().item()


@pytest.mark.parametrize("flips", [0, 1])
def test_compiled(flips: int) -> None:
    torch.manual_seed(2)
    module = StructuredLookup(
        Lookup(
            bh4(RNG.normal(size=(1, 4, 4, 8, 8)).astype(np.float32) / 8, 32, 32),
            RNG.normal(size=(8, 16, 24)).astype(np.float32),
            flips=flips,
        )
    ).eval()
    source = export(module)
    for name, parameter in module.named_parameters():
        assert source.weights[name].tobytes() == parameter.detach().numpy().tobytes()
    x = torch.randn(5, 32)
    model = tvmstruct.compile(source, buckets="exact")
    with torch.no_grad():
        want = module(x).numpy()
    got = np.asarray(model(x.numpy()))
    np.testing.assert_allclose(got, want, **tolerance("float32", 32, scale=20))
    assert any("lookup" in row.form.lower() for row in model.report().layers)
