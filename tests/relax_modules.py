"""Small Relax modules, the passes run on them, and the results compared."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import pytest
import tvm
from tvm import relax

import tvmstruct
from tests import models
from tvmstruct.layers import LayerTable, Node
from tvmstruct.passes.canonicalize_dense import CanonicalizeDense
from tvmstruct.passes.fuse_epilogue import FuseEpilogue
from tvmstruct.passes.simplify_layout import SimplifyLayout
from tvmstruct.rewrite import Graph, Log, Rule, apply_rule
from tvmstruct.testing import tolerance

R = relax.op
structure_and_numbers = pytest.mark.parametrize(
    "numbers",
    [pytest.param(False, id="structure"), pytest.param(True, id="numbers", marks=pytest.mark.slow)],
)
MODEL_BOUND = tolerance("float32", 256)


def const(array) -> relax.Expr:
    """Return a float32 constant."""
    return relax.const(np.asarray(array, np.float32))


def module(body: Callable, *shapes: Sequence[int], dtype: str = "float32") -> tvm.IRModule:
    """Return ``main(x0, x1, ...)`` whose outputs are ``body(emit, x0, x1, ...)``."""
    builder = relax.BlockBuilder()
    params = [relax.Var(f"x{i}", relax.TensorType(s, dtype)) for i, s in enumerate(shapes)]
    with builder.function("main", params):
        with builder.dataflow():
            out = body(builder.emit, *params)
            found = builder.emit_output(out if not isinstance(out, tuple) else relax.Tuple(out))
        builder.emit_func_output(found)
    return relax.transform.CanonicalizeBindings()(builder.get())


def transform(mod: tvm.IRModule, *rules: Rule) -> tuple[tvm.IRModule, Log]:
    """Apply rules in order."""
    log = Log()
    for rule in rules:
        mod = apply_rule(mod, rule, log)
    return mod, log


def dense(mod: tvm.IRModule, rounds: int = 4) -> tuple[tvm.IRModule, LayerTable, Log]:
    """Find dense layers and fold their epilogues."""
    table = LayerTable()
    epilogues = [FuseEpilogue(table) for _ in range(rounds)]
    mod, log = transform(mod, CanonicalizeDense(table, {}), SimplifyLayout(), *epilogues)
    return mod, table, log


def nodes(mod: tvm.IRModule, table: LayerTable) -> list[Node]:
    """Return the nodes that a module still calls, in order."""
    found = map(table.node, Graph(mod["main"]).bound.values())
    return [node for node in found if node is not None]


def operators(mod: tvm.IRModule) -> list[str]:
    """Return the names of the operators that a module calls, in order."""
    values = Graph(mod["main"]).bound.values()
    return [v.op.name for v in values if isinstance(v, relax.Call)]


def random_inputs(mod: tvm.IRModule, scale: float = 1.0) -> list[np.ndarray]:
    """Return normal inputs for ``main``."""
    rng = models.rng(7)
    shapes = [[int(d) for d in p.ty.shape] for p in mod["main"].params]
    dtypes = [str(p.ty.dtype) for p in mod["main"].params]
    return [(scale * rng.normal(size=s)).astype(d) for s, d in zip(shapes, dtypes, strict=True)]


def check_compiled(mod: tvm.IRModule, inputs: Sequence[np.ndarray] | None = None, **bound):
    """Compile a module and compare its results with those of TVM's own pipeline."""
    inputs = random_inputs(mod) if inputs is None else inputs
    want = models.run_module(mod, inputs)
    model = tvmstruct.compile(mod)
    found = model(*inputs)
    found = list(found) if isinstance(found, tuple) else [found]
    for a, b in zip(found, want, strict=True):
        assert a.dtype == b.dtype
        np.testing.assert_allclose(a, b, **(bound or MODEL_BOUND))
    return model
