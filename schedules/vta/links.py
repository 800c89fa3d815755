"""How the result of one product becomes the input of the next without leaving VTA.

The int8 result is stored to DRAM and loaded again, tile by tile, so features that move as whole
tiles cost nothing: either the store or the load strides. Features that move between tiles as in a
16 x 16 transposition go through the matrix unit: sixteen tiles, stored side by side, are loaded
again as one weight tile, whose column c is the product with the c-th row of the identity.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from tvmstruct.ops import Array
from tvmstruct.schedules.vta.pack import Packed

MOST_PIECES = 16


@dataclass(frozen=True)
class Piece:
    """Groups ``first`` to ``first + count - 1`` of a product, whose tiles lie at even steps.

    ``x`` and ``y`` are the first tile and the steps between groups and between inputs (outputs).
    """

    first: int
    count: int
    x: tuple[int, int, int]
    y: tuple[int, int, int]


@dataclass(frozen=True, eq=False)
class Transposition:
    """Blocks of sixteen tiles that become as many others: block q, lane c goes to ``to[q, c]``."""

    to: Array  # (blocks, lanes)
    row: int  # tiles of a row before it, a multiple of sixteen, and
    row_after: int


@dataclass(frozen=True, eq=False)
class Link:
    """Where a product stores its tiles (g, m) in a row and where the next finds its own (g, k)."""

    y: Array
    x: Array
    row: int  # tiles of a row of what is stored
    transposition: Transposition | None = None


def even(positions: Array) -> tuple[int, ...] | None:
    """Return the first position and the step along each axis, None where steps differ."""
    first = int(positions.flat[0])
    steps = [
        int(np.take(positions, 1, axis).flat[0]) - first if extent > 1 else 0
        for axis, extent in enumerate(positions.shape)
    ]
    grids = np.indices(positions.shape)
    expected = first + sum(grid * step for grid, step in zip(grids, steps, strict=True))
    if min(steps, default=0) < 0 or not np.array_equal(expected, positions):
        return None
    return (first, *steps)


def pieces(x: Array, y: Array) -> list[Piece]:
    """Cut the groups of a product with tiles at ``x`` (g, k) and ``y`` (g, m) into even runs."""
    found: list[Piece] = []
    first, groups = 0, len(x)
    while first < groups:
        count = next(
            c
            for c in range(groups - first, 0, -1)
            if even(x[first : first + c]) and even(y[first : first + c])
        )
        at = slice(first, first + count)
        found.append(Piece(first, count, even(x[at]), even(y[at])))  # pyright: ignore
        first += count
    return found


def natural(packed: Packed) -> tuple[Array, Array]:
    """Return positions (g, k) and (g, m) in the order of the tiles."""
    _, m, k = packed.w.shape[:3]
    g = packed.groups
    return np.arange(g * k).reshape(g, k), np.arange(g * m).reshape(g, m)


def link(a: Packed, index: Array, b: Packed, block: int, batch: int) -> Link | None:
    """Return how feature ``index[j]`` of ``a`` reaches input j of ``b``, None if it cannot."""
    if (index < 0).any():
        return None
    columns = a.y_columns[index]
    tiles = b.groups * b.w.shape[2]
    source = np.full((tiles, block), -1)
    lanes = np.full((tiles, block), -1)
    source[b.x_columns // block, b.x_columns % block] = columns // block
    lanes[b.x_columns // block, b.x_columns % block] = columns % block
    if (source < 0).all(axis=1).any():
        return None
    return _tilewise(a, b, source, lanes) or (
        _transposed(a, b, source, lanes) if batch == 1 else None
    )


def _tilewise(a: Packed, b: Packed, source: Array, lanes: Array) -> Link | None:
    used = source >= 0
    one = source.max(axis=1)
    in_place = (lanes == np.arange(lanes.shape[1])) | ~used
    if not (in_place.all() and ((source == one[:, None]) | ~used).all()):
        return None
    x_natural, _ = natural(b)
    _, y_natural = natural(a)
    found = [Link(y_natural, one.reshape(x_natural.shape), y_natural.size)]
    if len(set(one.tolist())) == len(one):
        y = np.full(y_natural.size, -1)
        y[one] = np.arange(len(one))
        y[y < 0] = len(one) + np.arange((y < 0).sum())
        found.append(Link(y.reshape(y_natural.shape), x_natural, y_natural.size))
    return _simplest(a, b, found)


def _simplest(a: Packed, b: Packed, found: list[Link]) -> Link | None:
    def count(option: Link) -> int:
        return len(pieces(natural(a)[0], option.y)) + len(pieces(option.x, natural(b)[1]))

    best = min(found, key=count)
    return best if count(best) <= MOST_PIECES else None


def _transposed(a: Packed, b: Packed, source: Array, lanes: Array) -> Link | None:
    block = source.shape[1]
    lane = lanes.max(axis=1)
    if not ((lanes == lane[:, None]) | (source < 0)).all():
        return None
    rows, number = np.unique(source, axis=0, return_inverse=True)
    number = number.reshape(-1)
    order = np.argsort([int(np.argmax(number == q)) for q in range(len(rows))])
    rows, number = rows[order], np.argsort(order)[number]
    count = int(lane.max()) + 1
    to = np.full((len(rows), count), -1)
    to[number, lane] = np.arange(len(source))
    if (to < 0).any() or len(source) != to.size:
        return None
    flat = rows.reshape(-1)
    taken = flat[flat >= 0]
    if len(set(taken.tolist())) != len(taken):
        return None
    x_natural, _ = natural(b)
    _, y_natural = natural(a)
    y = np.full(y_natural.size, -1)
    y[taken] = np.flatnonzero(flat >= 0)
    rest = y < 0
    y[rest] = flat.size + np.arange(rest.sum())
    row = -(-(int(y.max()) + 1) // block) * block
    row = max(row, flat.size)
    move = Transposition(to, row, x_natural.size)
    return _simplest(a, b, [Link(y.reshape(y_natural.shape), x_natural, row, move)])
