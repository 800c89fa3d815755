"""Operators as packed weight tiles, and where features lie in the tiles of x and y."""

from __future__ import annotations

from dataclasses import dataclass
from functools import singledispatch

import numpy as np

from tvmstruct import ops
from tvmstruct.errors import VtaError
from tvmstruct.ops import Array
from tvmstruct.schedules.compute.tile_matmul import TileShape
from tvmstruct.vta.config import Config


@dataclass(frozen=True, eq=False)
class Packed:
    """One factor: ``w`` (groups or 1, m, k, out, in) int8, and the column of every feature.

    Column c of x is in tile ``c // block`` of the tiles (g, k) of a row, counted in that order.
    """

    w: Array
    groups: int
    x_columns: Array  # (n_in,)
    y_columns: Array  # (n_out,)

    def shape(self, rows: int) -> TileShape:
        """Return the counts of tiles for so many rows of tiles."""
        count, m, k = self.w.shape[:3]
        return TileShape(rows, self.groups, m, k, shared=count == 1 and self.groups > 1)

    def spread(self, values: Array, config: Config) -> Array:
        """Return int32 tiles (g, m, batch, out) of a value for each output feature."""
        tiles = np.zeros(self.groups * self.w.shape[1] * config.block_out, np.int32)
        tiles[self.y_columns] = values
        tiles = tiles.reshape(self.groups, -1, 1, config.block_out)
        return np.repeat(tiles, config.batch, axis=2)


@singledispatch
def pack(op: ops.Op, config: Config, *, join: bool = True) -> Packed:
    """Return the tiles of an operator whose arrays are int8.

    Blocks smaller than a tile are joined in one, or with ``join`` False padded each.

    Raises VtaError for one that is not a single product with a matrix or with blocks.
    """
    raise VtaError(
        f"VTA: {type(op).__name__} is no product with a matrix or with diagonal blocks; "
        "compile a chain of them, or its parts"
    )


@pack.register
def _(op: ops.Dense, config: Config, *, join: bool = True) -> Packed:
    return _blocks(op.w[None], 1, config, join)


@pack.register
def _(op: ops.BlockDiag, config: Config, *, join: bool = True) -> Packed:
    return _blocks(op.w, op.w.shape[0], config, join)


@pack.register
def _(op: ops.SharedBlockDiag, config: Config, *, join: bool = True) -> Packed:
    return _blocks(op.w[None], op.blocks, config, join)


def pack_diagonals(v: Array, config: Config) -> Packed:
    """Return the tiles (groups, i, j, batch, out) of ``y_i = sum_j v[j, i] * x_j``, v int8.

    ``v`` is (j, i, lanes), and x_j and y_i have as many lanes, whole tiles of them.
    """
    j, i, lanes = v.shape
    block = config.block_out
    groups = lanes // block
    tiles = v.reshape(j, i, groups, 1, block).transpose(2, 1, 0, 3, 4)
    lane = np.arange(lanes)

    def columns(count: int) -> Array:
        tile = lane // block * count + np.arange(count)[:, None]
        return (tile * block + lane % block).reshape(-1)

    w = np.ascontiguousarray(np.repeat(tiles, config.batch, axis=3))
    return Packed(w, groups, columns(j), columns(i))


def _blocks(w: Array, groups: int, config: Config, joins: bool) -> Packed:
    """Return diagonal blocks (groups or 1, p, q), small ones joined if it pays and ``joins``."""
    if w.dtype != np.int8:
        raise VtaError(f"VTA: weights of {w.dtype}; want int8, is quantisation missing?")
    _, p, q = w.shape
    block = config.block_in
    options = _divisors(groups, block) if joins else [1]
    join = min(options, key=lambda s: (_tile_ops(groups, s, p, q, block), s))
    shared = w.shape[0] == 1
    pieces = w if not shared else np.repeat(w, join, axis=0)
    joined = np.zeros((1 if shared else groups // join, join, p, join, q), np.int8)
    diagonal = np.arange(join)
    joined[:, diagonal, :, diagonal, :] = pieces.reshape(-1, join, p, q).swapaxes(0, 1)
    joined = joined.reshape(-1, join * p, join * q)
    depth, width = (-(-side // block) * block for side in joined.shape[1:])
    padded = np.zeros((len(joined), depth, width), np.int8)
    padded[:, : join * p, : join * q] = joined
    tiles = padded.reshape(-1, depth // block, block, width // block, block)
    return Packed(
        np.ascontiguousarray(tiles.transpose(0, 3, 1, 4, 2)),
        groups // join,
        _columns(groups // join, join * p, depth),
        _columns(groups // join, join * q, width),
    )


def _divisors(of: int, most: int) -> list[int]:
    return [d for d in range(1, min(of, most) + 1) if of % d == 0]


def _tile_ops(groups: int, join: int, p: int, q: int, block: int) -> int:
    return groups // join * -(-join * p // block) * -(-join * q // block)


def _columns(groups: int, used: int, width: int) -> Array:
    return (np.arange(groups)[:, None] * width + np.arange(used)).reshape(-1)
