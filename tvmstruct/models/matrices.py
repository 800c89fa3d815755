"""Products with matrices and rows of tables in the form that a model stores them in."""

from __future__ import annotations

import math

from tvmstruct.models.graph import GraphBuilder


def multiply(
    graph: GraphBuilder,
    x: str,
    name: str,
    n_in: int,
    n_out: int,
    *,
    axes: int = 2,
    gain: float = 1.0,
) -> str:
    """Return ``x @ W`` for x of ``axes`` axes and then n_in features; it varies ``gain`` as much.

    Dense: ``name.weight`` (n_in, n_out).  As a sum of Kronecker products: ``name.weight.b``
    (n2, m2 r), the terms of an entry side by side, and ``name.weight.a`` (r n1, m1), one term
    below the other.  Features are read as n1 x n2; B multiplies along the n2, A along the n1.
    """
    form, weight = graph.form, f"{name}.weight"
    factors = form.matrix(n_in, n_out)
    if factors is None:
        dense = graph.weight(weight, n_in, n_out, std=gain / math.sqrt(n_in))
        return graph.op("MatMul", x, dense)
    ((n1, m1), (n2, m2)), r = factors, form.r
    std = math.sqrt(gain) * (n_in * r) ** -0.25  # r products of two vary as an entry of W does

    def shaped(value: str, *sizes: int) -> str:
        return graph.op("Reshape", value, _kept(graph, axes, *sizes))

    def moved(value: str, *order: int) -> str:
        return graph.op("Transpose", value, perm=[*range(axes), *(axes + i for i in order)])

    x = shaped(_padded(graph, x, n_in, n1 * n2, axes), n1, n2)
    x = graph.op("MatMul", x, graph.weight(f"{weight}.b", n2, m2 * r, std=std))
    x = shaped(moved(shaped(x, n1, m2, r), 1, 2, 0), m2, r * n1)
    x = graph.op("MatMul", x, graph.weight(f"{weight}.a", r * n1, m1, std=std))
    return _cropped(graph, shaped(moved(x, 1, 0), m1 * m2), m1 * m2, n_out)


def look_up(
    graph: GraphBuilder, ids: str, name: str, rows: int, width: int, *, std: float = 1.0
) -> str:
    """Return rows ``ids`` (batch, length) of a table of words, (batch, length, width).

    Dense: ``name`` (rows, width).  As word2ketXS: factors ``name.0``, ``name.1`` and so on of
    (t, q, r), the last of (t, r, q); the digits of an id in base t choose a row of each.
    """
    sides = graph.form.table(rows, width)
    if sides is None:
        return graph.op("Gather", _table(graph, name, rows, width, std=std), ids)
    (t, q), order, r = sides, graph.form.order, graph.form.r_embedding
    each = (std / math.sqrt(r)) ** (1 / order)
    digits = [_digit(graph, ids, t, t ** (order - 1 - j)) for j in range(order)]

    def chosen(j: int, *shape: int) -> str:
        return graph.op("Gather", _table(graph, f"{name}.{j}", *shape, std=each), digits[j])

    x, done = chosen(0, t, q, r), q
    for j in range(1, order - 1):
        left = graph.op("Unsqueeze", x, graph.constant([-2]))  # (..., done, 1, r)
        right = graph.op("Unsqueeze", chosen(j, t, q, r), graph.constant([-3]))
        x, done = graph.op("Mul", left, right), done * q
        x = graph.op("Reshape", x, _kept(graph, 2, done, r))
    x = graph.op("MatMul", x, chosen(order - 1, t, r, q))
    x = graph.op("Reshape", x, _kept(graph, 2, done * q))
    return _cropped(graph, x, done * q, width)


def _table(graph: GraphBuilder, name: str, *shape: int, std: float) -> str:
    """Declare a table, which source and target may share."""
    return name if name in graph.weights else graph.weight(name, *shape, std=std)


def _digit(graph: GraphBuilder, ids: str, base: int, unit: int) -> str:
    """Return the digit of ``ids`` in base ``base`` that counts ``unit``; the first has no limit."""
    x = ids if unit == 1 else graph.op("Div", ids, graph.constant(unit))
    first = unit == base ** (graph.form.order - 1)
    return x if first else graph.op("Mod", x, graph.constant(base))


def _kept(graph: GraphBuilder, axes: int, *sizes: int) -> str:
    return graph.constant([*([0] * axes), *sizes])


def _padded(graph: GraphBuilder, x: str, n: int, width: int, axes: int) -> str:
    if n == width:
        return x
    return graph.op("Pad", x, graph.constant([*([0] * (2 * axes + 1)), width - n]))


def _cropped(graph: GraphBuilder, x: str, width: int, n: int) -> str:
    if n == width:
        return x
    return graph.op("Slice", x, *(graph.constant([v]) for v in (0, n, -1)))
