"""Replace ``softmax(scale * q k^T + mask) v``, however it is spelled, by one attention kernel.

The rule is anchored at the product with the values. Every tensor is followed through layout
operators to where it is stored (`views`), and what lies between the two products is peeled off
(`attention_pattern`). Both products and every mask then are loops with strides: the loops are
dealt out to batch, heads, queries and keys, and each tensor is arranged for the kernel's rows.
Where it is stored that way already, `simplify_layout` leaves nothing of that.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from math import prod

from tvm import relax

from tvmstruct import compat, ops
from tvmstruct.layers import Attention, Layer, LayerTable, arguments
from tvmstruct.passes.attention_masks import Masks, meet
from tvmstruct.passes.attention_pattern import (
    Layout,
    Refused,
    Scale,
    Scores,
    Softmax,
    take_apart,
)
from tvmstruct.passes.factors import Axes, Axis, Factor, join, join_all, number, shape_of, size_of
from tvmstruct.passes.slices import in_place
from tvmstruct.passes.views import View, arrange, rearrange, view
from tvmstruct.rewrite import Graph, Reject
from tvmstruct.schedules.compute.dense import Epilogue

R = relax.op


@dataclass
class _Loops:
    """The loops of an attention by what they run over."""

    batch: list[Factor]
    heads: list[Factor]  # those that walk over key or value heads first
    queries: list[Factor]
    keys: list[Factor]
    depth: list[Factor]
    width: list[Factor]  # of a value
    output: list[Factor]  # all but keys and depth, as the graph orders them


class FuseAttention:
    """Recognise scaled dot-product attention with masks in any layout and order."""

    name = "fuse_attention"

    def __init__(self, table: LayerTable) -> None:
        self.table = table

    def rewrite(self, graph: Graph, call: relax.Call) -> relax.Expr | Reject | None:
        """Return the attention call, or why this product of probabilities and values is none."""
        if not self._is_product(call):
            return None
        where = f"attention.{len(self.table.nodes)}"
        try:
            scores = take_apart(graph, call, self._operands(call)[0], self._is_product)
        except Refused as why:
            # A layer behind a softmax need not be attention: only a product would tell.
            return None if self.table.layer(call) else Reject(where, str(why))
        if scores is None:
            return None
        try:
            if (out := self._in_place(graph, call, scores)) is not None:
                return out
            return self._build(graph, call, scores, slices=False)
        except Refused as why:
            return Reject(where, str(why))

    def _in_place(self, graph: Graph, call: relax.Call, scores: Scores) -> relax.Expr | None:
        """Return the attention that reads slices where they are, or None where it cannot."""
        try:
            return self._build(graph, call, scores, slices=True)
        except Refused:
            return None  # as tensors of their own the same slices may do

    def _is_product(self, expr: relax.Expr) -> bool:
        return compat.op_name(expr) == "relax.matmul" or self.table.layer(expr) is not None

    def _operands(self, call: relax.Call) -> tuple[relax.Expr, relax.Expr | Layer]:
        """Return both factors of a product; the second of a layer is its weight."""
        layer = self.table.layer(call)
        return (arguments(call)[0], layer) if layer else (call.args[0], call.args[1])

    def _build(
        self, graph: Graph, call: relax.Call, scores: Scores, *, slices: bool
    ) -> relax.Expr | None:
        q, k = self._operands(scores.product)
        k, v = _matrix(k), _matrix(self._operands(call)[1])
        _check_types(q, k, v, call)
        views = {
            "q": view(graph, q, "q", scales=True, slices=slices),
            "k": view(graph, k, "k", scales=True, slices=slices),
            "v": view(graph, v, "v", slices=slices),
        }
        scale, product, depth = _product(views)
        scale, axes = _follow(graph, scores, product, scale)
        loops = _deal_out(axes, views["v"].axes, depth, product)
        dims = (loops.batch, loops.heads, loops.queries, loops.keys)
        masks = Masks(graph, dims)
        for i, step in enumerate(scores.steps):
            masks.apply(step, f"mask{i}")
        return self._emit(call, views, loops, scale, masks)

    def _emit(
        self, call, views: dict[str, View], loops: _Loops, scale: float, masks: Masks
    ) -> relax.Expr | None:
        shared = [f for f in loops.heads if f.stride("k") or f.stride("v")]
        heads, kv_heads = size_of(loops.heads), size_of(shared)
        rows = {"q": loops.batch + loops.queries, "k": loops.batch + loops.keys}
        columns = {"q": loops.heads + loops.depth, "k": shared + loops.depth}
        rows["v"], columns["v"] = rows["k"], shared + loops.width
        stored = [_store(views[n], n, rows[n], columns[n]) for n in ("q", "k", "v")]
        if None in stored:
            return None
        args, layouts = zip(*stored, strict=True)
        causal, mask, shape = masks.finish()
        kind, dims, mask = _mask(mask, shape, (size_of(loops.batch), heads))
        depth, width = size_of(loops.depth), size_of(loops.width)
        node = Attention(
            heads, depth, width, size_of(loops.queries), size_of(loops.keys), scale,
            *layouts, kind, dims, causal, kv_heads if kv_heads < heads else 0,
        )  # fmt: skip
        y = self.table.call(
            node, [*args] if mask is None else [*args, mask], (size_of(rows["q"]), heads * width)
        )
        return _restore(y, [*rows["q"], *loops.heads, *loops.width], loops.output, call)


def _store(
    view: View, name: str, rows: list[Factor], columns: list[Factor]
) -> tuple[relax.Expr, tuple[int, int]] | None:
    """Return a tensor as rows and its layout, or None for a slice that cannot be read in place."""
    if not view.sliced:
        return arrange(view.root, name, [rows, columns]), (size_of(columns), 0)
    width = in_place(view.root, name, view.offset, rows, columns)
    if width is None:
        return None
    return R.reshape(view.root, (size_of(rows), width)), (width, view.offset)


def _matrix(factor: relax.Expr | Layer) -> relax.Expr:
    """Return keys or values as a tensor; the weight of a plain layer is a constant again."""
    if not isinstance(factor, Layer):
        return factor
    name = factor.names[0]
    if not isinstance(factor.op, ops.Dense) or factor.precision != "f32":
        kind = f"{type(factor.op).__name__} {factor.precision}"
        raise Refused(f"keys or values are the weight {name}, which became {kind}, want Dense f32")
    if factor.epilogue != Epilogue():
        raise Refused(f"keys or values are the weight {name}, whose layer does more than multiply")
    return relax.const(factor.op.w)


def _check_types(q, k, v, call) -> None:
    types = [compat.dtype_of(e) for e in (q, k, call)]
    if set(types) != {"float32"}:
        raise Refused(f"computes in {next(t for t in types if t != 'float32')}, want float32")
    shapes = [compat.static_shape(e) for e in (q, k, v)]
    if any(s is None or len(s) < 2 or not prod(s) for s in shapes):
        raise Refused(f"shapes q {shapes[0]}, k^T {shapes[1]}, v {shapes[2]}: want static matrices")


def _product(views: dict[str, View]) -> tuple[float, Axes, Axis]:
    """Return scale, axes and contracted loops of ``q @ k``; its own position is named "s"."""
    q, k = views["q"].axes, views["k"].axes
    lead, depth = join_all(q[:-2], k[:-2]), join(q[-1], k[-2])
    if lead is None or depth is None:
        raise Refused(
            f"queries {shape_of(q)} and keys {shape_of(k)} are stored in loops that do not nest"
        )
    axes = number("s", [*lead, q[-2], k[-1]])
    return views["q"].scale * views["k"].scale, axes, depth


def _follow(graph: Graph, scores: Scores, axes: Axes, scale: float) -> tuple[float, Axes]:
    """Follow the scores from their product to the probabilities; return the whole scale."""
    keys = size_of(axes[-1])
    for i, step in enumerate(scores.steps):
        if isinstance(step, Scale):
            scale *= step.factor
        elif isinstance(step, Layout):
            shape, moved = shape_of(axes), rearrange(graph, step.call, axes)
            if moved is None or prod(shape) != prod(shape_of(moved)):
                name = compat.op_name(step.call)
                raise Refused(f"{name} of scores {shape} is no other order of the same scores")
            axes = moved
        elif isinstance(step, Softmax):
            if not _is_keys(axes[step.axis], keys):
                raise Refused(
                    f"softmax runs over axis {step.axis} of {shape_of(axes)}, not over the keys"
                )
        else:
            axes = meet(graph, step, axes, f"mask{i}")
    return scale, axes


def _is_keys(axis: Axis, keys: int) -> bool:
    """Return whether an axis is that of the keys, the innermost of the product."""
    return size_of(axis) == keys and all(f.stride("s") < keys for f in axis)


def _deal_out(p: Axes, v: Axes, depth: Axis, product: Axes) -> _Loops:
    """Deal the loops of ``p @ v`` out to what they run over."""
    queries, keys = map(size_of, product[-2:])
    lead, contracted = join_all(p[:-2], v[:-2]), join(p[-1], v[-2])
    if lead is None or contracted is None:
        shapes = f"probabilities {shape_of(p)} and values {shape_of(v)}"
        raise Refused(f"{shapes} are stored in loops that do not nest")
    if not _is_keys(p[-1], keys):
        raise Refused(
            f"values are summed over an axis of {size_of(p[-1])}, not over the {keys} keys"
        )
    outer = [f for axis in (*lead, p[-2]) for f in axis]
    # Loops over queries to which values belong are a batch.
    length = [f for f in outer if f.stride("s") < queries * keys and not f.stride("v")]
    if any(f.stride("s") < keys for f in outer):
        raise Refused("values have a batch that queries and keys do not have")
    rest = [f for f in outer if not _among(f, length)]
    heads = _heads(
        [f for f in rest if f.stride("s") >= queries * keys], length, contracted, product
    )
    others = [f for f in rest if not _among(f, heads)]
    repeated = [f for f in others if not f.stride("k") and not f.stride("v")]
    batch = [f for f in others if not _among(f, repeated)]
    heads = sorted(heads, key=lambda f: not f.stride("k") and not f.stride("v"))
    return _Loops(
        batch,
        heads,
        repeated + length,
        list(contracted),
        list(depth),
        list(v[-1]),
        [*outer, *v[-1]],
    )


def _heads(rest: list[Factor], length: list[Factor], keys: Axis, product: Axes) -> list[Factor]:
    """Return the loops over heads: those inside a row of what is stored in rows.

    Where nothing is, as for inputs that come with heads apart, it is every axis but the first,
    or, where batch and heads share one axis, every loop but the first.
    """
    rows = {"q": min((f.stride("q") for f in length if f.stride("q")), default=0)}
    for name in ("k", "v"):
        rows[name] = min((f.stride(name) for f in keys if f.stride(name)), default=0)
    found = [f for f in rest if any(0 < f.stride(n) < row for n, row in rows.items())]
    if found:
        return found
    first = max((f.stride("s") for f in rest), default=0)
    if len(product) > 3:
        first = prod(map(size_of, product[1:]))
    return [f for f in rest if f.stride("s") < first]


def _among(factor: Factor, some: Iterable[Factor]) -> bool:
    return any(factor is f for f in some)


def _restore(y: relax.Expr, stored: list[Factor], wanted: list[Factor], call) -> relax.Expr:
    """Bring the kernel's rows into the order of the graph."""
    order = [next(i for i, f in enumerate(stored) if f is g) for g in wanted]
    y = R.permute_dims(R.reshape(y, tuple(f.size for f in stored)), order)
    return R.reshape(y, compat.static_shape(call))


def _mask(mask: relax.Expr | None, shape: tuple[int, ...], sizes: tuple[int, int]):
    """Return (kind, dims that vary, mask tensor) for the kernel."""
    if mask is None:
        return "none", (), None
    batch, heads, queries, keys = shape
    if (heads, queries) == (1, 1) and batch == sizes[0]:
        return "keys", ("batch",), R.reshape(mask, (batch, keys))
    names = ("batch", "heads", "queries")
    dims = tuple(n for n, m in zip(names, shape, strict=False) if m > 1)
    return "full", dims, R.reshape(mask, shape)
