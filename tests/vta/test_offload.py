"""The passes that give layers to an accelerator: what becomes of a module, what is refused."""

import numpy as np
import pytest
from tvm import relax

from tests import relax_modules
from tests.relax_modules import R, const, module, operators, transform
from tvmstruct import ops
from tvmstruct.layers import HashTables, Layer, LayerTable, Offloaded
from tvmstruct.passes.canonicalize_dense import CanonicalizeDense
from tvmstruct.passes.emit_launches import EmitLaunches
from tvmstruct.passes.fuse_epilogue import FuseEpilogue
from tvmstruct.passes.offload_dense import ON_ACCELERATOR, ChainOffloaded, OffloadDense
from tvmstruct.passes.simplify_layout import SimplifyLayout

RNG = np.random.default_rng(0)
W1, B1, W2 = RNG.normal(size=(8, 12)), RNG.normal(size=12), RNG.normal(size=(12, 5))


def offloaded(body, *shapes, obstacle=lambda layer: None):
    """Return the nodes that are offloaded in a module, its operators, and the log."""
    table = LayerTable()
    epilogues = [FuseEpilogue(table, ON_ACCELERATOR, residual=False) for _ in range(4)]
    mod, log = transform(
        module(body, *shapes),
        *(CanonicalizeDense(table, {}), SimplifyLayout(), *epilogues, SimplifyLayout()),
        *(OffloadDense(table, obstacle), ChainOffloaded(table, lambda layer: True)),
    )
    nodes = [n for n in relax_modules.nodes(mod, table) if isinstance(n, Offloaded)]
    return nodes, operators(mod), log


def mlp(emit, x):
    h = emit(R.nn.relu(emit(R.add(emit(R.matmul(x, const(W1))), const(B1)))))
    return emit(R.matmul(h, const(W2)))


def test_an_mlp_with_relu_is_one_chain():
    (node,), left, _ = offloaded(mlp, (2, 3, 8))
    first, second = node.layers
    np.testing.assert_allclose(first.bias, B1, rtol=1e-6)
    assert (first.activation, second.activation) == ("relu", "none")
    assert (second.bias, node.n_out) == (None, 5)
    assert set(left) == {"relax.reshape", "relax.call_dps_packed"}


def test_what_only_the_cpu_does_stays_outside():
    def body(emit, x):
        h = emit(R.nn.gelu(emit(R.add(emit(R.matmul(x, const(W1))), const(B1)))))
        y = emit(R.matmul(h, const(W1.T)))
        return emit(R.add(y, x))

    nodes, left, _ = offloaded(body, (6, 8))
    assert [[layer.activation for layer in n.layers] for n in nodes] == [["none"], ["none"]]
    assert all(not layer.residual for n in nodes for layer in n.layers)
    assert {"relax.nn.gelu", "relax.add"} < set(left)


def test_rows_that_something_else_reads_are_not_handed_on():
    def body(emit, x):
        h = emit(R.matmul(x, const(W1)))
        return emit(R.matmul(h, const(W2))), h

    nodes, _, _ = offloaded(body, (4, 8))
    assert [len(n.layers) for n in nodes] == [1, 1]


def test_rows_of_another_shape_are_not_handed_on():
    def body(emit, x):
        h = emit(R.reshape(emit(R.matmul(x, const(W1))), (8, 6)))
        return emit(R.matmul(h, const(W2[:6])))

    nodes, _, _ = offloaded(body, (4, 8))
    assert [len(n.layers) for n in nodes] == [1, 1]


def test_an_obstacle_is_a_reject():
    nodes, _, log = offloaded(
        mlp, (4, 8), obstacle=lambda layer: "too wide" if layer.n_out == 5 else None
    )
    assert [n.n_out for n in nodes] == [12]
    assert [why for _, _, why in log.rejected] == ["too wide"]


@pytest.mark.parametrize(
    "layer",
    [
        Layer(("w",), ops.Dense(W1), activation="gelu"),
        Layer(("w",), ops.Dense(W1), residual=True),
        Layer(("w",), ops.Dense(W1), norm=1e-5),
    ],
    ids=["activation", "residual", "norm"],
)
def test_a_layer_that_does_more_is_rejected(layer):
    table = LayerTable()

    def body(emit, x, r):
        more = [r] * layer.residual + [const(B1), const(B1)] * (layer.norm is not None)
        return emit(table.call(layer, [x, *more], (4, 12)))

    mod, log = transform(module(body, (4, 8), (4, 12)), OffloadDense(table, lambda layer: None))
    assert relax_modules.nodes(mod, table) == [layer]
    assert "more than bias and ReLU" in log.rejected[0][2]


def test_hash_codes_are_rejected():
    table = LayerTable()
    layer, tables = Layer(("w",), ops.Dense(W1)), HashTables(("t",), np.zeros((3, 16, 7)))

    def body(emit, x):
        z = emit(table.call(layer, [x], (4, 12)))
        z = emit(R.reshape(emit(R.reshape(z, (2, 2, 12))), (4, 12)))
        return emit(table.call(tables, [z], (4, 7)))

    mod, log = transform(module(body, (4, 8)), OffloadDense(table, lambda layer: None))
    assert relax_modules.nodes(mod, table) == [layer, tables]
    assert "hash codes" in log.rejected[0][2]


def test_launches_call_a_symbol_for_their_rows():
    table = LayerTable()
    node = Offloaded((Layer(("w",), ops.Dense(W1)),))

    def body(emit, x):
        return emit(table.call(node, [x], (4, 12)))

    mod, _ = transform(module(body, (4, 8)), EmitLaunches(table, lambda n, rows: f"{n.key}.{rows}"))
    call = mod["main"].body.blocks[0].bindings[0].value
    assert call.args[0].global_symbol == "w.4"
    assert isinstance(call, relax.Call)
