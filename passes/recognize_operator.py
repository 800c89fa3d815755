"""Write a chain of linear operators with constants as one structured layer.

Block-diagonal products (batched matmul, einsum), Sylvester matrices or butterflies, transposes,
reshapes, constant factors, slices, zeros to pad with, copies, and sums of two chains of one tensor
become one `Layer` that holds an operator of the algebra: BH4 of the public LookupFFN code with
its residual, Kronecker products as reshape, matmul, transpose, matmul, and whatever else is
written so. A plain matmul, or several, stay for `canonicalize_dense`. Where the dense matrix that
a structured chain equals costs less than the chain, the layer is that matrix.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import replace
from itertools import pairwise

import numpy as np
from tvm import relax

from tvmstruct import compat, ops
from tvmstruct.known_forms import known_form
from tvmstruct.layers import Form, Layer, LayerTable
from tvmstruct.passes import linear
from tvmstruct.passes.chain_reader import ChainReader, Chains
from tvmstruct.passes.linear import Linear
from tvmstruct.rewrite import Graph, operands
from tvmstruct.simplify import chain, simplify

R = relax.op
Found = dict[relax.Expr, Linear]


class RecognizeOperator:
    """Replace the last call of a linear chain by a layer of its operator."""

    name = "recognize_operator"

    def __init__(self, table: LayerTable, forms: dict[str, Form], names: Mapping[int, str]) -> None:
        self.table, self.forms, self.names = table, forms, names
        self.graph: Graph | None = None
        self.found: Found = {}

    def rewrite(self, graph: Graph, call: relax.Call) -> relax.Expr | None:
        """Return the layer that a call is the last step of."""
        if graph is not self.graph:
            self.graph, self.found = graph, find_chains(graph, self.names)
        found = self.found.get(call)
        if found is None:
            return None
        rows, out = _rows(found), compat.static_shape(call)
        assert out is not None
        layer = Layer(found.names, self._operator(found))
        x = R.reshape(found.root, (rows, found.n_in))
        return R.reshape(self.table.call(layer, [x], (rows, layer.op.n_out)), out)

    def _operator(self, found: Linear) -> ops.Op:
        """Return the operator of a chain, made once and kept for every bucket."""
        key = "+".join(found.names)
        if key not in self.forms:
            self.forms[key] = _form(simplify(chain(found.n_in, found.factors)))
        return self.forms[key].op


def _form(op: ops.Op) -> Form:
    """Return the form of an operator: the matrix that it equals, where that costs less."""
    cost, dense = op.macs + op.adds, op.n_in * op.n_out
    if cost < dense:
        known = known_form(op)
        return Form(known.op, known.name, known.parameters, reason="as the graph computes it")
    why = f"the chain in the graph has {cost} multiply-adds and additions, its matrix {dense}"
    return Form(ops.Dense(op.to_dense().astype(np.float32)), reason=why)


def _nodes(op: ops.Op) -> Iterator[ops.Op]:
    if isinstance(op, ops.Product | ops.Sum):
        for part in op.factors if isinstance(op, ops.Product) else op.terms:
            yield from _nodes(part)
    else:
        yield op


def _rows(x: Linear) -> int:
    return math.prod(compat.static_shape(x.root) or ()) // x.n_in


def find_chains(graph: Graph, names: Mapping[int, str]) -> Found:
    """Return the chains of a graph by the call that ends each."""
    stops: set[relax.Var] = set()
    while True:  # a value on the way that something else reads ends a chain and begins the next
        reader = ChainReader(graph, names, stops)
        chains = {var: reader.read(var, value) for var, value in graph.bound.items()}
        found, more = _end_chains(graph, chains)
        if not more - stops:
            return _rename(found)
        stops |= more


def _end_chains(graph: Graph, chains: Mapping[relax.Var, Chains]) -> tuple[Found, set[relax.Var]]:
    """Return what ends at each call, from the last on, and where chains have to be cut."""
    found: Found = {}
    covered: set[relax.Var] = set()
    cuts: set[relax.Var] = set()
    for var, value in reversed(list(graph.bound.items())):
        if var in covered or not isinstance(value, relax.Call):
            continue
        for x in chains[var].values():
            if not _structured(x.factors) or (done := linear.settled(x, _rows(x))) is None:
                continue
            covered |= x.inside
            if shared := _read_elsewhere(graph, var, x):
                cuts |= shared
            else:
                found[value] = done
            break
    return found, cuts


def _rename(found: Found) -> Found:
    """Number chains of the same weights, such as slices of one stored tensor."""
    count: dict[tuple[str, ...], int] = {}
    for call, item in reversed(list(found.items())):
        names = item.names or ("operator",)
        index = count[names] = count.get(names, -1) + 1
        last = names[-1] if not index and item.names else f"{names[-1]}[{index}]"
        found[call] = replace(item, names=(*names[:-1], last))
    return found


def _structured(factors: tuple[ops.Op, ...]) -> bool:
    """Return whether a product has blocks or a transform, not only whole matrices."""
    for op in factors:
        if isinstance(op, ops.Product | ops.Sum):
            parts = op.factors if isinstance(op, ops.Product) else op.terms
            if _structured(parts):
                return True
        elif isinstance(op, ops.BlockDiag | ops.SharedBlockDiag):
            if op.n_in > op.w.shape[-2]:
                return True
        elif isinstance(op, ops.Dense) and isinstance(simplify(op), ops.WalshHadamard):
            return True
    return _sums_up(factors)


def _sums_up(factors: tuple[ops.Op, ...]) -> bool:
    """Return whether a product with sums has structure once it is written shorter."""
    if not any(isinstance(f, ops.Sum) for f in factors):
        return False
    if any(a.n_out != b.n_in for a, b in pairwise(factors)):
        return False  # axes are on their way between rows and features: no product yet
    nodes = _nodes(simplify(chain(factors[0].n_in, factors)))
    return any(
        isinstance(n, ops.BlockDiag | ops.SharedBlockDiag)
        or (isinstance(n, ops.WalshHadamard) and n.n > 1)
        for n in nodes
    )


def _read_elsewhere(graph: Graph, var: relax.Var, x: Linear) -> set[relax.Var]:
    """Return the variables on the way that have readers which are not on it."""
    readers: Counter[relax.Var] = Counter()
    for reader in (var, *x.inside):
        readers.update(operands(graph.bound[reader]))
    return {v for v in x.inside if graph.uses[v] != readers[v]}
