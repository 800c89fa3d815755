"""Random layouts, masks and shared heads: attention is found in each, with numpy's numbers."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pytest

import tvmstruct
from tests.relax_modules import R, const, module, random_inputs
from tvmstruct.testing import tolerance


@dataclass(frozen=True)
class Case:
    """Sizes, the order in which each tensor is stored, and how the graph is spelled."""

    sizes: dict[str, int]
    orders: list[list[int]]  # of queries, keys and values
    mask: list[int] | None
    merged: bool  # batch and heads in one axis
    scaled: bool  # on the queries
    flat: bool  # softmax over rows
    tiled: bool  # heads are shared round after round

    @property
    def shapes(self) -> list[list[int]]:
        """Return the shapes of queries, keys, values and mask as stored."""
        axes = ("bhqd", "bgdk", "bgkv")
        full = [[self.sizes[c] for c in letters] for letters in axes]
        stored = [[f[i] for i in order] for f, order in zip(full, self.orders, strict=True)]
        return [*stored, self.mask or [1]]

    @property
    def back(self) -> list[list[int]]:
        """Return the transposes from the stored order."""
        return [[order.index(i) for i in range(4)] for order in self.orders]


def draw(seed: int) -> Case:
    rng = np.random.default_rng(seed)
    sizes = dict(zip("bhqkdv", rng.choice([1, 2, 3, 4], 6).tolist(), strict=True))
    sizes["g"] = int(rng.choice([n for n in (1, 2, 3, 4) if sizes["h"] % n == 0]))
    mask = [sizes[c] if rng.random() < 0.5 else 1 for c in "bhqk"]
    return Case(
        sizes, [rng.permutation(4).tolist() for _ in range(3)],
        mask if rng.random() < 0.7 else None,
        *(bool(rng.random() < 0.5) for _ in range(4)),
    )  # fmt: skip


def graph(case: Case):
    b, h, q, k, d, _, g = case.sizes.values()

    def repeat(emit, x):
        if g == h:
            return x
        return emit(R.tile(x, [1, h // g, 1, 1]) if case.tiled else R.repeat(x, h // g, 1))

    def body(emit, *stored):
        x, y, z = (
            emit(R.permute_dims(t, order)) for t, order in zip(stored[:3], case.back, strict=True)
        )
        y, z = repeat(emit, y), repeat(emit, z)
        x = emit(R.multiply(x, const(0.5))) if case.scaled else x
        if case.merged:
            x, y = emit(R.reshape(x, (b * h, q, d))), emit(R.reshape(y, (b * h, d, k)))
        scores = emit(R.reshape(emit(R.matmul(x, y)), (b, h, q, k)))
        scores = scores if case.mask is None else emit(R.add(scores, stored[3]))
        if not case.flat:
            return R.matmul(emit(R.nn.softmax(scores)), z)
        p = emit(R.nn.softmax(emit(R.reshape(scores, (b * h * q, k)))))
        return R.matmul(emit(R.reshape(p, (b, h, q, k))), z)

    return module(body, *case.shapes)


def reference(case: Case, inputs: list[np.ndarray]) -> np.ndarray:
    x, y, z = (
        a.astype(np.float64).transpose(o) for a, o in zip(inputs[:3], case.back, strict=True)
    )
    times = case.sizes["h"] // case.sizes["g"]
    y, z = (np.tile(a, (1, times, 1, 1)) if case.tiled else a.repeat(times, 1) for a in (y, z))
    scores = (0.5 if case.scaled else 1.0) * x @ y
    scores = scores if case.mask is None else scores + inputs[3]
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    return weights / weights.sum(-1, keepdims=True) @ z


@pytest.mark.parametrize(
    "seed", [*range(4), *(pytest.param(s, marks=pytest.mark.slow) for s in range(4, 200))]
)
def test_random_layouts(seed):
    case = draw(seed)
    mod = graph(case)
    inputs = random_inputs(mod)
    model = tvmstruct.compile(mod)
    assert [record.form for record in model.report().layers] == ["attention"]
    np.testing.assert_allclose(model(*inputs), reference(case, inputs), **tolerance("float32", 16))
