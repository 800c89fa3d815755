"""Whole LookupFFN layers exported by torch.export, whichever way they read their tables."""

from __future__ import annotations

import numpy as np
import pytest

import tvmstruct
from tvmstruct.errors import UnsupportedOperatorError
from tvmstruct.testing import tolerance

pytest.importorskip("torch")

import torch
from torch import nn
from torch.nn import functional as F

D, GROUPS, TAU, SIDE = 32, 8, 4, 8


def hadamard(n: int):
    h = torch.ones(1, 1)
    while len(h) < n:
        h = torch.cat([torch.cat([h, h], 1), torch.cat([h, -h], 1)])
    return h


class Layer(nn.Module):
    """LayerNorm, BH4 in its public form, signs to codes, one flat table, residual."""

    def __init__(self):
        super().__init__()
        made = torch.Generator().manual_seed(0)
        blocks = (torch.randn(D // SIDE, SIDE, SIDE, generator=made) / 16 for _ in range(4))
        self.norm = nn.LayerNorm(D)
        self.blocks = nn.ParameterList(map(nn.Parameter, blocks))
        self.tables = nn.Parameter(torch.randn(GROUPS << TAU, D, generator=made))
        self.bias = nn.Parameter(torch.randn(D, generator=made))
        self.register_buffer("powers", 2 ** torch.arange(TAU - 1, -1, -1))
        self.register_buffer("offsets", torch.arange(GROUPS) << TAU)
        self.register_buffer("h", hadamard(D))

    def forward(self, x):
        z = y = self.norm(x)
        for w in self.blocks:
            z = torch.einsum("bsgi,gio->bsgo", z.unflatten(-1, (-1, SIDE)), w).flatten(2) @ self.h
        z = (0.7 * z + 0.3 * y).unflatten(-1, (GROUPS, TAU))
        code = ((z > 0).long() * self.powers).sum(-1)
        size = z.abs()
        score = size.sum(-1) / (1 + torch.exp(-2 * size)).prod(-1)
        return x + self.rows(code, score) + self.bias

    def rows(self, code, score):
        return (self.tables[code + self.offsets] * score.unsqueeze(-1)).sum(-2)


class Embedded(Layer):
    def rows(self, code, score):
        found = F.embedding(code + self.offsets, self.tables)
        return torch.einsum("bshn,bsh->bsn", found, score)


class Bags(Layer):
    def rows(self, code, score):
        ids, weights = (code + self.offsets).flatten(0, 1), score.flatten(0, 1)
        found = F.embedding_bag(ids, self.tables, per_sample_weights=weights, mode="sum")
        return found.unflatten(0, code.shape[:2])


class Gathered(Layer):
    def rows(self, code, score):
        tables = self.tables.unflatten(0, (GROUPS, 1 << TAU))
        wide = code.flatten(0, 1).T.unsqueeze(-1).expand(-1, -1, D)
        found = tables.gather(1, wide) * score.flatten(0, 1).T.unsqueeze(-1)
        return found.sum(0).unflatten(0, code.shape[:2])


@pytest.mark.parametrize("layer", [Layer, Embedded, Bags, Gathered], ids=lambda c: c.__name__)
def test_the_whole_layer_is_one_lookup(layer):
    module = layer().eval()
    x = torch.randn(2, 5, D, generator=torch.Generator().manual_seed(1))
    model = tvmstruct.compile(tvmstruct.from_torch(module, (x,)), buckets="exact")
    with torch.no_grad():
        want = module(x).numpy()
    np.testing.assert_allclose(model(x.numpy()), want, **tolerance("float32", 4 * D, scale=20))
    forms = {row.name: (row.form, row.shape) for row in model.report().layers}
    assert forms["tables"] == ("lookup", (GROUPS, 1 << TAU, D))


class Bag(nn.Module):
    def __init__(self, mode="mean", **options):
        super().__init__()
        made = torch.Generator().manual_seed(2)
        self.table, self.mode = nn.Parameter(torch.randn(7, 3, generator=made)), mode
        self.options = options

    def forward(self, ids):
        return F.embedding_bag(ids, self.table, mode=self.mode, **self.options)


@pytest.mark.parametrize("mode", ["sum", "mean", "max"])
def test_bags_of_ids(mode):
    module, ids = Bag(mode).eval(), torch.arange(12).reshape(4, 3) % 7
    model = tvmstruct.compile(tvmstruct.from_torch(module, (ids,)), buckets="exact")
    with torch.no_grad():
        want = module(ids).numpy()
    np.testing.assert_allclose(model(ids.numpy()), want, **tolerance("float32", 3))


def test_padding_in_bags_is_refused():
    ids = torch.zeros(4, 3, dtype=torch.long)
    with pytest.raises(UnsupportedOperatorError, match="padding_idx"):
        tvmstruct.from_torch(Bag("sum", padding_idx=1).eval(), (ids,))


def test_bags_of_any_length_are_refused():
    class Ragged(Bag):
        def forward(self, ids, offsets):
            return F.embedding_bag(ids, self.table, offsets, mode="sum")

    ids, offsets = torch.zeros(6, dtype=torch.long), torch.tensor([0, 2])
    with pytest.raises(UnsupportedOperatorError, match="differ in length; give it ids of two axes"):
        tvmstruct.from_torch(Ragged().eval(), (ids, offsets))


def test_elements_outside_the_data_are_not_read():
    class Elements(nn.Module):
        def forward(self, x, at):
            return x.gather(1, at)

    x, at = torch.arange(12.0).reshape(3, 4), torch.zeros(3, 2, dtype=torch.long)
    model = tvmstruct.compile(tvmstruct.from_torch(Elements().eval(), (x, at)), buckets="exact")
    found = model(x.numpy(), np.array([[0, 3], [-1, 1 << 40], [-(1 << 40), 2]]))
    np.testing.assert_array_equal(found, [[0, 3], [7, 7], [8, 10]])
