"""Write a chain of linear operators with constants as one structured layer.

Block-diagonal products (batched matmul, einsum), Sylvester matrices or butterflies, transposes,
reshapes, constant factors, slices, zeros to pad with, copies, and sums of two chains of one tensor
become one `Layer` that holds an operator of the algebra: BH4 of the public LookupFFN code with
its residual, Kronecker products as reshape, matmul, transpose, matmul, and whatever else is
written so. A plain matmul stays for `canonicalize_dense`. A chain is taken only if it has a
structured factor and costs less than the dense matrix that it equals.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import replace

from tvm import relax

from tvmstruct import compat, ops
from tvmstruct.layers import Form, Layer, LayerTable
from tvmstruct.passes import linear
from tvmstruct.passes.chain_reader import ChainReader, Chains
from tvmstruct.passes.linear import Linear
from tvmstruct.rewrite import Graph, Reject, operands
from tvmstruct.simplify import chain, simplify

R = relax.op


class RecognizeOperator:
    """Replace the last call of a linear chain by a layer of its operator."""

    name = "recognize_operator"

    def __init__(self, table: LayerTable, forms: dict[str, Form], names: Mapping[int, str]) -> None:
        self.table, self.forms, self.names = table, forms, names
        self.graph: Graph | None = None
        self.found: dict[relax.Expr, Linear | Reject] = {}

    def rewrite(self, graph: Graph, call: relax.Call) -> relax.Expr | Reject | None:
        """Return the layer that a call is the last step of, or why its chain is none."""
        if graph is not self.graph:
            self.graph, self.found = graph, find_chains(graph, self.names)
        found = self.found.get(call)
        if found is None or isinstance(found, Reject):
            return found
        rows, out = _rows(found), compat.static_shape(call)
        assert out is not None
        layer = Layer(found.names, self._operator(found))
        x = R.reshape(found.root, (rows, found.n_in))
        return R.reshape(self.table.call(layer, [x], (rows, layer.op.n_out)), out)

    def _operator(self, found: Linear) -> ops.Op:
        """Return the operator of a chain, made once and kept for every bucket."""
        key = "+".join(found.names)
        if key not in self.forms:
            op = simplify(chain(found.n_in, found.factors))
            form, parameters = describe_form(op)
            why = "as the graph computes it"
            self.forms[key] = Form(op, form, parameters, reason=why)
        return self.forms[key].op


def describe_form(op: ops.Op) -> tuple[str, dict[str, object]]:
    """Return the name of an operator's form in the report: BH4 and the like, or "operator"."""
    nodes = list(_nodes(op))
    blocks = [n for n in nodes if isinstance(n, ops.BlockDiag)]
    mixers = [n for n in nodes if isinstance(n, ops.WalshHadamard) and n.n > 1]
    if blocks and len(blocks) == len(mixers):
        return f"bh{len(blocks)}", {"b": blocks[0].w.shape[1]}
    if not blocks and any(isinstance(n, ops.SharedBlockDiag) for n in nodes):
        return "kronecker", {}
    return "operator", {}


def _nodes(op: ops.Op) -> Iterator[ops.Op]:
    if isinstance(op, ops.Product | ops.Sum):
        for part in op.factors if isinstance(op, ops.Product) else op.terms:
            yield from _nodes(part)
    else:
        yield op


def _rows(x: Linear) -> int:
    return math.prod(compat.static_shape(x.root) or ()) // x.n_in


def find_chains(graph: Graph, names: Mapping[int, str]) -> dict[relax.Expr, Linear | Reject]:
    """Return the chains of a graph by the call that ends each."""
    reader = ChainReader(graph, names)
    chains = {var: reader.read(var, value) for var, value in graph.bound.items()}
    found: dict[relax.Expr, Linear | Reject] = {}
    covered: set[relax.Var] = set()
    for var, value in reversed(list(graph.bound.items())):
        if var in covered or not isinstance(value, relax.Call):
            continue
        if (chosen := _choose(graph, var, chains[var])) is not None:
            taken, why = chosen
            found[value] = (
                Reject(taken.names[0] if taken.names else "operator", why) if why else taken
            )
            covered |= taken.inside
    return _rename(found)


def _rename(found: dict[relax.Expr, Linear | Reject]) -> dict[relax.Expr, Linear | Reject]:
    """Number chains of the same weights, such as slices of one stored tensor."""
    count: dict[tuple[str, ...], int] = {}
    for call, item in reversed(list(found.items())):
        if isinstance(item, Linear):
            names = item.names or ("operator",)
            index = count[names] = count.get(names, -1) + 1
            last = names[-1] if not index and item.names else f"{names[-1]}[{index}]"
            found[call] = replace(item, names=(*names[:-1], last))
    return found


def _choose(graph: Graph, var: relax.Var, chains: Chains) -> tuple[Linear, str] | None:
    """Return the longest chain to a variable that nothing else reads the middle of.

    With it comes why it must stay as it is, or an empty string.
    """
    refused = None
    for x in chains.values():
        if not _structured(x.factors) or not _closed(graph, var, x):
            continue
        done = linear.settled(x, _rows(x))
        if done is None:
            continue
        cost, dense = _cost(done), done.n_in * done.width
        if cost < dense:
            return done, ""
        why = f"{cost} multiply-adds and additions a row, dense has {dense}"
        refused = refused or (done, why)
    return refused


def _cost(x: Linear) -> int:
    op = simplify(chain(x.n_in, x.factors))
    return op.macs + op.adds


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
    return _has_butterflies(factors)


def _has_butterflies(factors: tuple[ops.Op, ...]) -> bool:
    sums = [f for f in factors if isinstance(f, ops.Sum) and f.n_in == f.n_out]
    if not sums:
        return False
    op = simplify(chain(factors[0].n_in, factors))
    return any(isinstance(n, ops.WalshHadamard) and n.n > 1 for n in _nodes(op))


def _closed(graph: Graph, var: relax.Var, x: Linear) -> bool:
    """Return whether all readers of what is computed on the way are on the way too."""
    readers: dict[relax.Var, int] = {}
    for reader in (var, *x.inside):
        for read in operands(graph.bound[reader]):
            readers[read] = readers.get(read, 0) + 1
    return all(graph.uses[v] == readers.get(v, 0) for v in x.inside)
