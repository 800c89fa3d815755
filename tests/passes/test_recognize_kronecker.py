"""Two products with a transpose between them become one sum of Kroneckers, and nothing else."""

from __future__ import annotations

import numpy as np
import pytest
from tvm import relax

from tests import models
from tests.relax_modules import const, module, nodes, operators, transform
from tvmstruct import ops
from tvmstruct.layers import Form, Layer, LayerTable
from tvmstruct.passes.canonicalize_dense import CanonicalizeDense
from tvmstruct.passes.recognize_kronecker import RecognizeKronecker
from tvmstruct.passes.simplify_layout import SimplifyLayout

R = relax.op
N_IN, N_OUT, R_TERMS = 11, 17, 3
A, B = (R_TERMS, 4, 5), (R_TERMS, 3, 4)  # terms, rows, columns: 12 x 20 before cropping


def factors() -> tuple[np.ndarray, np.ndarray]:
    rng = models.rng(3)
    return (rng.normal(size=s).astype(np.float32) for s in (A, B))


def chain(emit, x, *, second_reader=False, crop=(0, N_OUT), fill=0.0, order=(0, 1, 3, 4, 2)):
    """Spell ``x @ sum kron(a, b)`` for x (2, 7, 11)."""
    a, b = factors()
    (r, n1, m1), (_, n2, m2) = a.shape, b.shape
    x = emit(R.nn.pad(x, [0, 0, 0, 0, 0, n1 * n2 - N_IN], pad_value=fill))
    y = emit(R.reshape(x, (2, 7, n1, n2)))
    y = emit(R.matmul(y, const(b.transpose(1, 2, 0).reshape(n2, m2 * r))))
    first = y
    y = emit(R.reshape(y, (2, 7, n1, m2, r)))
    y = emit(R.reshape(emit(R.permute_dims(y, list(order))), (2, 7, m2, r * n1)))
    y = emit(R.matmul(y, const(a.reshape(r * n1, m1))))
    y = emit(R.reshape(emit(R.permute_dims(y, [0, 1, 3, 2])), (2, 7, m1 * m2)))
    y = emit(R.strided_slice(y, [2], [crop[0]], [crop[1]]))
    return (y, first) if second_reader else y


def recognised(**options) -> tuple:
    mod = module(lambda emit, x: chain(emit, x, **options), (2, 7, N_IN))
    table, forms = LayerTable(), {}
    rules = (RecognizeKronecker(table, forms, {}), CanonicalizeDense(table, {}), SimplifyLayout())
    mod, _ = transform(mod, *rules)
    return mod, table, forms


def test_the_chain_is_one_layer_that_pads_and_crops():
    mod, table, forms = recognised()
    (layer,) = nodes(mod, table)
    assert isinstance(layer, Layer)
    a, b = factors()
    want = sum(np.kron(x, y) for x, y in zip(a, b, strict=True))[:N_IN, :N_OUT]
    np.testing.assert_allclose(layer.op.to_dense(), want, rtol=1e-5, atol=1e-5)
    assert layer.op.params == a.size + b.size
    assert set(operators(mod)) == {"relax.reshape", "relax.call_dps_packed"}
    (form,) = forms.values()
    assert isinstance(form, Form)
    assert (form.form, form.parameters) == ("kronecker", {"r": 3, "a": (4, 5), "b": (3, 4)})
    assert "dense one takes 187" in form.reason


def test_a_slice_that_starts_later_stays_behind_the_layer():
    mod, table, _ = recognised(crop=(1, N_OUT))
    (layer,) = nodes(mod, table)
    assert layer.op.n_out == 20
    assert operators(mod)[-1] == "relax.strided_slice"


def test_padding_with_other_than_zeros_stays_before_the_layer():
    mod, table, _ = recognised(fill=1.0)
    (layer,) = nodes(mod, table)
    assert layer.op.n_in == 12
    assert operators(mod)[0] == "relax.nn.pad"


@pytest.mark.parametrize(
    "options",
    [{"second_reader": True}, {"order": (0, 1, 4, 3, 2)}],
    ids=["read twice", "other order"],
)
def test_other_chains_stay_two_layers(options):
    mod, table, forms = recognised(**options)
    assert [type(layer.op) for layer in nodes(mod, table)] == [ops.Dense, ops.Dense]
    assert not forms
