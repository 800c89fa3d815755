"""Run a part of a graph with numpy on a few rows, to learn what it computes of one tensor.

Every row of the tensor goes through the same arithmetic, so axes that walk rows are left out: an
array has the probes first, then each axis without its rows. Floating point runs in float64, so
that a spelling and the formula it is compared with differ by next to nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from math import prod

import numpy as np
from tvm import relax

from tvmstruct import compat
from tvmstruct.passes.constant_values import ELEMENTWISE as OF_CONSTANTS
from tvmstruct.passes.constant_values import evaluate
from tvmstruct.passes.factors import Axes, Factor, contiguous, merge, regroup, size_of
from tvmstruct.passes.linear import ROW, has_rows
from tvmstruct.passes.slices import slice_of
from tvmstruct.passes.views import RESHAPES
from tvmstruct.rewrite import Graph


def _sigmoid(x: np.ndarray) -> np.ndarray:
    return np.exp(-np.logaddexp(0, -x))


ELEMENTWISE: dict[str, Callable] = {
    **OF_CONSTANTS,
    "relax.abs": np.abs,
    "relax.sign": np.sign,
    "relax.sigmoid": _sigmoid,
    "relax.tanh": np.tanh,
    "relax.square": np.square,
    "relax.rsqrt": lambda x: 1 / np.sqrt(x),
    "relax.floor": np.floor,
    "relax.ceil": np.ceil,
    "relax.round": np.round,
    "relax.trunc": np.trunc,
    "relax.nn.relu": lambda x: np.maximum(x, 0),
    "relax.nn.softplus": lambda x: np.logaddexp(0, x),
    "relax.log_add_exp": np.logaddexp,
    "relax.right_shift": np.right_shift,
    "relax.bitwise_or": np.bitwise_or,
    "relax.bitwise_and": np.bitwise_and,
    "relax.bitwise_xor": np.bitwise_xor,
    "relax.floor_mod": np.mod,
    "relax.logical_xor": np.logical_xor,
    "relax.isfinite": np.isfinite,
    "relax.isnan": np.isnan,
    "relax.cosh": np.cosh,
    "relax.sinh": np.sinh,
}
REDUCTIONS: dict[str, Callable] = {
    "relax.sum": np.sum,
    "relax.prod": np.prod,
    "relax.max": np.max,
    "relax.min": np.min,
    "relax.mean": np.mean,
    "relax.argmax": np.argmax,
}


class Unknown(Exception):
    """A value depends on more than the tensor and constants, or mixes rows."""


@dataclass(frozen=True, eq=False)
class Gather:
    """Rows looked up in a constant table: ``codes`` (probes, lookups) of ``data`` (rows, n)."""

    data: np.ndarray
    codes: np.ndarray
    source: relax.Expr
    call: relax.Call


@dataclass(frozen=True, eq=False)
class Probed:
    """An array (probes, axes without rows), and the gathers that it was computed from."""

    axes: Axes
    array: np.ndarray
    gathers: tuple[Gather, ...] = ()


@dataclass
class Prober:
    """Computes the expressions of a graph that read nothing but ``root`` (probes, features)."""

    graph: Graph
    root: relax.Var
    values: np.ndarray
    known: dict[relax.Expr, Probed | Unknown] = field(default_factory=dict)

    def __post_init__(self) -> None:
        shape = compat.static_shape(self.root)
        assert shape
        axes = [*contiguous(ROW, shape[:-1]), (Factor(shape[-1]),)]
        flat = self.values.reshape(len(self.values), *(1 for _ in shape[:-1]), shape[-1])
        self.known[self.root] = Probed(axes, flat)
        self.rows = prod(shape[:-1])

    def run(self, expr: relax.Expr) -> Probed:
        """Return the value of an expression, or raise Unknown."""
        if expr not in self.known:
            try:
                self.known[expr] = self._run(expr)
            except Unknown as why:
                self.known[expr] = why
        found = self.known[expr]
        if isinstance(found, Unknown):
            raise found
        return found

    def _run(self, expr: relax.Expr) -> Probed:
        if (constant := evaluate(self.graph, expr)) is not None:
            shape = constant.shape
            wide = constant.astype(np.float64) if constant.dtype.kind == "f" else constant
            return Probed([(Factor(n),) if n > 1 else () for n in shape], wide[None])
        if (part := slice_of(self.graph, expr)) is not None:
            index = slice(part.begin, part.begin + part.size)
            return _slice(self.run(part.source), part.axis, index, drop=part.drop)
        call = self.graph.value(expr)
        name = compat.op_name(call)
        if name in ELEMENTWISE:
            return _elementwise(ELEMENTWISE[name], [self.run(a) for a in call.args])
        if name in REDUCTIONS:
            return self._reduce(call, REDUCTIONS[name])
        handler = getattr(self, "_" + name.removeprefix("relax.").replace(".", "_"), None)
        if name in RESHAPES:
            handler = self._reshape
        if handler is None or not name.startswith("relax."):
            raise Unknown(f"reads {name or 'an input'}")
        return handler(call)

    def _reshape(self, call: relax.Call) -> Probed:
        x, shape = self.run(call.args[0]), compat.static_shape(call)
        axes = None if shape is None else regroup(list(x.axes), shape)
        if axes is None:
            raise Unknown("reshapes rows and features into each other")
        return Probed(axes, x.array.reshape(len(x.array), *_sizes(axes)), x.gathers)

    def _permute_dims(self, call: relax.Call) -> Probed:
        x, order = self.run(call.args[0]), call.attrs.axes
        axes = list(range(len(x.axes)))[::-1] if order is None else [int(a) for a in order]
        moved = x.array.transpose(0, *(a + 1 for a in axes))
        return Probed([x.axes[a] for a in axes], moved, x.gathers)

    def _broadcast_to(self, call: relax.Call) -> Probed:
        x, shape = self.run(call.args[0]), compat.static_shape(call) or ()
        like = [(Factor(n),) if n > 1 else () for n in shape]
        axes = [()] * (len(shape) - len(x.axes)) + list(x.axes)
        axes = [a or b for a, b in zip(axes, like, strict=True)]
        array = x.array.reshape(len(x.array), *[1] * (len(shape) - len(x.axes)), *x.array.shape[1:])
        return Probed(axes, np.broadcast_to(array, (len(array), *_sizes(axes))), x.gathers)

    def _astype(self, call: relax.Call) -> Probed:
        x, dtype = self.run(call.args[0]), compat.dtype_of(call)
        if dtype.startswith(("int", "uint")):
            return Probed(x.axes, np.trunc(x.array).astype(np.int64), x.gathers)
        return Probed(x.axes, x.array.astype(bool if dtype == "bool" else float), x.gathers)

    def _clip(self, call: relax.Call) -> Probed:
        x = self.run(call.args[0])
        low, high = (float(a.value) for a in call.args[1:3])
        return Probed(x.axes, np.clip(x.array, low, high), x.gathers)

    def _reduce(self, call: relax.Call, reduce: Callable) -> Probed:
        x, attrs = self.run(call.args[0]), call.attrs
        given = range(len(x.axes)) if attrs.axis is None else attrs.axis
        over = [int(a) % len(x.axes) for a in (given if hasattr(given, "__iter__") else [given])]
        if any(has_rows(x.axes[a]) for a in over):
            raise Unknown("sums over rows")
        where = over[0] + 1 if reduce is np.argmax else tuple(a + 1 for a in over)
        array = reduce(x.array, axis=where, keepdims=bool(attrs.keepdims))
        axes = [() if i in over else a for i, a in enumerate(x.axes)]
        kept = axes if attrs.keepdims else [a for i, a in enumerate(axes) if i not in over]
        return Probed(kept, array, x.gathers)

    def _matmul(self, call: relax.Call) -> Probed:
        x, y = (self.run(a) for a in call.args)
        if min(len(x.axes), len(y.axes)) < 2 or has_rows(x.axes[-1]) or has_rows(y.axes[-2]):
            raise Unknown("multiplies over rows")
        axes = [*_join_all(x.axes[:-2], y.axes[:-2]), x.axes[-2], y.axes[-1]]
        if prod(f.size for a in axes for f in a if ROW in f.strides) > self.rows:
            raise Unknown("multiplies rows with rows")
        rank = len(axes)
        a, b = (t.array.reshape(len(t.array), *[1] * (rank - len(t.axes)), *t.array.shape[1:])
                for t in (x, y))  # fmt: skip
        return Probed(axes, a @ b, (*x.gathers, *y.gathers))

    def _take(self, call: relax.Call) -> Probed:
        data, index = call.args
        axis, table = call.attrs.axis, evaluate(self.graph, data)
        if table is None:
            x, at = self.run(data), evaluate(self.graph, index)
            if at is None or axis is None or has_rows(x.axes[int(axis)]):
                raise Unknown("looks up rows of a tensor")
            place = int(axis) % len(x.axes)
            axes = [*x.axes[:place], *_still(at.shape), *x.axes[place + 1 :]]
            return Probed(axes, np.take(x.array, at, place + 1), x.gathers)
        if axis is None or int(axis) % table.ndim or table.ndim < 2 or table.dtype.kind != "f":
            raise Unknown("looks up something else than rows of a table")
        codes = self.run(index)
        return self._gathered(call, table.reshape(len(table), -1), codes, table.shape[1:])

    def _gather_nd(self, call: relax.Call) -> Probed:
        table, index = evaluate(self.graph, call.args[0]), self.run(call.args[1])
        depth = index.array.shape[-1]
        if table is None or int(call.attrs.batch_dims) or depth >= table.ndim:
            raise Unknown("looks up something else than rows of a table")
        parts = [Probed(index.axes[:-1], index.array[..., i], index.gathers) for i in range(depth)]
        return self._by_parts(call, table, parts)

    def _index_tensor(self, call: relax.Call) -> Probed:
        table = evaluate(self.graph, call.args[0])
        indices = [self.run(i) for i in self.graph.value(call.args[1]).fields]
        if table is None or len(indices) >= table.ndim:
            raise Unknown("looks up something else than rows of a table")
        return self._by_parts(call, table, indices)

    def _gather_elements(self, call: relax.Call) -> Probed:
        """Look rows up by a code that is written out for all their columns."""
        table, index = evaluate(self.graph, call.args[0]), self.run(call.args[1])
        rank, axis = len(index.axes), int(call.attrs.axis)
        codes, wide = index.array[..., :1], index.array
        if table is None or rank < 2 or axis % rank != rank - 2 or (wide != codes).any():
            raise Unknown("looks up something else than rows of a table")
        lead = table.shape[:-2]
        if [size_of(a) for a in index.axes[:-2]] != list(lead) or wide.shape[-1] != table.shape[-1]:
            raise Unknown("looks up rows of some tables or columns only")
        first = np.arange(prod(lead)).reshape(*lead, 1) * table.shape[-2]
        rows = Probed(index.axes[:-1], codes[..., 0] + first, index.gathers)
        return self._gathered(call, table.reshape(-1, table.shape[-1]), rows, table.shape[-1:])

    def _by_parts(self, call: relax.Call, table: np.ndarray, parts: list[Probed]) -> Probed:
        """Look rows up under an index for each of the first axes of a table."""
        steps = [prod(table.shape[i + 1 : len(parts)]) for i in range(len(parts))]

        def flat(*indices: np.ndarray) -> np.ndarray:
            return sum(i * step for i, step in zip(indices, steps, strict=True))  # type: ignore

        codes = _elementwise(flat, parts)
        rest = table.shape[len(parts) :]
        return self._gathered(call, table.reshape(-1, prod(rest)), codes, rest)

    def _gathered(
        self, call: relax.Call, table: np.ndarray, codes: Probed, rest: Sequence[int]
    ) -> Probed:
        flat = codes.array.reshape(len(codes.array), -1)
        if codes.array.dtype.kind not in "iu":
            raise Unknown("looks up numbers that are not whole")
        rows = table[np.clip(codes.array, 0, len(table) - 1)]
        array = rows.reshape(*codes.array.shape, *rest)
        found = Gather(table, flat, call.args[0], call)
        return Probed([*codes.axes, *_still(rest)], array, (*codes.gathers, found))

    def _concat(self, call: relax.Call) -> Probed:
        return self._joined(call, stacked=False)

    def _stack(self, call: relax.Call) -> Probed:
        return self._joined(call, stacked=True)

    def _joined(self, call: relax.Call, *, stacked: bool) -> Probed:
        parts = [self.run(f) for f in self.graph.value(call.args[0]).fields]
        axis = (0 if call.attrs.axis is None else int(call.attrs.axis)) % len(
            compat.static_shape(call) or (0,)
        )
        if stacked:
            parts = [_insert(p, axis) for p in parts]
        parts = _fit_all(parts, but=axis)
        if any(has_rows(p.axes[axis]) for p in parts):
            raise Unknown("joins rows")
        axes = parts[0].axes
        for p in parts[1:]:
            axes = _join_all(axes, [axes[i] if i == axis else a for i, a in enumerate(p.axes)])
        count = max(len(p.array) for p in parts)
        whole = [np.broadcast_to(p.array, (count, *p.array.shape[1:])) for p in parts]
        array = np.concatenate(whole, axis + 1)
        axes = [*axes[:axis], (Factor(array.shape[axis + 1]),), *axes[axis + 1 :]]
        return Probed(axes, array, tuple(g for p in parts for g in p.gathers))

    def _strided_slice(self, call: relax.Call) -> Probed:
        lists = [[int(n.value) for n in a.fields] for a in call.args[1:]]
        steps = lists[3] if len(lists) > 3 and lists[3] else [1] * len(lists[0])
        out = self.run(call.args[0])
        for axis, begin, end, step in zip(*lists[:3], steps, strict=True):
            out = _slice(out, axis % len(out.axes), slice(begin, end, step))
        return out


def _still(shape: Sequence[int]) -> Axes:
    return [(Factor(n),) if n > 1 else () for n in shape]


def _sizes(axes: Axes) -> list[int]:
    """Return the sizes of axes without rows."""
    return [size_of(f for f in axis if ROW not in f.strides) for axis in axes]


def _insert(x: Probed, axis: int) -> Probed:
    axes = [*x.axes[:axis], (), *x.axes[axis:]]
    return Probed(axes, np.expand_dims(x.array, axis + 1), x.gathers)


def _slice(x: Probed, axis: int, index: slice, *, drop: bool = False) -> Probed:
    size = size_of(x.axes[axis])
    if len(range(*index.indices(size))) == size and not drop:
        return x
    if has_rows(x.axes[axis]):
        raise Unknown("takes some rows")
    array = x.array[(slice(None),) * (axis + 1) + (index,)]
    axes = [*x.axes[:axis], *_still([array.shape[axis + 1]]), *x.axes[axis + 1 :]]
    if drop:
        axes.pop(axis)
        array = array.squeeze(axis + 1)
    return Probed(axes, array, x.gathers)


def _elementwise(f: Callable, operands: Sequence[Probed]) -> Probed:
    rank = max(len(x.axes) for x in operands)
    axes: Axes = [()] * rank
    operands = _fit_all(operands)
    for x in operands:
        axes = _join_all(axes, x.axes)
    arrays = [
        x.array.reshape(len(x.array), *[1] * (rank - len(x.axes)), *x.array.shape[1:])
        for x in operands
    ]
    with np.errstate(all="ignore"):
        array = np.asarray(f(*arrays))
    return Probed(axes, array, tuple(dict.fromkeys(g for x in operands for g in x.gathers)))


def _fit_all(operands: Sequence[Probed], but: int | None = None) -> list[Probed]:
    """Leave out the rows of constants that are written out for all rows of another operand."""
    rank = max(len(x.axes) for x in operands)
    rows: Axes = [()] * rank
    for x in operands:
        for i, axis in enumerate(x.axes, rank - len(x.axes)):
            rows[i] = axis if has_rows(axis) and i != but else rows[i]
    return [_fit(x, rows[rank - len(x.axes) :]) for x in operands]


def _fit(x: Probed, rows: Axes) -> Probed:
    axes, array = list(x.axes), x.array
    for i, (axis, loops) in enumerate(zip(x.axes, rows, strict=True)):
        if not axis or not loops or has_rows(axis) or size_of(axis) != size_of(loops):
            continue
        before, after = array.shape[: i + 1], array.shape[i + 2 :]
        array = array.reshape(*before, *(f.size for f in loops), *after)
        for j, f in enumerate(loops, i + 1):
            if ROW in f.strides:
                first = array.take([0], j)
                if not (array == first).all():
                    raise Unknown("treats rows differently")
                array = first
        array, axes[i] = array.reshape(*before, -1, *after), loops
    return Probed(axes, array, x.gathers)


def _join_all(a: Axes, b: Axes) -> Axes:
    """Return the axes of two broadcast operands; where both are long they must agree."""
    rank = max(len(a), len(b))
    a, b = [()] * (rank - len(a)) + list(a), [()] * (rank - len(b)) + list(b)
    for x, y in zip(a, b, strict=True):
        if x and y and merge(x) != merge(y):
            raise Unknown("combines rows that lie differently")
    return [x or y for x, y in zip(a, b, strict=True)]
