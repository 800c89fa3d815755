"""Sums of looked-up rows become one node, planned tables lookups of factors; nothing else does."""

from __future__ import annotations

import numpy as np
import pytest
import tvm
from tvm import relax

import tvmstruct
from tests import models
from tests.embedding_reference import layer_norm, xs_row
from tests.relax_modules import R, check_compiled, const, module, nodes, operators, transform
from tvmstruct import compat
from tvmstruct.embeddings import nearest_table
from tvmstruct.frontends.source import WEIGHTS_ATTR
from tvmstruct.layers import Embedding, LayerTable
from tvmstruct.passes.fuse_embedding import FuseEmbedding
from tvmstruct.passes.plan_embedding import PlanEmbedding
from tvmstruct.planning import LayerPlan, Plan
from tvmstruct.rewrite import Log
from tvmstruct.schedules.compute.embedding import Rows, Tensors
from tvmstruct.testing import tolerance

rng = np.random.default_rng(3)
BATCH, LENGTH, WORDS, N = 3, 5, 29, 24
WORD, PLACE, KIND = (rng.standard_normal((k, N), np.float32) for k in (WORDS, LENGTH, 2))
GAMMA, BETA = rng.standard_normal((2, N), np.float32)
SHAPE = (BATCH, LENGTH)
XS = LayerPlan("word2ket_xs", {"order": 2, "r": 3})


def take(array: np.ndarray, ids, axis: int = 0):
    return R.take(const(array), ids, axis=axis)


def fused(body, *shapes, dtype: str = "int64") -> list:
    """Return the nodes that a module has after the pass."""
    table = LayerTable()
    mod, _ = transform(module(body, *shapes, dtype=dtype), FuseEmbedding(table, {}))
    return nodes(mod, table)


def bert(emit, ids, kinds):
    x = emit(R.add(emit(take(WORD, ids)), emit(take(KIND, kinds))))
    x = emit(R.add(x, const(PLACE[None])))
    return emit(R.nn.layer_norm(x, const(GAMMA), const(BETA), axes=[-1], epsilon=1e-6))


def reference(words: np.ndarray, kinds: np.ndarray) -> np.ndarray:
    return layer_norm(words + KIND[kinds] + PLACE, GAMMA, BETA, 1e-6)


def inputs() -> tuple[np.ndarray, np.ndarray]:
    return rng.integers(0, WORDS, SHAPE), rng.integers(0, 2, SHAPE)


def test_the_embedding_block_of_bert_is_one_node() -> None:
    (node,) = fused(bert, SHAPE, SHAPE)
    assert isinstance(node, Embedding)
    assert node.total.terms == (Rows(WORDS, "int64"), Rows(2, "int64"), Rows(LENGTH))
    assert node.total.norm == pytest.approx(1e-6)
    ids, kinds = inputs()
    model = check_compiled(module(bert, SHAPE, SHAPE, dtype="int64"), [ids, kinds])
    (record,) = (r for r in model.report().layers if r.form == "embedding")
    assert "then LayerNorm, in one kernel" in record.reason


def test_a_scaled_lookup_and_a_mean_over_two_readers() -> None:
    def body(emit, ids):
        words = emit(R.multiply(emit(take(WORD, ids)), const(np.float32(1.5))))
        return emit(R.add(words, const(PLACE[None])))

    (node,) = fused(body, SHAPE)
    assert node.total.terms == (Rows(WORDS, "int64", 1.5), Rows(LENGTH))
    check_compiled(module(body, SHAPE, dtype="int64"), [inputs()[0]])


def test_constant_rows_are_kept_once_for_each_position_and_added_up() -> None:
    same = np.broadcast_to(KIND[:1], (BATCH, LENGTH, N))

    def body(emit, ids):
        words = emit(R.add(emit(take(WORD, ids)), const(PLACE)))
        words = emit(R.add(words, const(same)))
        return emit(R.add(words, const(BETA)))

    (node,) = fused(body, SHAPE)
    assert node.total.terms == (Rows(WORDS, "int64"), Rows(LENGTH))
    check_compiled(module(body, SHAPE, dtype="int64"), [inputs()[0]])


def test_positions_by_constant_ids_are_constant_rows() -> None:
    places = rng.standard_normal((9, N), np.float32)

    def body(emit, ids):
        here = relax.const(np.broadcast_to(np.arange(LENGTH)[None] + 2, SHAPE).copy(), "int64")
        return emit(R.add(emit(take(WORD, ids)), emit(take(places, here))))

    (node,) = fused(body, SHAPE)
    assert node.total.terms == (Rows(WORDS, "int64"), Rows(LENGTH))
    check_compiled(module(body, SHAPE, dtype="int64"), [inputs()[0]])


def test_a_sum_that_something_else_reads_is_kept() -> None:
    def body(emit, ids, kinds):
        x = emit(R.add(emit(take(WORD, ids)), emit(take(KIND, kinds))))
        norm = emit(R.nn.layer_norm(x, const(GAMMA), const(BETA), axes=[-1], epsilon=1e-6))
        return emit(R.add(x, norm))

    (node,) = fused(body, SHAPE, SHAPE)
    assert node.total == node.total.__class__(N, (Rows(WORDS, "int64"), Rows(2, "int64")))
    check_compiled(module(body, SHAPE, SHAPE, dtype="int64"), inputs())


def half_rows(emit, ids):
    return emit(R.add(emit(take(WORD, ids)), const(rng.standard_normal((BATCH, 1, N)))))


def columns(emit, ids):
    return emit(R.add(emit(take(WORD.T, ids, axis=1)), const(np.ones((N, 1, 1)))))


def one_column(emit, ids):
    return emit(R.add(emit(take(WORD, ids)), const(np.ones((BATCH, LENGTH, 1)))))


def first_axis(emit, ids):
    x = emit(R.add(emit(take(WORD[:, :LENGTH], ids)), const(np.ones((1, 1, LENGTH)))))
    scale = const(np.ones((LENGTH, LENGTH)))
    return emit(R.nn.layer_norm(emit(R.multiply(x, x)), scale, scale, axes=[1, 2]))


@pytest.mark.parametrize("body", [half_rows, columns, one_column], ids=lambda f: f.__name__)
def test_what_is_no_sum_of_rows_stays(body) -> None:
    assert fused(body, SHAPE) == []


def test_a_lone_dense_gather_and_narrow_ids_stay() -> None:
    assert fused(lambda emit, ids: emit(take(WORD, ids)), SHAPE) == []
    small = lambda emit, ids: emit(R.add(emit(take(WORD, ids)), const(PLACE)))  # noqa: E731
    assert fused(small, SHAPE, dtype="int8") == []
    assert len(fused(first_axis, SHAPE)) == 1  # the sum alone, not the norm over two axes


# --- plans ---------------------------------------------------------------------------------


def named(body, array: np.ndarray, *shapes, dtype: str = "int64") -> tvm.IRModule:
    """Return ``module(body)``, whose first constant with the values of ``array`` is "words"."""
    mod = module(body, *shapes, dtype=dtype)
    found = []

    def visit(expr) -> None:
        if compat.is_constant(expr) and compat.static_shape(expr) == array.shape:
            found.append(compat.constant_tensor(expr))

    relax.analysis.post_order_visit(mod["main"], visit)
    return mod.with_attr(WEIGHTS_ATTR, {"words": found[0]})


@pytest.mark.parametrize(
    "entry",
    [XS, LayerPlan("word2ket_xs", {"order": 3, "r": 2}), LayerPlan("kronecker", {"r": 4})],
    ids=lambda e: e.family,
)
def test_a_planned_table_is_looked_up_by_its_factors(entry: LayerPlan) -> None:
    mod = named(bert, WORD, SHAPE, SHAPE)
    model = tvmstruct.compile(mod, plan=Plan({"words": entry}))
    table, fit = nearest_table(entry.family, WORD, **entry.parameters)
    rows = np.stack([xs_row(table.factors, i, N) for i in range(WORDS)])
    ids, kinds = inputs()
    found = model(ids, kinds)
    np.testing.assert_allclose(
        found, reference(rows[ids], kinds), **tolerance("float32", 64, scale=4)
    )
    record = next(r for r in model.report().layers if r.name == "words")
    assert (record.form, record.shape, record.params) == (entry.family, WORD.shape, table.params)
    assert record.bytes == 4 * table.params
    assert record.error == pytest.approx(fit.error)
    assert record.error == pytest.approx(np.linalg.norm(rows - WORD) / np.linalg.norm(WORD))


def test_a_planned_table_alone_and_scaled_is_one_lookup() -> None:
    def body(emit, ids):
        return emit(R.multiply(const(np.float32(-2)), emit(take(WORD, ids))))

    mod = named(body, WORD, SHAPE)
    names = {compat.address(t): n for n, t in dict(mod.attrs[WEIGHTS_ATTR]).items()}
    table = LayerTable()
    plan = PlanEmbedding(table, {}, Plan({"words": XS}), names)
    mod, _ = transform(mod, plan, FuseEmbedding(table, names))
    (node,) = nodes(mod, table)
    (term,) = node.total.terms
    assert isinstance(term, Tensors)
    assert term.scale == -2
    assert "relax.multiply" not in operators(mod)


def test_two_planned_tables_in_one_sum_are_two_lookups() -> None:
    words = const(WORD)

    def body(emit, ids):
        return emit(R.add(*(emit(R.take(words, part, axis=0)) for part in (ids, ids))))

    mod = named(body, WORD, SHAPE)
    model = tvmstruct.compile(mod, plan=Plan({"words": XS}))
    rows = nearest_table("word2ket_xs", WORD, **XS.parameters)[0].rows(np.arange(WORDS))
    ids = inputs()[0]
    np.testing.assert_allclose(model(ids), 2 * rows[ids], **tolerance("float32", 16, scale=4))


@pytest.mark.parametrize(
    ("entry", "body", "dtype", "why"),
    [
        (
            LayerPlan("low_rank", {"r": 2}),
            None,
            "int64",
            "cannot be looked up in the form low_rank",
        ),
        (XS, columns, "int64", "gathers along axis 1 of"),
        (XS, None, "int8", "ids of int8; want float32 and one of int32, int64"),
    ],
)
def test_planned_tables_that_stay_dense_say_why(entry, body, dtype, why) -> None:
    body = body or (lambda emit, ids: emit(take(WORD, ids)))
    mod = named(body, WORD.T if body is columns else WORD, SHAPE, dtype=dtype)
    names = {compat.address(t): n for n, t in dict(mod.attrs[WEIGHTS_ATTR]).items()}
    plan = PlanEmbedding(LayerTable(), {}, Plan({"words": entry}), names)
    _, log = transform(mod, plan)
    assert isinstance(log, Log)
    ((_, name, found),) = log.rejected
    assert name == "words"
    assert why in found


def test_a_form_without_lookups_is_refused_where_only_rows_are_looked_up() -> None:
    mod = named(lambda emit, ids: emit(take(WORD, ids)), WORD, SHAPE)
    plan = Plan({"words": LayerPlan("low_rank", {"r": 2})})
    with pytest.raises(
        tvmstruct.errors.PlanError, match=r"multiplies with \['words'\]; .* word2ket"
    ):
        tvmstruct.compile(mod, plan=plan)


def test_parameters_that_do_not_fit_a_table_name_it() -> None:
    mod = named(bert, WORD, SHAPE, SHAPE)
    plan = Plan({"words": LayerPlan("word2ket_xs", {"order": 7, "r": 1})})
    with pytest.raises(tvmstruct.errors.PlanError, match="layer 'words': word2ket_xs: order=7"):
        tvmstruct.compile(mod, plan=plan)(*inputs())


# --- tied output projection ----------------------------------------------------------------


def tied_model():
    """``logits = tanh(E[ids]) @ E^T``."""
    n = models.helper.make_node
    arrays = {"words": WORD}
    graph = [
        n("Gather", ["words", "ids"], ["x"]),
        n("Tanh", ["x"], ["h"]),
        n("Transpose", ["words"], ["columns"], perm=[1, 0]),
        n("MatMul", ["h", "columns"], ["y"]),
    ]
    ids = models.value("ids", ["batch", "length"], models.INT64)
    return models.make_model(graph, [ids], [models.value("y", None)], arrays)


@pytest.mark.parametrize("order", [2, 3])
def test_tied_logits_go_through_the_factors(order: int, monkeypatch) -> None:
    parameters = {"order": order, "r": 2}
    table, _ = nearest_table("word2ket_xs", WORD, **parameters)
    rows = np.stack([xs_row(table.factors, i, N) for i in range(WORDS)])
    plan = Plan({"words": LayerPlan("word2ket_xs", parameters)})
    monkeypatch.setattr(tvmstruct.ops.Op, "to_dense", None)  # nothing builds the table
    model = tvmstruct.compile(tvmstruct.from_onnx(tied_model()), plan=plan)
    ids = inputs()[0]
    want = np.tanh(rows[ids]) @ rows.T
    np.testing.assert_allclose(model(ids), want, **tolerance("float32", 64, scale=4))
    found = {r.name: r for r in model.report().layers}
    assert found["words"].shape == found["words^T"].shape[::-1] == (WORDS, N)
    assert found["words"].form == found["words^T"].form == "word2ket_xs"
    assert "tied: the factors of the embedding" in found["words^T"].reason
