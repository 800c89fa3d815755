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
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import replace

from tvm import relax

from tvmstruct import compat, ops
from tvmstruct.known_forms import known_form
from tvmstruct.layers import Form, Layer, LayerTable
from tvmstruct.passes import linear
from tvmstruct.passes.chain_reader import ChainReader, Chains
from tvmstruct.passes.linear import Linear
from tvmstruct.rewrite import Graph, Reject, operands
from tvmstruct.simplify import chain, simplify

R = relax.op
Found = dict[relax.Expr, Linear | Reject]


class RecognizeOperator:
    """Replace the last call of a linear chain by a layer of its operator."""

    name = "recognize_operator"

    def __init__(self, table: LayerTable, forms: dict[str, Form], names: Mapping[int, str]) -> None:
        self.table, self.forms, self.names = table, forms, names
        self.graph: Graph | None = None
        self.found: Found = {}

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
            known = known_form(op)
            why = "as the graph computes it"
            self.forms[key] = Form(known.op, known.name, known.parameters, reason=why)
        return self.forms[key].op


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
                break
            name = x.names[0] if x.names else "operator"
            why = _too_much(done)
            found[value] = Reject(name, why) if why else done
            break
    return found, cuts


def _rename(found: Found) -> Found:
    """Number chains of the same weights, such as slices of one stored tensor."""
    count: dict[tuple[str, ...], int] = {}
    for call, item in reversed(list(found.items())):
        if isinstance(item, Linear):
            names = item.names or ("operator",)
            index = count[names] = count.get(names, -1) + 1
            last = names[-1] if not index and item.names else f"{names[-1]}[{index}]"
            found[call] = replace(item, names=(*names[:-1], last))
    return found


def _too_much(x: Linear) -> str:
    """Return why a chain stays as it is, or an empty string."""
    op = simplify(chain(x.n_in, x.factors))
    cost, dense = op.macs + op.adds, x.n_in * x.width
    return "" if cost < dense else f"{cost} multiply-adds and additions a row, dense has {dense}"


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
    if not any(isinstance(f, ops.Sum) for f in factors):
        return False
    op = simplify(chain(factors[0].n_in, factors))
    return any(isinstance(n, ops.WalshHadamard) and n.n > 1 for n in _nodes(op))


def _read_elsewhere(graph: Graph, var: relax.Var, x: Linear) -> set[relax.Var]:
    """Return the variables on the way that have readers which are not on it."""
    readers: Counter[relax.Var] = Counter()
    for reader in (var, *x.inside):
        readers.update(operands(graph.bound[reader]))
    return {v for v in x.inside if graph.uses[v] != readers[v]}
