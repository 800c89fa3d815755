"""Write LookupFFN's hash, gather and weighted sum as one node (Zeng et al. 2023, eq. 7 and 8).

What a graph computes of hashed features z is found by running it on a few rows of them
(`tvmstruct.passes.probe`), so any spelling will do: bits as z > 0 or by sign, most or least
significant first, powers of two multiplied and summed, shifted or as a matmul; tables in one
tensor under two indices, end to end under offsets, or one by one; the score as a quotient, with
sigmoids, with logarithms, with the linear scale or without; rows weighted and summed over tables
by a sum, a matmul or one after the other. With ``flips`` the rows of neighbouring codes are
looked up too, stacked or concatenated before the sum or added after it, say
``sum(w * T[k, code ^ mask] for mask in (0, 1, 2, 4, ...))``. Tables whose bits come in another
order are sorted once.

The node is accepted only if on every probed row it gives what the graph gives.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from math import prod

import numpy as np
from tvm import relax

from tvmstruct import compat
from tvmstruct.layers import HashTables, LayerTable
from tvmstruct.lookup import entries, hash_codes
from tvmstruct.passes.constant_values import evaluate, names_of
from tvmstruct.passes.factors import merge, size_of
from tvmstruct.passes.linear import ROW
from tvmstruct.passes.probe import Gather, Probed, Prober, Unknown
from tvmstruct.passes.slices import slice_of
from tvmstruct.passes.table_codes import Refusal, Tables, probes, read_tables, splits
from tvmstruct.passes.views import RESHAPES
from tvmstruct.rewrite import Graph, Reject
from tvmstruct.schedules import Kernels

R = relax.op
COMPARED = (
    "relax.greater",
    "relax.greater_equal",
    "relax.less",
    "relax.less_equal",
    "relax.sign",
    "relax.argmax",
)
LOOKUPS = ("relax.take", "relax.gather_nd", "relax.index_tensor", "relax.gather_elements")
LAYOUT = (*RESHAPES, "relax.permute_dims")
TOLERANCE = 1e-5  # of the largest entry of a row


@dataclass(frozen=True)
class Found:
    """A lookup: the tensor of hashed features, and the node."""

    z: relax.Var
    node: HashTables


class RecognizeLookup:
    """Replace the sum over looked-up rows by a call of hash tables."""

    name = "recognize_lookup"

    def __init__(
        self,
        table: LayerTable,
        names: Mapping[int, str],
        tables: dict[str, np.ndarray],
        kernels: Kernels | None = None,
    ) -> None:
        self.table, self.names, self.tables, self.kernels = table, names, tables, kernels
        self.graph: Graph | None = None
        self.found: dict[relax.Expr, Found | Reject] = {}

    def rewrite(self, graph: Graph, call: relax.Call) -> relax.Expr | Reject | None:
        """Return the hash tables that a call is the last step of, or why a lookup is none."""
        if graph is not self.graph:
            self.graph, self.found = graph, find_lookups(graph, self.names, self.tables)
        found = self.found.get(call)
        if found is None or isinstance(found, Reject):
            return found
        if self.kernels is not None and not self.kernels.hashes(found.node.static):
            count = entries(found.node.static.tau, found.node.flips)
            return Reject(f"lookup.{found.node.names[0]}", f"no kernel reads {count} rows a table")
        shape, out = compat.static_shape(found.z), compat.static_shape(call)
        assert shape is not None
        assert out is not None
        rows = prod(shape[:-1])
        z = R.reshape(found.z, (rows, shape[-1]))
        y = self.table.call(found.node, [z], (rows, found.node.tables.shape[2]))
        return R.reshape(y, out)


def find_lookups(
    graph: Graph, names: Mapping[int, str], tables: dict[str, np.ndarray]
) -> dict[relax.Expr, Found | Reject]:
    """Return the lookups of a graph by the call that ends each; ``tables`` keeps sorted ones."""
    out: dict[relax.Expr, Found | Reject] = {}
    taken: Counter[str] = Counter()
    for z, calls in _by_features(graph, uncut=True).items():
        try:
            found = _Search(graph, z, calls, names).run()
        except Refusal as why:
            found = _of_parts(graph, calls, names)
            if not found:
                source = names_of(graph, calls[0].args[0], names)
                out[calls[0]] = Reject(f"lookup.{source[0] if source else 0}", str(why))
        for call, item in found.items():
            out[call] = replace(item, node=_stored(item.node, taken, tables))
    return out


def _of_parts(
    graph: Graph, calls: list[relax.Call], names: Mapping[int, str]
) -> dict[relax.Expr, Found]:
    """Return the lookups of features that were cut from wider ones, none if one is refused."""
    out: dict[relax.Expr, Found] = {}
    for z, group in _by_features(graph, uncut=False).items():
        if any(call in calls for call in group):
            try:
                out |= _Search(graph, z, group, names).run()
            except Refusal:
                return {}
    return out


def _stored(node: HashTables, taken: Counter[str], tables: dict[str, np.ndarray]) -> HashTables:
    """Number lookups in one stored tensor, and keep one copy of tables that had to be sorted."""
    name = "+".join(node.names)
    taken[name] += 1
    if taken[name] > 1:
        name = f"{name}[{taken[name] - 1}]"
        node = replace(node, names=(name,))
    return replace(node, tables=tables.setdefault(name, node.tables))


def _by_features(graph: Graph, *, uncut: bool) -> dict[relax.Var, list[relax.Call]]:
    """Return the lookups in constant tables by the tensor whose signs their codes read.

    Where only part of a tensor is read, it is the whole one if ``uncut``.
    """
    found: dict[relax.Var, list[relax.Call]] = {}
    for value in graph.bound.values():
        if compat.op_name(value) in LOOKUPS and evaluate(graph, value.args[0]) is not None:
            for z in dict.fromkeys(_signed(graph, value.args[1], set(), uncut)):
                found.setdefault(z, []).append(value)
    return found


def _signed(
    graph: Graph, expr: relax.Expr, seen: set[relax.Expr], uncut: bool
) -> Iterator[relax.Var]:
    """Yield the tensors whose signs an expression of integers reads."""
    value = graph.value(expr)
    if value in seen:
        return
    seen.add(value)
    fields = list(value.args) if isinstance(value, relax.Call) else []
    fields += list(getattr(value, "fields", ()))
    fields += [value.tuple_value] if isinstance(value, relax.TupleGetItem) else []
    for field in fields:
        compared = compat.op_name(value) in COMPARED and compat.dtype_of(field) == "float32"
        if compared and evaluate(graph, field) is None:
            yield from _features(graph, field, uncut)
        else:
            yield from _signed(graph, field, seen, uncut)


def _features(graph: Graph, expr: relax.Expr, uncut: bool) -> Iterator[relax.Var]:
    """Yield the tensor that an expression is a view of: reshaped, transposed, cut."""
    while isinstance(expr, relax.Var):
        value = graph.value(expr)
        if uncut and (part := slice_of(graph, expr)) is not None:
            expr = part.source
        elif compat.op_name(value) in LAYOUT:
            expr = value.args[0]
        else:
            yield expr
            return


class _Search:
    """Looks for the values of a graph that are lookups of one tensor of features."""

    def __init__(
        self,
        graph: Graph,
        z: relax.Var,
        calls: list[relax.Call],
        names: Mapping[int, str],
    ) -> None:
        self.graph, self.z, self.calls, self.names = graph, z, calls, names
        self.features = (compat.static_shape(z) or (0,))[-1]

    def run(self) -> dict[relax.Expr, Found]:
        """Return the lookups by their last call; raise Refusal where there is none."""
        count = self._count()
        why = Refusal(
            f"{count} rows are looked up for {self.features} features; want h of h * tau, or "
            "those of all codes within so many flipped bits"
        )
        for tau, flips in splits(self.features, count):
            try:
                return self._with(tau, flips)
            except Refusal as other:
                why = other if flips == 0 or "powers" not in str(other) else why
        raise why

    def _count(self) -> int:
        prober = Prober(self.graph, self.z, np.ones((1, self.features)))
        total = 0
        for call in self.calls:
            try:
                total += prober.run(self._variable(call)).gathers[-1].codes.shape[1]
            except Unknown as why:
                raise Refusal(f"the code {why}") from None
        return total

    def _variable(self, call: relax.Call) -> relax.Var:
        return next(var for var, value in self.graph.bound.items() if value.same_as(call))

    def _with(self, tau: int, flips: int) -> dict[relax.Expr, Found]:
        z = probes(self.features, tau)
        prober = Prober(self.graph, self.z, z)
        gathers = [prober.run(self._variable(call)).gathers[-1] for call in self.calls]
        tables = read_tables(gathers, z, tau, flips)
        sums, why = self._sums(prober, len(gathers), tables.array.shape[2])
        scores = [(scaled, _weighted(z, tables, scaled)) for scaled in (True, False)]
        for call, y, bias in reversed(sums):
            for scaled, want in scores:
                if (factor := _ratio(y, want)) is not None:
                    node = self._node(tables, gathers, bias, factor, scaled)
                    return {call: Found(self.z, node)}
        raise Refusal(why or "the weights of the rows are not the scores of equation 7")

    def _sums(
        self, prober: Prober, count: int, n: int
    ) -> tuple[list[tuple[relax.Expr, np.ndarray, np.ndarray | None]], str]:
        """Return the values (probes, n) that read all gathers, in order, and what stopped the last.

        A value that is another plus a constant comes without it.
        """
        out, why = [], ""
        reads = {v for v, value in self.graph.bound.items() if value in self.calls}
        for var, value in self.graph.bound.items():
            if var in reads or not isinstance(value, relax.Call) or var in self.graph.closed:
                continue
            try:
                y = prober.run(var)
            except Unknown as stop:
                if any(_reads(prober, self.graph, value, count)):
                    why = why or f"the sum over tables {stop}"
                continue
            if len(set(map(id, y.gathers))) < count or not self._is_sum(y, n):
                continue
            array, bias = self._without_bias(prober, value, y, n)
            out.append((value, array, bias))
        return out, why if not out else ""

    def _is_sum(self, y: Probed, n: int) -> bool:
        loops = merge(f for axis in y.axes for f in axis)
        rows = [f for f in loops if ROW in f.strides]
        whole = len(rows) <= 1 and loops[: len(rows)] == rows
        size = prod((compat.static_shape(self.z) or ())[:-1])
        return whole and size_of(rows) == size and size_of(loops) == size * n

    def _without_bias(
        self, prober: Prober, value: relax.Expr, y: Probed, n: int
    ) -> tuple[np.ndarray, np.ndarray | None]:
        inner = self.graph.call(value, "relax.add", *RESHAPES)
        while inner is not None and compat.op_name(inner) in RESHAPES:
            inner = self.graph.call(inner.args[0], "relax.add", *RESHAPES)
        for a, b in () if inner is None else (inner.args, tuple(reversed(inner.args))):
            bias = evaluate(self.graph, b)
            if bias is not None and bias.size in (1, n) and self._is_sum(prober.run(a), n):
                y = prober.run(a)
                wide = np.broadcast_to(bias.reshape(-1), (n,)).astype(np.float32)
                return y.array.reshape(len(y.array), n), wide
        return y.array.reshape(len(y.array), n), None

    def _node(
        self,
        tables: Tables,
        gathers: list[Gather],
        bias: np.ndarray | None,
        factor: float,
        scaled: bool,
    ) -> HashTables:
        names = [n for g in gathers for n in names_of(self.graph, g.source, self.names)]
        unique = tuple(dict.fromkeys(names))
        if not unique:
            digest = hashlib.sha256(np.ascontiguousarray(tables.array).tobytes()).hexdigest()
            unique = (f"constant_{digest[:16]}",)
        array = tables.array if factor == 1 else tables.array * np.float32(factor)
        return HashTables(unique, array, bias, tables.flips, scaled)


def _reads(prober: Prober, graph: Graph, value: relax.Call, count: int) -> Iterator[bool]:
    """Yield for each operand whether it was computed from all lookups."""
    for arg in value.args:
        found = prober.known.get(arg)
        yield isinstance(found, Probed) and len(set(map(id, found.gathers))) >= count


def _weighted(z: np.ndarray, tables: Tables, scaled: bool) -> np.ndarray:
    """Return the weighted sum of rows for probes (probes, features) in float64."""
    codes, scores = hash_codes(z, tables.tau, flips=tables.flips, scaled=scaled)
    y = np.zeros((len(z), tables.array.shape[2]))
    for k in range(codes.shape[1]):
        y += np.einsum("te,ten->tn", scores[:, k], tables.array[k][codes[:, k]])
    return y


def _ratio(found: np.ndarray, want: np.ndarray) -> float | None:
    """Return the number by which ``found`` is ``want`` in every row, or None."""
    size = np.abs(want).max(1, keepdims=True)
    if not np.isfinite(found).all() or not size.any():
        return None
    a, b = found / np.maximum(size, 1e-300), want / np.maximum(size, 1e-300)
    factor = float((a * b).sum() / (b * b).sum())
    if not factor or np.abs(a - factor * b)[size[:, 0] > 0].max() > TOLERANCE * abs(factor):
        return None
    if np.abs(found[size[:, 0] == 0]).max(initial=0) > 0:
        return None
    return 1.0 if abs(factor - 1) < TOLERANCE else factor
