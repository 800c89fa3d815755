"""Queries, keys and values of one input are computed by one layer."""

from __future__ import annotations

import numpy as np
import pytest

from tests import models
from tests.relax_modules import R, check_compiled, const, module, nodes, transform
from tvmstruct.layers import Attention, Layer, LayerTable
from tvmstruct.passes.canonicalize_dense import CanonicalizeDense
from tvmstruct.passes.fuse_attention import FuseAttention
from tvmstruct.passes.fuse_epilogue import FuseEpilogue
from tvmstruct.passes.merge_shared_input import MergeSharedInput
from tvmstruct.passes.simplify_layout import SimplifyLayout

B, L, F, H = 2, 5, 24, 3
SHAPE = (B, L, F)


def project(emit, x, seed, *, bias=True, activation=None, heads=H, batch=B, length=L):
    w = models.weight(int(x.ty.shape[-1]), F, seed=seed)
    y = emit(R.matmul(x, const(w)))
    y = emit(R.add(y, const(models.weight(F, seed=seed + 9)))) if bias else y
    y = emit(activation(y)) if activation else y
    return emit(R.reshape(y, (batch, length, heads, F // heads)))


def attend(emit, q, k, v, out=(B, L, F)):
    q, v = (emit(R.permute_dims(t, [0, 2, 1, 3])) for t in (q, v))
    scores = emit(R.matmul(q, emit(R.permute_dims(k, [0, 2, 3, 1]))))
    mixed = emit(R.matmul(emit(R.nn.softmax(scores)), v))
    return R.reshape(emit(R.permute_dims(mixed, [0, 2, 1, 3])), out)


def merge(mod):
    table = LayerTable()
    rules = [CanonicalizeDense(table, {}), *[FuseEpilogue(table) for _ in range(4)]]
    rules += [FuseAttention(table), SimplifyLayout(), SimplifyLayout(), MergeSharedInput(table)]
    mod, _ = transform(mod, *rules)
    found = nodes(mod, table)
    (attention,) = [n for n in found if isinstance(n, Attention)]
    return [n for n in found if isinstance(n, Layer)], attention


@pytest.mark.parametrize("biases", [(True,) * 3, (False,) * 3, (True, False, True)], ids=str)
def test_three_projections_become_one(biases):
    def body(emit, x):
        return attend(emit, *(project(emit, x, s, bias=b) for s, b in enumerate(biases)))

    mod = module(body, SHAPE)
    (layer,), attention = merge(mod)
    assert layer.op.w.shape == (F, 3 * F)
    assert (layer.bias is not None) == any(biases)
    layouts = (attention.q_layout, attention.k_layout, attention.v_layout)
    assert layouts == ((3 * F, 0), (3 * F, F), (3 * F, 2 * F))
    check_compiled(mod)


def test_cross_attention_merges_keys_and_values():
    def body(emit, x, y):
        return attend(emit, project(emit, x, 0), project(emit, y, 1), project(emit, y, 2))

    mod = module(body, SHAPE, SHAPE)
    layers, attention = merge(mod)
    assert sorted(n.op.n_out for n in layers) == [F, 2 * F]
    assert attention.q_layout == (F, 0)
    assert (attention.k_layout, attention.v_layout) == ((2 * F, 0), (2 * F, F))
    check_compiled(mod)


def keys_used_twice(emit, x):
    k = project(emit, x, 1)
    return attend(emit, project(emit, x, 0), k, project(emit, x, 2)), R.negative(k)


APART = {
    "different inputs": (
        lambda e, x, y, z: attend(e, project(e, x, 0), project(e, y, 1), project(e, z, 2)),
        (SHAPE, SHAPE, SHAPE),
        3,
    ),
    "an activation": (
        lambda e, x: attend(
            e, project(e, x, 0, activation=R.nn.relu), project(e, x, 1), project(e, x, 2)
        ),
        (SHAPE,),
        2,
    ),
    "keys that are read elsewhere": (keys_used_twice, (SHAPE,), 2),
    "no layers": (
        lambda e, q, k, v: attend(e, q, k, v),
        ((B, L, H, F // H),) * 3,
        0,
    ),
}


@pytest.mark.parametrize("case", APART)
def test_what_stays_apart(case):
    body, shapes, layers = APART[case]
    mod = module(body, *shapes)
    assert len(merge(mod)[0]) == layers
    check_compiled(mod)


def test_projections_of_one_input_in_different_shapes_stay_apart():
    """Two keys of half the width per row: the same origin, but not the same rows."""

    def body(emit, x):
        halves = emit(R.reshape(x, (B, 2 * L, F // 2)))
        k = project(emit, halves, 1, length=2 * L)
        return attend(emit, project(emit, x, 0), k, project(emit, halves, 2, length=2 * L))

    mod = module(body, SHAPE)
    layers, _ = merge(mod)
    assert sorted(n.op.n_in for n in layers) == [F // 2, F]
    check_compiled(mod)


def test_a_recovered_projection_stays_out_of_the_merge():
    low = models.weight(48, 3, seed=1) @ models.weight(3, 48, seed=2)

    def body(emit, x):
        rows = [low, models.weight(48, 48, seed=3), models.weight(48, 48, seed=4)]
        q, k, v = (emit(R.reshape(emit(R.matmul(x, const(w))), (B, L, 3, 16))) for w in rows)
        return attend(emit, q, k, v, out=(B, L, 48))

    model = check_compiled(module(body, (B, L, 48)))
    forms = {r.name: r.form for r in model.report().layers if "const" in r.name}
    assert sorted(forms.values()) == ["dense", "dense", "low_rank"]
    assert np.unique(list(forms)).size == 3
