"""Attention in the spellings of exporters becomes one kernel; everything else says why not."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
from tvm import relax

from tests import models
from tests.relax_modules import (
    R,
    check_compiled,
    const,
    module,
    nodes,
    random_inputs,
    structure_and_numbers,
    transform,
)
from tvmstruct.layers import Attention, Layer, LayerTable
from tvmstruct.passes.canonicalize_dense import CanonicalizeDense
from tvmstruct.passes.fuse_attention import FuseAttention
from tvmstruct.passes.simplify_layout import SimplifyLayout

B, H, Q, K, D, V = 2, 3, 5, 7, 4, 6
QUERY, KEY, VALUE = (B, H, Q, D), (B, H, D, K), (B, H, K, V)
SCALE = 1 / math.sqrt(D)
LOWEST = float(np.finfo(np.float32).min)


def attend(emit, q, k, v, *, mask=None, after=None, axis=-1):
    scores = emit(R.matmul(q, k))
    for step in (after, mask):
        scores = scores if step is None else emit(step(emit, scores))
    return R.matmul(emit(R.nn.softmax(scores, axis=axis)), v)


def scaled(emit, scores):
    return R.multiply(scores, const(SCALE))


def fuse(mod):
    table = LayerTable()
    mod, log = transform(mod, FuseAttention(table), SimplifyLayout(), SimplifyLayout())
    return nodes(mod, table), log


def check_fused(mod, inputs=None, *, numbers=True, **expected):
    (node,), log = fuse(mod)
    assert not log.rejected
    assert isinstance(node, Attention)
    assert (node.heads, node.head_dim, node.value_dim) == (H, D, V)
    assert (node.query_length, node.key_length) == (Q, K)
    for name, value in expected.items():
        assert getattr(node, name) == pytest.approx(value), name
    if numbers:
        check_compiled(mod, inputs)


SCALES = {
    "none": (lambda emit, q, k, v: attend(emit, q, k, v), 1.0),
    "multiply": (lambda emit, q, k, v: attend(emit, q, k, v, after=scaled), SCALE),
    "from the left": (
        lambda emit, q, k, v: attend(
            emit, q, k, v, after=lambda emit, s: R.multiply(const(SCALE), s)
        ),
        SCALE,
    ),
    "divide": (
        lambda emit, q, k, v: attend(
            emit, q, k, v, after=lambda emit, s: R.divide(s, const([[math.sqrt(D)]]))
        ),
        SCALE,
    ),
    "twice": (
        lambda emit, q, k, v: attend(
            emit, q, k, v, after=lambda e, s: R.divide(e(R.multiply(s, const(3.0))), const(6.0))
        ),
        0.5,
    ),
    "on q": (lambda emit, q, k, v: attend(emit, emit(R.multiply(q, const(SCALE))), k, v), SCALE),
    "on q and k": (
        lambda emit, q, k, v: attend(
            emit, emit(R.multiply(q, const(0.7))), emit(R.multiply(k, const(0.7))), v
        ),
        0.49,
    ),
}


@structure_and_numbers
@pytest.mark.parametrize("place", SCALES)
def test_scales(place, numbers):
    body, scale = SCALES[place]
    check_fused(module(body, QUERY, KEY, VALUE), scale=scale, mask="none", numbers=numbers)


MASKS = {  # shape -> (kind, dimensions that vary)
    (B, 1, 1, K): ("keys", ("batch",)),
    (K,): ("full", ()),
    (1, 1, Q, K): ("full", ("queries",)),
    (Q, K): ("full", ("queries",)),
    (B, 1, Q, K): ("full", ("batch", "queries")),
    (1, H, Q, K): ("full", ("heads", "queries")),
    (H, 1, K): ("full", ("heads",)),
    (B, H, Q, K): ("full", ("batch", "heads", "queries")),
}


@structure_and_numbers
@pytest.mark.parametrize("shape", MASKS, ids=str)
def test_additive_masks(shape, numbers):
    def body(emit, q, k, v, m):
        return attend(emit, q, k, v, after=scaled, mask=lambda e, s: R.add(s, m))

    kind, dims = MASKS[shape]
    mod = module(body, QUERY, KEY, VALUE, shape)
    check_fused(mod, mask=kind, mask_dims=dims, scale=SCALE, numbers=numbers)


def test_a_mask_from_the_left_before_the_scale():
    def body(emit, q, k, v, m):
        scores = emit(R.add(m, emit(R.multiply(const(SCALE), emit(R.matmul(q, k))))))
        return R.matmul(emit(R.nn.softmax(scores, axis=3)), v)

    check_fused(module(body, QUERY, KEY, VALUE, (B, 1, 1, K)), mask="keys", scale=SCALE)


def select(low, *, flip, shape):
    def body(emit, q, k, v, m):
        keep = emit(R.greater(m, const(0.0)))
        hidden = const(low)

        def where(emit, s):
            return R.where(keep, hidden, s) if flip else R.where(keep, s, hidden)

        return attend(emit, q, k, v, after=scaled, mask=where)

    return module(body, QUERY, KEY, VALUE, shape)


@structure_and_numbers
@pytest.mark.parametrize("shape", [(B, 1, 1, K), (1, 1, Q, K), (B, H, Q, K)], ids=str)
@pytest.mark.parametrize("flip", [False, True])
@pytest.mark.parametrize("low", [LOWEST, -1e9, -math.inf])
def test_selecting_masks(low, flip, shape, numbers):
    mod = select(low, flip=flip, shape=shape)
    inputs = random_inputs(mod)
    inputs[3][..., 0] = -1.0 if flip else 1.0  # every query sees one key at least
    kind = "keys" if shape == (B, 1, 1, K) else "full"
    check_fused(mod, inputs, mask=kind, numbers=numbers)


@pytest.mark.parametrize("low", [LOWEST, -1e9, -1e8])
def test_a_row_that_selects_no_key_averages_all_of_them(low):
    """Selecting one number for all keys forgets the scores; adding it would keep large ones."""
    mod = select(low, flip=False, shape=(B, 1, 1, K))
    inputs = random_inputs(mod, scale=12.0)
    inputs[3][:] = np.abs(inputs[3]) + 1
    inputs[3][0] = -1.0
    found = check_compiled(mod, inputs)(*inputs)
    mean = np.broadcast_to(inputs[2][0].mean(axis=1, keepdims=True), found[0].shape)
    np.testing.assert_allclose(found[0], mean, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("low", [-1e4, LOWEST])
def test_an_additive_row_that_hides_every_key_keeps_the_arithmetic_of_the_graph(low):
    def body(emit, q, k, v, m):
        return attend(emit, q, k, v, after=scaled, mask=lambda e, s: R.add(s, m))

    mod = module(body, QUERY, KEY, VALUE, (B, 1, 1, K))
    inputs = random_inputs(mod)
    inputs[3] = np.float32([[0] * 4 + [low] * 3, [low] * 7])[:, None, None]
    check_compiled(mod, inputs, rtol=1e-2, atol=1e-3)  # 1e4 + score keeps three digits of a score


def refusal(body, *shapes, dtype="float32", **bound):
    mod = module(body, *shapes, dtype=dtype)
    found, log = fuse(mod)
    assert not found
    ((rule, where, why),) = log.rejected
    assert (rule, where.split(".")[0]) == ("fuse_attention", "attention")
    model = check_compiled(mod, **bound)
    assert why in [record.reason for record in model.report().layers]
    return why


def test_another_axis_is_refused():
    why = refusal(lambda e, q, k, v: attend(e, q, k, v, axis=2), QUERY, KEY, VALUE)
    assert "softmax runs over axis 2 of (2, 3, 5, 7), not over the keys" in why


def test_float64_is_refused():
    why = refusal(lambda e, q, k, v: attend(e, q, k, v), QUERY, KEY, VALUE, dtype="float64")
    assert "computes in float64, want float32" in why


def test_probabilities_that_are_an_output_are_refused():
    def body(emit, q, k, v):
        p = emit(R.nn.softmax(emit(R.matmul(q, k))))
        return R.matmul(p, v), p

    assert "the probabilities are read elsewhere too" in refusal(body, QUERY, KEY, VALUE)


def test_scores_that_are_an_output_are_refused():
    def body(emit, q, k, v):
        s = emit(R.multiply(emit(R.matmul(q, k)), const(2.0)))
        return R.matmul(emit(R.nn.softmax(s)), v), s

    assert "the scores are read elsewhere too" in refusal(body, QUERY, KEY, VALUE)


@structure_and_numbers
def test_key_heads_may_be_shared(numbers):
    mod = module(lambda e, q, k, v: attend(e, q, k, v), QUERY, (B, 1, D, K), (B, 1, K, V))
    check_fused(mod, kv_heads=1, k_layout=(D, 0), v_layout=(V, 0), numbers=numbers)


@structure_and_numbers
def test_keys_may_be_shared_and_values_not(numbers):
    mod = module(lambda e, q, k, v: attend(e, q, k, v), QUERY, (B, 1, D, K), VALUE)
    check_fused(mod, kv_heads=0, numbers=numbers)


@structure_and_numbers
def test_an_added_mask_may_be_scaled(numbers):
    def body(emit, q, k, v, m):
        return attend(
            emit, q, k, v, after=lambda e, s: R.add(s, m), mask=lambda e, s: R.multiply(s, const(2))
        )

    check_fused(
        module(body, QUERY, KEY, VALUE, (B, 1, 1, K)), scale=2.0, mask="keys", numbers=numbers
    )


@pytest.mark.parametrize("low", [LOWEST, -1e9])
def test_replaced_scores_that_are_scaled_are_refused(low):
    def body(emit, q, k, v, m):
        keep = emit(R.greater(m, const(0.0)))
        return attend(
            emit, q, k, v,
            after=lambda e, s: R.where(keep, s, const(low)),
            mask=lambda e, s: R.multiply(s, const(0.5)),
        )  # fmt: skip

    why = refusal(body, QUERY, KEY, VALUE, (B, 1, 1, K))
    assert "scores are scaled by 0.5 after hidden ones were replaced" in why


def two_selects(emit, scores, m, n, *, lows):
    for mask, low in zip((m, n), lows, strict=True):
        scores = emit(R.where(emit(R.greater(mask, const(0.0))), scores, const(low)))
    return scores


def test_scores_that_are_replaced_by_two_numbers_are_refused():
    def body(emit, q, k, v, m, n):
        return attend(emit, q, k, v, mask=lambda e, s: two_selects(e, s, m, n, lows=(-1e9, -2e9)))

    why = refusal(body, QUERY, KEY, VALUE, (B, 1, 1, K), (B, 1, 1, K))
    assert "keys are hidden by -" in why
    assert "e+09 and by another mask" in why


@structure_and_numbers
@pytest.mark.parametrize("lows", [(LOWEST, LOWEST), (-1e9, -1e9), (LOWEST, -math.inf)], ids=str)
def test_two_selecting_masks(lows, numbers):
    def body(emit, q, k, v, m, n):
        return attend(emit, q, k, v, mask=lambda e, s: two_selects(e, s, m, n, lows=lows))

    mod = module(body, QUERY, KEY, VALUE, (B, 1, 1, K), (1, 1, Q, K))
    inputs = random_inputs(mod)
    inputs[4][..., 0] = 1.0
    if not math.isinf(lows[1]):
        inputs[3][0], inputs[4][..., 2, 1:] = -1.0, -1.0  # rows without a key
    check_fused(mod, inputs, mask="full", mask_dims=("batch", "queries"), numbers=numbers)


def test_an_unknown_step_is_named():
    why = refusal(
        lambda e, q, k, v: attend(e, q, k, v, after=lambda e, s: R.tanh(s)), QUERY, KEY, VALUE
    )
    assert "relax.tanh stands between the product and the softmax" in why


@structure_and_numbers
def test_two_added_masks(numbers):
    def body(emit, q, k, v, m, n):
        return attend(emit, q, k, v, after=lambda e, s: R.add(s, m), mask=lambda e, s: R.add(s, n))

    mod = module(body, QUERY, KEY, VALUE, (B, 1, 1, K), (1, 1, Q, K))
    check_fused(mod, mask="full", mask_dims=("batch", "queries"), numbers=numbers)


@structure_and_numbers
def test_a_mask_that_is_the_same_for_all_keys(numbers):
    def body(emit, q, k, v, m):
        return attend(emit, q, k, v, mask=lambda e, s: R.add(s, m))

    mod = module(body, QUERY, KEY, VALUE, (B, 1, Q, 1))
    check_fused(mod, mask="full", mask_dims=("batch", "queries"), numbers=numbers)


def test_a_mask_that_widens_the_scores_is_refused():
    why = refusal(
        lambda e, q, k, v, m: attend(e, q, k, v, mask=lambda e, s: R.add(s, m)),
        (B, H, 1, D), KEY, VALUE, (B, 1, Q, K),
    )  # fmt: skip
    assert "does not broadcast to" in why


def test_a_select_that_does_not_hide_is_refused():
    def body(emit, q, k, v, m):
        keep = emit(R.greater(m, const(0.0)))
        return attend(emit, q, k, v, mask=lambda e, s: R.where(keep, s, const(-5.0)))

    why = refusal(body, QUERY, KEY, VALUE, (B, 1, 1, K))
    assert "scores are replaced by -5, which hides no key (want <= -1e+08)" in why


def guard(emit, scores, p, *, low=-math.inf, axis=-1):
    """not any(score != low), as PyTorch's SDPA."""
    seen = emit(R.logical_not(emit(R.equal(scores, const(low)))))
    top = emit(R.max(emit(R.astype(seen, "int8")), [axis], keepdims=True))
    empty = emit(R.logical_not(emit(R.astype(top, "bool"))))
    return emit(R.where(empty, emit(R.full_like(p, const(0.0))), p))


@pytest.mark.parametrize(
    ("changes", "fused"), [({}, True), ({"low": -1e9}, False), ({"axis": 2}, False)], ids=str
)
def test_a_guard_of_empty_rows_is_peeled_only_as_such(changes, fused):
    def body(emit, q, k, v, m):
        scores = emit(R.add(emit(R.matmul(q, k)), m))
        return R.matmul(guard(emit, scores, emit(R.nn.softmax(scores)), **changes), v)

    if fused:
        check_fused(module(body, QUERY, KEY, VALUE, (B, 1, 1, K)))
    else:
        why = refusal(body, QUERY, KEY, VALUE, (B, 1, 1, K))
        assert "relax.where stands between the softmax and the values" in why


def test_a_guard_of_nan_is_peeled():
    def body(emit, q, k, v):
        p = emit(R.nn.softmax(emit(R.matmul(q, k))))
        return R.matmul(emit(R.where(emit(R.isnan(p)), const(0.0), p)), v)

    check_fused(module(body, QUERY, KEY, VALUE))


def test_an_operator_between_softmax_and_values_is_named():
    def body(emit, q, k, v, m):
        p = emit(R.nn.softmax(emit(R.matmul(q, k))))
        return R.matmul(emit(R.multiply(p, m)), v)

    why = refusal(body, QUERY, KEY, VALUE, (B, H, Q, K))
    assert "relax.multiply stands between the softmax and the values" in why


def test_a_cast_is_refused():
    def body(emit, q, k, v):
        p = emit(R.nn.softmax(emit(R.astype(emit(R.matmul(q, k)), "float64"))))
        return R.matmul(emit(R.astype(p, "float32")), v)

    why = refusal(body, QUERY, KEY, VALUE)
    assert "the scores are cast from float64 to float32, want float32 only" in why


def test_values_summed_over_queries_are_refused():
    def body(emit, q, k, v):
        p = emit(R.nn.softmax(emit(R.matmul(q, k))))
        return R.matmul(emit(R.permute_dims(p, [0, 1, 3, 2])), v)

    why = refusal(body, QUERY, KEY, (B, H, Q, V))
    assert f"values are summed over an axis of {Q}, not over the {K} keys" in why


def test_values_with_a_batch_of_their_own_are_refused():
    why = refusal(lambda e, q, k, v: attend(e, q, k, v), (Q, D), (D, K), (B, K, V))
    assert "values have a batch that queries and keys do not have" in why


def values_of_parts_of_queries(emit, q, k, v):
    """Batches of queries, cut into parts that have values of their own."""
    p = emit(R.nn.softmax(emit(R.matmul(q, k))))
    wide = emit(R.reshape(emit(R.permute_dims(v, [1, 0, 2, 3])), (6, K, V)))
    return R.matmul(emit(R.reshape(p, (6, 2, K))), wide)


def test_parts_of_queries_may_have_values_of_their_own():
    mod = module(values_of_parts_of_queries, (3, 4, D), (3, D, K), (2, 3, K, V))
    (node,), log = fuse(mod)
    assert isinstance(node, Attention)
    assert (node.heads, node.query_length, node.key_length) == (1, 2, K)
    assert not log.rejected
    check_compiled(mod)


def test_probabilities_that_do_not_nest_with_values_are_refused():
    why = refusal(values_of_parts_of_queries, (2, 6, D), (2, D, K), (2, 3, K, V))
    assert (
        "probabilities (6, 2, 7) and values (6, 7, 6) are stored in loops that do not nest" in why
    )


def test_queries_that_do_not_nest_with_keys_are_refused():
    def body(emit, q, k, v):
        q = emit(R.reshape(emit(R.permute_dims(q, [1, 0, 2, 3])), (6, Q, D)))
        k = emit(R.reshape(emit(R.permute_dims(k, [1, 0, 2, 3])), (6, D, K)))
        return attend(emit, q, k, v)

    why = refusal(body, (2, 3, Q, D), (3, 2, D, K), (6, K, V))
    assert "queries (6, 5, 4) and keys (6, 4, 7) are stored in loops that do not nest" in why


def test_a_mask_that_does_not_nest_with_the_scores_is_refused():
    def body(emit, q, k, v, m):
        q = emit(R.reshape(emit(R.permute_dims(q, [1, 0, 2, 3])), (6, Q, D)))
        turned = emit(R.reshape(emit(R.permute_dims(m, [1, 0, 2, 3])), (6, Q, K)))
        return attend(emit, q, k, v, mask=lambda e, s: R.add(s, turned))

    why = refusal(body, (3, 2, Q, D), (6, D, K), (6, K, V), (2, 3, Q, K))
    assert "mask of shape (6, 5, 7) splits the axes of (6, 5, 7) in another way" in why


def test_scores_that_are_repeated_are_refused():
    def body(emit, q, k, v):
        scores = emit(R.broadcast_to(emit(R.matmul(q, k)), (B, H, Q, K)))
        return R.matmul(emit(R.nn.softmax(scores)), v)

    why = refusal(body, (1, 1, Q, D), (1, 1, D, K), VALUE)
    assert "relax.broadcast_to of scores (1, 1, 5, 7) is no other order of the same scores" in why


def test_vectors_are_refused():
    why = refusal(lambda e, q, k, v: attend(e, q, k, v), (D,), (D, K), (K, V))
    assert "shapes q (4,), k^T (4, 7), v (7, 6): want static matrices" in why


def learned(emit, q):
    scores = emit(R.matmul(q, const(models.weight(D, 17, seed=1))))
    return R.matmul(emit(R.nn.softmax(scores)), const(models.weight(17, V, seed=2)))


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"precision": "int8"}, "which became Dense int8, want Dense f32"),
        ({"bias": np.ones(17, np.float32)}, "whose layer does more than multiply"),
    ],
    ids=["form", "epilogue"],
)
def test_weights_that_are_no_plain_keys_are_refused(change, why):
    table = LayerTable()
    mod, _ = transform(module(learned, (3, D)), CanonicalizeDense(table, {}), SimplifyLayout())
    table.nodes[0] = replace(table.nodes[0], **change)
    mod, log = transform(mod, FuseAttention(table))
    assert [type(n) for n in nodes(mod, table)] == [Layer, Layer]
    ((_, _, found),) = log.rejected
    assert f"keys or values are the weight {table.nodes[0].names[0]}, {why}" == found


def test_an_embedding_behind_a_softmax_is_none_of_its_business():
    def body(emit, x):
        return R.matmul(emit(R.nn.softmax(emit(R.tanh(x)))), const(models.weight(K, V)))

    table = LayerTable()
    mod, log = transform(
        module(body, (B, K)), CanonicalizeDense(table, {}), SimplifyLayout(), FuseAttention(table)
    )
    assert [type(n) for n in nodes(mod, table)] == [Layer]
    assert not log.rejected


def test_a_product_without_softmax_is_none_of_its_business():
    found, log = fuse(module(lambda emit, q, k: R.matmul(q, k), QUERY, KEY))
    assert not found
    assert not log.rejected


def test_the_mask_may_be_a_constant():
    causal = np.triu(np.full((Q, Q), -1e4, np.float32), 1)

    def body(emit, q, k, v):
        return attend(emit, q, k, v, mask=lambda e, s: R.add(s, relax.const(causal)))

    check_compiled(module(body, QUERY, (B, H, D, Q), (B, H, Q, V)))


CONSTANTS = {  # a mask of (queries, keys) or (keys,): whether it is causal, and what remains
    "hidden keys": (np.where(np.arange(K) < 4, 0, -np.inf), False, "full"),
    "the first key": (np.where(np.arange(K) < 1, 0, -1e9), False, "full"),
    "zeros": (np.zeros((Q, K)), False, "none"),
    "infinity": (np.triu(np.full((Q, K), -np.inf), 1), True, "none"),
    "a large number": (np.triu(np.full((Q, K), -1e9), 1), True, "none"),
    "a small number": (np.triu(np.full((Q, K), -1e6), 1), False, "full"),
    "a hole": (np.triu(np.full((Q, K), -1e9), 1) * (np.arange(K) != 6), False, "full"),
    "a bias below": (np.where(np.tri(Q, K), 0.5, -np.inf), True, "full"),
    "low below": (np.where(np.tri(Q, K), -1e7, -1e9), False, "full"),
    "strictly below": (np.triu(np.full((Q, K), -np.inf)), False, "full"),
}


@pytest.mark.parametrize("case", CONSTANTS)
def test_constant_masks(case):
    mask, causal, kind = CONSTANTS[case]
    mod = module(
        lambda e, q, k, v: attend(e, q, k, v, mask=lambda e, s: R.add(s, const(mask))),
        QUERY, KEY, VALUE,
    )  # fmt: skip
    check_fused(mod, causal=causal, mask=kind, numbers=case not in ("strictly below", "low below"))


def test_onnx_encoder_has_one_attention():
    import tvmstruct

    source = tvmstruct.from_onnx(models.encoder_model())
    model = tvmstruct.compile(source, buckets="exact")
    assert "attention" in [record.form for record in model.report().layers]
