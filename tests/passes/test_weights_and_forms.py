"""recover_structure, apply_plan, split_feed_forward, fuse_layer_norm, emit and lift."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from tvm import relax

import tvmstruct
from tests import models
from tests.relax_modules import R, check_compiled, const, dense, module, nodes, operators, transform
from tvmstruct import compat, families, ops
from tvmstruct.errors import PlanError
from tvmstruct.layers import FeedForward, Form, LayerNorm, LayerTable
from tvmstruct.passes.apply_plan import ApplyPlan
from tvmstruct.passes.clip_gathers import ClipGathers
from tvmstruct.passes.emit_kernels import EmitKernels
from tvmstruct.passes.fuse_layer_norm import FuseLayerNorm
from tvmstruct.passes.lift_constants import LiftConstants, with_parameters
from tvmstruct.passes.recover_structure import RecoverStructure
from tvmstruct.passes.simplify_layout import SimplifyLayout
from tvmstruct.passes.split_feed_forward import SplitFeedForward
from tvmstruct.planning import LayerPlan, Plan
from tvmstruct.rewrite import Log, apply_rule
from tvmstruct.schedules.x86 import X86Kernels
from tvmstruct.targets import ISAS, resolve
from tvmstruct.testing import tolerance
from tvmstruct.weights import WeightStore

BLOCKS = families.lgp_shuffle(models.rng(1).normal(size=(4, 12, 16)).astype(np.float32))
STRUCTURED = BLOCKS.to_dense().astype(np.float32)  # 48 x 64
PLAIN = models.weight(48, 64, seed=2)


def linear(w):
    return module(lambda emit, x: R.matmul(x, const(w)), (5, 48))


def layer_name(table):
    return table.nodes[0].names[0]


# recover_structure


def recover(mod, stored=None):
    mod, table, _ = dense(mod)
    forms: dict[str, Form] = {}
    stored = {layer_name(table): stored} if stored else {}
    mod, log = transform(mod, RecoverStructure(table, forms, stored))
    return nodes(mod, table), forms, log


def test_structure_is_found_and_used():
    (layer,), forms, log = recover(linear(STRUCTURED))
    assert not isinstance(layer.op, ops.Dense)
    (form,) = forms.values()
    assert (form.form, form.parameters) == ("lgp_shuffle", {"g": 4})
    assert layer.op.params == 4 * 12 * 16
    assert not log.rejected
    check_compiled(linear(STRUCTURED))


def test_no_structure_says_what_was_tried():
    (layer,), forms, log = recover(linear(PLAIN))
    assert isinstance(layer.op, ops.Dense)
    ((_, name, why),) = log.rejected
    assert name == layer.names[0]
    assert "no exact structure found" in why
    assert "tried low rank, VVMA" in why
    assert next(iter(forms.values())).reason == why


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_structure_of_rounded_weights_is_reported_not_used(dtype):
    (layer,), _, log = recover(linear(STRUCTURED), dtype)
    assert isinstance(layer.op, ops.Dense)
    assert f"within the rounding of {dtype}; not replaced" in log.rejected[0][2]


def test_a_form_is_decided_once_for_all_buckets(monkeypatch):
    forms: dict[str, Form] = {}
    results = []
    for _ in range(2):
        mod, table, _ = dense(linear(STRUCTURED))
        mod, _ = transform(mod, RecoverStructure(table, forms, {}))
        results.append(nodes(mod, table)[0].op)
        monkeypatch.setattr("tvmstruct.passes.recover_structure.recover", None)
    assert results[0] is results[1]


def test_the_epilogue_survives_a_change_of_form():
    def body(emit, x, r):
        h = emit(R.add(emit(R.matmul(x, const(STRUCTURED))), const(np.arange(64))))
        return R.add(emit(R.nn.gelu(h)), r)

    model = check_compiled(module(body, (5, 48), (5, 64)))
    assert "lgp_shuffle" in [record.form for record in model.report().layers]


# apply_plan


def plan(mod, entry):
    mod, table, _ = dense(mod)
    forms: dict[str, Form] = {}
    rule = ApplyPlan(table, forms, Plan({layer_name(table): entry}))
    mod, _ = transform(mod, rule)
    return nodes(mod, table), forms


def test_a_planned_layer_takes_the_nearest_member():
    (layer,), forms = plan(linear(PLAIN), LayerPlan("low_rank", {"r": 5}))
    u, s, v = np.linalg.svd(PLAIN.astype(np.float64))
    nearest = (u[:, :5] * s[:5]) @ v[:5]
    np.testing.assert_allclose(layer.op.to_dense(), nearest, rtol=1e-4, atol=1e-5)
    (form,) = forms.values()
    assert form.reason == "planned"
    assert form.error == pytest.approx(
        np.linalg.norm(nearest - PLAIN) / np.linalg.norm(PLAIN), rel=1e-4
    )


def test_layers_that_the_plan_leaves_out_stay_dense():
    mod, table, _ = dense(linear(PLAIN))
    mod, log = transform(
        mod, ApplyPlan(table, {}, Plan({"other": LayerPlan("low_rank", {"r": 2})}))
    )
    assert isinstance(nodes(mod, table)[0].op, ops.Dense)
    assert not log.applied


def test_parameters_that_do_not_fit_are_a_plan_error_with_the_layer():
    with pytest.raises(PlanError, match=r"layer 'constant_.*lgp_shuffle: g=60"):
        plan(linear(PLAIN), LayerPlan("lgp_shuffle", {"g": 60}))


# split_feed_forward


class Pays:
    """A target for which splitting always pays."""

    def splits_feed_forward(self, sizes, rows):
        return True


PAYS = Pays()


def feed_forward(emit, x, *, between=lambda emit, h: R.nn.gelu(h)):
    h = emit(R.add(emit(R.matmul(x, const(PLAIN))), const(np.arange(64) / 64)))
    h = emit(between(emit, h))
    return R.matmul(h, const(models.weight(64, 48, seed=4)))


def split(body, *shapes, kernels=PAYS):
    mod, table, _ = dense(module(body, *shapes))
    mod, _ = transform(mod, SimplifyLayout(), SplitFeedForward(table, kernels))
    return nodes(mod, table)


def test_two_layers_in_a_row_become_one_call():
    (node,) = split(feed_forward, (5, 48))
    assert isinstance(node, FeedForward)
    assert (node.up.activation, node.down.activation) == ("gelu", "none")


def split_refusal(body, *shapes, change=None):
    """Return why two layers for which splitting pays stay apart, after a change of both."""
    mod, table, _ = dense(module(body, *shapes))
    if change is not None:
        table.nodes[:] = map(change, table.nodes)
    mod, log = transform(mod, SimplifyLayout(), SplitFeedForward(table, PAYS))
    assert len(nodes(mod, table)) == 2
    ((rule, where, why),) = log.rejected
    assert (rule, where) == ("split_feed_forward", f"feed_forward.{nodes(mod, table)[0].names[0]}")
    return why


def doubly_read(emit, x):
    h = emit(R.nn.relu(emit(R.matmul(x, const(PLAIN)))))
    return R.matmul(h, const(models.weight(64, 48, seed=4))), R.negative(h)


def test_hidden_features_that_are_an_output_are_not_split():
    assert split_refusal(doubly_read, (5, 48)) == "the hidden features are read elsewhere too"


def test_an_activation_after_the_second_layer_is_not_split():
    def body(emit, x):
        return R.nn.relu(emit(feed_forward(emit, x)))

    assert "relu follows constant_" in split_refusal(body, (5, 48))


def test_an_unknown_activation_is_named():
    def body(emit, x):
        return feed_forward(emit, x, between=lambda e, h: R.multiply(h, emit(R.tanh(h))))

    assert "relax.multiply stands between constant_" in split_refusal(body, (5, 48))


def test_a_residual_between_is_not_split():
    def body(emit, x, r):
        return feed_forward(emit, x, between=lambda e, h: R.add(r, e(R.nn.gelu(h))))

    assert "a residual or a normalisation follows" in split_refusal(body, (5, 48), (5, 64))


def test_layers_in_another_form_or_precision_are_not_split():
    why = split_refusal(feed_forward, (5, 48), change=lambda n: replace(n, precision="int8"))
    assert "is Dense int8, want Dense f32" in why

    def structured(layer):
        return replace(layer, op=BLOCKS) if layer.op.n_out == 64 else layer

    assert "is Product f32, want Dense f32" in split_refusal(
        feed_forward, (5, 48), change=structured
    )


def test_what_splitting_has_nothing_to_say_about():
    assert len(split(feed_forward, (5, 48), kernels=X86Kernels(ISAS[0]))) == 2  # too small

    def body(emit, x):  # two layers without an activation are no feed-forward block
        h = emit(R.matmul(x, const(PLAIN)))
        return R.matmul(h, const(models.weight(64, 48, seed=4))), R.negative(h)

    mod, table, _ = dense(module(body, (5, 48)))
    mod, log = transform(mod, SimplifyLayout(), SplitFeedForward(table, PAYS))
    assert len(nodes(mod, table)) == 2
    assert not log.rejected


def test_split_feed_forward_computes_the_same():
    w1, w2 = models.weight(64, 512, seed=1), models.weight(512, 64, seed=2)

    def body(emit, x):
        h = emit(R.add(emit(R.matmul(x, const(w1))), const(np.linspace(-1, 1, 512))))
        y = emit(R.matmul(emit(R.nn.gelu(h)), const(w2)))
        return R.add(emit(R.add(y, const(np.linspace(0, 1, 64)))), x)

    for rows in (512, 1029):  # whole blocks and a rest
        model = check_compiled(module(body, (rows, 64)))
        assert "feed-forward" in [record.form for record in model.report().layers]


# fuse_layer_norm


def layer_norm(axes=(-1,), dtype="float32", **options):
    def body(emit, x):
        shape = [int(x.ty.shape[a]) for a in axes]
        gamma = relax.const(np.linspace(0.5, 1.5, int(np.prod(shape))).reshape(shape), dtype)
        beta = relax.const(np.linspace(-1, 1, int(np.prod(shape))).reshape(shape), dtype)
        return R.nn.layer_norm(x, gamma, beta, list(axes), **options)

    return body


def norms(mod):
    table = LayerTable()
    mod, log = transform(mod, FuseLayerNorm(table))
    return nodes(mod, table), log


@pytest.mark.parametrize("shape", [(5, 24), (2, 5, 24), (24,)], ids=str)
@pytest.mark.parametrize("options", [{}, {"center": False}, {"scale": False}], ids=str)
def test_layer_norm_over_the_last_axis(shape, options):
    mod = module(layer_norm(epsilon=1e-3, **options), shape)
    (node,), _ = norms(mod)
    assert node == LayerNorm(24, pytest.approx(1e-3))
    # TVM's own lowering ignores center and scale, so the reference is their documentation.
    x = models.rng().normal(size=shape).astype(np.float32)
    want = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-3)
    want = want * (np.linspace(0.5, 1.5, 24) if options.get("scale", True) else 1.0)
    want = want + (np.linspace(-1, 1, 24) if options.get("center", True) else 0.0)
    np.testing.assert_allclose(tvmstruct.compile(mod)(x), want, **tolerance("float32", 24))


def after_dense(emit, x, residual, *, read_twice=False):
    y = emit(R.add(emit(R.matmul(x, const(PLAIN))), residual))
    gamma, beta = const(np.linspace(0.5, 1.5, 64)), const(np.linspace(-1, 1, 64))
    normed = R.nn.layer_norm(y, gamma, beta, [-1], epsilon=1e-3)
    return (normed, R.negative(y)) if read_twice else normed


def after_dense_nodes(body, *shapes):
    mod, table, _ = dense(module(body, *shapes))
    mod, _ = transform(mod, FuseLayerNorm(table))
    return nodes(mod, table)


def last_calls(model):
    """Return the nodes and shapes of the kernel calls of a model's last bucket."""
    return next(reversed(model.buckets.values())).lowered.calls


AFTER = ((2, 5, 48), (2, 5, 64))


def test_the_layer_before_a_layer_norm_computes_it():
    (node,) = after_dense_nodes(after_dense, *AFTER)
    assert (node.residual, node.norm) == (True, pytest.approx(1e-3))
    model = check_compiled(module(after_dense, *AFTER))
    assert [call.node.norm for call in last_calls(model)] == [node.norm]


@pytest.mark.parametrize("precision", ["bf16", "bf16-weights"])
def test_a_layer_norm_after_a_layer_of_low_precision(precision):
    mod = module(after_dense, *AFTER)
    exact, rounded = (tvmstruct.compile(mod, precision=p) for p in ("f32", precision))
    x, residual = (models.rng(i).normal(size=s).astype(np.float32) for i, s in enumerate(AFTER))
    np.testing.assert_allclose(rounded(x, residual), exact(x, residual), atol=0.03)


def test_a_layer_norm_in_a_structured_layer():
    plan = LayerPlan("low_rank", {"r": 5})
    body = module(after_dense, *AFTER)
    (name,) = [record.name for record in tvmstruct.compile(body).report().layers]
    model = tvmstruct.compile(body, plan=Plan({name: plan}))
    (call,) = last_calls(model)
    assert (call.node.norm, len(call.shapes)) == (pytest.approx(1e-3), 1 + 2 + 1 + 2 + 1)


def test_what_something_else_reads_is_normalised_apart():
    both = lambda emit, x, residual: after_dense(emit, x, residual, read_twice=True)  # noqa: E731
    layer, norm = after_dense_nodes(both, *AFTER)
    assert (layer.norm, norm) == (None, LayerNorm(64, pytest.approx(1e-3)))
    check_compiled(module(both, *AFTER))


def test_layer_norm_over_two_axes_is_refused():
    mod = module(layer_norm(axes=(-2, -1)), (2, 5, 24))
    found, log = norms(mod)
    assert not found
    assert "normalises axes [1, 2] of 3, want the last" in log.rejected[0][2]
    model = check_compiled(mod)
    assert log.rejected[0][2] in [record.reason for record in model.report().layers]


def test_layer_norm_in_float64_is_refused():
    found, log = norms(module(layer_norm(dtype="float64"), (5, 24), dtype="float64"))
    assert not found
    assert "dtype float64" in log.rejected[0][2]


# emit_kernels and lift_constants


def emit(mod, store=None, isa=ISAS[0]):
    mod, table, _ = dense(mod)
    store = WeightStore() if store is None else store
    rule = EmitKernels(table, X86Kernels(isa), store)
    mod, _ = transform(mod, rule)
    return mod, rule, store


def test_every_layer_becomes_the_call_of_a_kernel():
    mod, rule, store = emit(linear(PLAIN))
    called = [
        v.args[0].global_symbol
        for v in compat_values(mod)
        if isinstance(v, relax.Call) and compat.op_name(v) == compat.DPS
    ]
    assert called == list(rule.used)
    ((key, tensor),) = store.tensors.items()
    assert key.endswith("#packed32")
    assert tuple(tensor.shape) == (2, 48, 32)


def compat_values(mod):
    from tvmstruct.rewrite import Graph

    return Graph(mod["main"]).bound.values()


def test_packed_weights_are_shared_between_modules():
    store = WeightStore()
    emit(linear(PLAIN), store)
    before = dict(store.tensors)
    emit(module(lambda e, x: R.matmul(x, const(PLAIN)), (2, 3, 48)), store)
    assert {k: v.data_ptr() for k, v in store.tensors.items()} == {
        k: v.data_ptr() for k, v in before.items()
    }


def test_weights_of_the_same_size_are_kept_apart():
    store = WeightStore()
    emit(linear(PLAIN), store)
    emit(linear(PLAIN * 2), store)
    assert len(store.tensors) == 2


def test_constants_become_parameters_once():
    w = const(PLAIN)

    def body(emit, x):
        return R.add(emit(R.multiply(x, w)), emit(R.add(w, const(1.0))))

    mod = module(body, (48, 64))
    lift = LiftConstants(WeightStore())
    mod = with_parameters(apply_rule(mod, lift, Log()), lift)
    assert len(mod["main"].params) == 2
    assert lift.names == list(lift.parameters)
    assert operators(mod).count("relax.multiply") == 1
    x = models.rng().normal(size=(48, 64)).astype(np.float32)
    found = models.run_module(mod, [x, PLAIN])[0]
    np.testing.assert_allclose(found, x * PLAIN + PLAIN + 1, **tolerance("float32"))


def test_constants_in_tuples_are_lifted_and_scalars_are_not():
    def body(emit, x):
        return R.concat([x, const(PLAIN), const(PLAIN)], axis=0)

    mod = module(body, (3, 64))
    lift = LiftConstants(WeightStore())
    mod = with_parameters(apply_rule(mod, lift, Log()), lift)
    assert len(mod["main"].params) == 2
    check_compiled(module(body, (3, 64)))


def test_a_model_keeps_one_copy_of_its_weights():
    source = tvmstruct.from_onnx(models.dense_model())
    model = tvmstruct.compile(source, buckets="exact")
    for rows in (1, 2, 5):
        model(np.ones((rows, 24), np.float32))
    pointers = [{t.data_ptr() for t in bucket.weights} for bucket in model.buckets.values()]
    assert len(model.buckets) == 3
    assert all(p == pointers[0] for p in pointers)


# clip_gathers


def test_gathers_are_made_safe():
    table = models.weight(9, 4)

    def body(emit, x):
        return R.take(const(table), emit(R.astype(x, "int64")), axis=0)

    mod = module(body, (5,), dtype="int32")
    after, _ = transform(mod, ClipGathers())
    take = next(v for v in compat_values(after) if compat.op_name(v) == "relax.take")
    assert str(take.attrs.mode) == "clip"
    wild = np.array([0, 8, 2**31 - 1, -(2**31), 4], np.int32)
    found = models.run_module(after, [wild])[0]
    assert np.isfinite(found).all()


def test_the_target_decides_the_width_of_panels():
    for isa in ISAS:
        _, _, store = emit(linear(PLAIN), isa=isa)
        assert next(iter(store.tensors)).endswith(f"#packed{2 * isa.lanes}")
    assert resolve("llvm -mcpu=x86-64-v3").isa is ISAS[1]
