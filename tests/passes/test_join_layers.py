"""Small layers in a row become one kernel, those that something else reads too stay apart."""

from __future__ import annotations

import numpy as np
import pytest

import tvmstruct
from tests import models
from tests.relax_modules import R, check_compiled, const, dense, module, nodes, transform
from tvmstruct import families
from tvmstruct.layers import Layer, LayerSequence
from tvmstruct.passes.join_layers import MOST, JoinLayers
from tvmstruct.passes.simplify_layout import SimplifyLayout
from tvmstruct.schedules.x86 import X86Kernels
from tvmstruct.targets import ISAS

N = 24


class Joining(X86Kernels):
    """Kernels that join dense layers too, which the passes before would have made structured."""

    def joins(self, op, precision: str, rows: int) -> bool:
        """Join all."""
        return True


def weight(k: int, n: int, seed: int) -> np.ndarray:
    """Return a weight that is an LGP-shuffle, as compile finds out."""
    rng = models.rng(seed)
    return families.lgp_shuffle(rng.normal(size=(4, k // 4, n // 4)) / np.sqrt(k)).to_dense()


def layer(emit, x, seed: int, n: int = N, *, bias: bool = True):
    y = emit(R.matmul(x, const(weight(int(x.ty.shape[-1]), n, seed))))
    return emit(R.nn.relu(emit(R.add(y, const(models.weight(n, seed=seed + 50)))))) if bias else y


def join(mod) -> list:
    mod, table, _ = dense(mod)
    mod, _ = transform(mod, SimplifyLayout(), JoinLayers(table, Joining(ISAS[0], threads=2)))
    return nodes(mod, table)


def stack(emit, x, count: int, n: int = N):
    for seed in range(count):
        x = layer(emit, x, seed, n)
    return x


def test_layers_in_a_row():
    mod = module(lambda emit, x: stack(emit, x, 3, 16), (1, N))
    (node,) = join(mod)
    assert isinstance(node, LayerSequence)
    assert node.reads == ((0,), (1,), (2,))
    report = check_compiled(mod).report()
    (record,) = (r for r in report.layers if r.form == "sequence")
    assert (record.shape, record.macs) == ((N, 16), (N * 16 + 2 * 16 * 16) // 4)
    assert record.reason.startswith("3 layers in one kernel")
    assert sum(r.form == "lgp_shuffle" for r in report.layers) == 3


@pytest.mark.parametrize("rows", [1, 3, 16])
def test_structured_layers_with_a_few_rows(rows):
    op = families.lgp_shuffle(models.rng(1).normal(size=(3, 8, 8)))

    def body(emit, x):
        for _ in range(3):
            x = emit(R.nn.relu(emit(R.matmul(x, const(op.to_dense())))))
        return x

    report = check_compiled(module(body, (rows, N))).report()
    assert [(r.form, r.reason[:8]) for r in report.layers if r.form == "sequence"] == [
        ("sequence", "3 layers")
    ]


def test_dense_layers_stay_apart():
    def body(emit, x):
        for seed in range(3):
            x = emit(R.matmul(x, const(models.weight(N, N, seed=seed))))
        return x

    report = check_compiled(module(body, (1, N))).report()
    assert [r.form for r in report.layers] == ["dense"] * 3


def test_long_stacks_are_cut():
    mod = module(lambda emit, x: stack(emit, x, MOST + 3), (1, N))
    assert sorted(len(node.members) for node in join(mod)) == [3, MOST]
    check_compiled(mod)


def test_residuals_and_normalisation_are_read_inside():
    def body(emit, x):
        gamma, beta = const(models.weight(N, seed=7)), const(models.weight(N, seed=8))
        first = layer(emit, x, 0)
        y = emit(R.add(layer(emit, layer(emit, first, 1, 32), 2, bias=False), first))
        y = emit(R.nn.layer_norm(y, gamma, beta, axes=[-1], epsilon=1e-5))
        return emit(R.add(layer(emit, y, 3, bias=False), x))

    mod = module(body, (1, N))
    check_compiled(mod)
    report = tvmstruct.compile(mod).report()
    (record,) = (r for r in report.layers if r.form == "sequence")
    assert record.reason.startswith("4 layers")


def test_what_is_read_elsewhere_is_a_result():
    def body(emit, x):
        middle = layer(emit, layer(emit, x, 0), 1)
        return layer(emit, layer(emit, middle, 2), 3), middle

    mod = module(body, (1, N))
    assert [len(node.members) for node in join(mod)] == [2, 2]
    check_compiled(mod)


def test_branches_are_joined():
    def body(emit, x, z):
        return emit(R.add(layer(emit, x, 0), layer(emit, z, 1, bias=False)))

    mod = module(body, (1, N), (1, 2 * N))
    (node,) = join(mod)
    assert [len(reads) for reads in node.reads] in ([1, 2], [2, 1])
    check_compiled(mod)


def test_a_layer_alone_stays():
    (node,) = join(module(lambda emit, x: layer(emit, x, 0), (1, N)))
    assert isinstance(node, Layer)


def test_saved_and_loaded(tmp_path):
    mod = module(lambda emit, x: stack(emit, x, 3), (1, N))
    model = tvmstruct.compile(mod)
    x = models.rng(3).normal(size=(1, N)).astype(np.float32)
    want = model(x)
    model.save(tmp_path / "model.tvms")
    np.testing.assert_array_equal(tvmstruct.load(tmp_path / "model.tvms")(x), want)
