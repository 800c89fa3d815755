"""Gathers by the digits of an id and their products become one lookup, and nothing else does."""

from __future__ import annotations

import numpy as np
import pytest
from tvm import relax

from tests import models
from tests.relax_modules import module, nodes, operators, transform
from tvmstruct.layers import Embedding, LayerTable
from tvmstruct.passes.recognize_word2ket import RecognizeWord2Ket
from tvmstruct.passes.simplify_layout import SimplifyLayout

R = relax.op
SIDES = [(4, 3), (5, 2), (3, 2)]  # rows and features of each factor: 60 x 12 in all
RANK, WIDTH = 2, 11


def factors() -> list[np.ndarray]:
    rng = models.rng(5)
    return [rng.normal(size=(t, q, RANK)).astype(np.float32) for t, q in SIDES]


def want(ids: np.ndarray) -> np.ndarray:
    """Return the rows by the definition: Kronecker products of the rows of each term, added up."""
    out = np.zeros((*ids.shape, 12))
    for at in np.ndindex(ids.shape):
        digits = np.unravel_index(ids[at], [t for t, _ in SIDES])
        for k in range(RANK):
            x, y, z = (f[d, :, k] for f, d in zip(factors(), digits, strict=True))
            out[at] += np.kron(np.kron(x, y), z)
    return out[..., :WIDTH]


def chain(emit, ids, *, units=(15, 3), bases=(5, 3), second=None):
    """Spell the lookup of ids (2, 7)."""
    (p, q, s), third = factors(), ids if second is None else second

    def rows(array, index):
        return emit(R.take(relax.const(array), index, 0, mode="clip"))

    def number(n):
        return relax.const(n, "int64")

    first = rows(p, emit(R.divide(ids, number(units[0]))))
    middle = emit(R.floor_mod(emit(R.divide(ids, number(units[1]))), number(bases[0])))
    left = emit(R.reshape(first, (2, 7, 3, 1, RANK)))
    right = emit(R.reshape(rows(q, middle), (2, 7, 1, 2, RANK)))
    both = emit(R.reshape(emit(R.multiply(left, right)), (2, 7, 6, RANK)))
    last = rows(s.transpose(0, 2, 1), emit(R.floor_mod(third, number(bases[1]))))
    y = emit(R.reshape(emit(R.matmul(both, last)), (2, 7, 12)))
    return emit(R.strided_slice(y, [2], [0], [WIDTH]))


def recognised(**options) -> tuple:
    mod = module(lambda emit, x: chain(emit, x, **options), (2, 7), dtype="int64")
    table, tables = LayerTable(), {}
    mod, _ = transform(mod, SimplifyLayout(), RecognizeWord2Ket(table, tables, {}))
    return mod, table, tables


def test_the_chain_is_one_lookup_that_crops():
    mod, table, tables = recognised()
    (node,) = nodes(mod, table)
    assert isinstance(node, Embedding)
    assert node.table is not None
    ids = np.arange(60).reshape(5, 12)
    np.testing.assert_allclose(node.table.rows(ids), want(ids), rtol=1e-5, atol=1e-5)
    assert set(operators(mod)) == {"relax.reshape", "relax.call_dps_packed"}
    (form,) = tables.values()
    assert (form.form, form.parameters) == ("word2ket_xs", {"order": 3, "r": RANK})
    assert node.table.params == sum(f.size for f in factors())


@pytest.mark.parametrize(
    "options", [{"units": (15, 5)}, {"units": (12, 3)}, {"bases": (4, 3)}, {"bases": (5, 2)}]
)
def test_other_digits_stay_gathers(options):
    mod, table, tables = recognised(**options)
    assert (nodes(mod, table), tables) == ([], {})


def test_gathers_by_two_ids_stay_gathers():
    def body(emit, a, b):
        return chain(emit, a, second=b)

    table = LayerTable()
    mod, _ = transform(
        module(body, (2, 7), (2, 7), dtype="int64"),
        SimplifyLayout(),
        RecognizeWord2Ket(table, {}, {}),
    )
    assert nodes(mod, table) == []
