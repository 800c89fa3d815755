"""LookupFFN layers that learn: gradients reach the projection through the scores of its codes."""

from __future__ import annotations

import math
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tvmstruct.families import FAMILIES
from tvmstruct.lookup import Lookup, flipped, hash_codes
from tvmstruct.ops import zeros
from tvmstruct.training.initialise import DENSE_GAIN, initialise
from tvmstruct.training.linear import StructuredLinear, to_array, to_parameter

SAMPLE = 4096  # of normal codes, whose mean square score sets the scale of the tables


class StructuredLookup(nn.Module):
    """``y = sum_k score_k tables[k, code_k] + bias`` of ``z = projection(x)``, see `Lookup`.

    ``tables`` is (h 2**tau, n_out): those of all groups, one below the other. A code does not
    change with a small step of z, so what the projection learns comes through the scores, which
    is exact wherever no feature is 0.
    """

    def __init__(self, lookup: Lookup) -> None:
        super().__init__()
        self.h, self.tau = lookup.h, lookup.tau
        self.flips, self.scaled = lookup.flips, lookup.scaled
        self.in_features, self.out_features = lookup.n_in, lookup.n_out
        bias = lookup.projection_bias
        self.projection = StructuredLinear(lookup.projection, False if bias is None else bias)
        self.tables = to_parameter(lookup.tables.reshape(-1, lookup.n_out))
        self.bias = None if lookup.bias is None else to_parameter(lookup.bias)

    @classmethod
    def of(
        cls,
        in_features: int,
        out_features: int,
        *,
        h: int,
        tau: int,
        family: str = "bh4",
        **parameters: Any,
    ) -> Self:
        """Return a layer whose codes are of unit variance and whose output is a dense layer's."""
        projection = FAMILIES[family].template(in_features, h * tau, **parameters)
        tables = zeros(h, 1 << tau, out_features)
        layer = cls(Lookup(projection, tables, zeros(h * tau), zeros(out_features)))
        layer.initialise()
        return layer

    def initialise(self) -> None:
        """Draw projection and tables; biases start at 0."""
        initialise(self.projection, 1.0)
        normal = np.random.default_rng(0).normal(size=(SAMPLE, self.tau))
        scores = hash_codes(normal, self.tau, flips=self.flips, scaled=self.scaled)[1]
        bound = math.sqrt(3 * DENSE_GAIN / (self.h * float((scores**2).sum(-1).mean())))
        with torch.no_grad():
            self.tables.uniform_(-bound, bound)
            for bias in (self.projection.bias, self.bias):
                if bias is not None:
                    bias.zero_()

    def lookup(self) -> Lookup:
        """Return the layer in numpy, with the parameters' very bits."""
        biases = (None if b is None else to_array(b) for b in (self.projection.bias, self.bias))
        projection_bias, bias = biases
        tables = to_array(self.tables).reshape(self.h, 1 << self.tau, self.out_features)
        operator = self.projection.operator()
        return Lookup(operator, tables, projection_bias, bias, self.flips, self.scaled)

    def forward(self, x: Tensor) -> Tensor:
        """Return (..., n_out) of x (..., n_in)."""
        z = self.projection(x.reshape(-1, self.in_features)).reshape(-1, self.h, self.tau)
        codes, scores = self._hash(z)
        first = torch.arange(self.h, device=x.device)[:, None] << self.tau
        rows = (codes + first).flatten(1)
        y = F.embedding_bag(rows, self.tables, per_sample_weights=scores.flatten(1), mode="sum")
        y = y if self.bias is None else y + self.bias
        return y.reshape(*x.shape[:-1], self.out_features)

    def _hash(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """Return codes and scores (rows, h, entries) of z (rows, h, tau)."""
        place = 1 << torch.arange(self.tau - 1, -1, -1, device=z.device)
        code, size = ((z > 0) * place).sum(-1), z.abs()
        decay = torch.exp(-2 * size)
        total, weight = size.sum(-1), 1 / (1 + decay).prod(-1)
        codes, scores = [], []
        for bits in flipped(self.tau, self.flips):
            at = list(bits)
            taken = total - 2 * size[..., at].sum(-1) if self.scaled else 1
            scores.append(taken * weight * decay[..., at].prod(-1))
            codes.append(code ^ int(place[at].sum()))
        return torch.stack(codes, -1), torch.stack(scores, -1)
