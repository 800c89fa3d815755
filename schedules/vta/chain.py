"""Chains of products in one launch: what each stage reads and writes, and what lies between."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from tvmstruct import ops
from tvmstruct.errors import VtaError
from tvmstruct.ops import Array
from tvmstruct.schedules.compute.tile_matmul import TileShape
from tvmstruct.schedules.registry import Pick
from tvmstruct.schedules.vta.launches import Place, Recorded, Reserved, Stage, record_stages
from tvmstruct.schedules.vta.links import Link, Transposition, even, link, natural, pieces
from tvmstruct.schedules.vta.nest import choose_mix, choose_nest
from tvmstruct.schedules.vta.pack import Packed, pack, pack_diagonals
from tvmstruct.schedules.vta.requantise import NONE, Requantise
from tvmstruct.vta.config import Config, Memory
from tvmstruct.vta.launch import Launch, Tiles

EYE = "eye"


@dataclass(frozen=True, eq=False)
class Product:
    """``y = requantise(x @ op)`` of int8, where ``index`` says which features of the step before.

    ``index`` (n_in,) is None where they come in order.
    """

    op: ops.Op
    after: Requantise
    index: Array | None = None
    diagonals: Array | None = None  # (j, i, lanes): op in the vector ALU instead


@dataclass(eq=False)
class Chain:
    """Builds the stages of a launch."""

    products: Sequence[Product]
    rows: int
    config: Config
    pick: Pick
    stages: list[Stage] = field(default_factory=list)
    regions: list[Reserved] = field(default_factory=list)
    constants: dict[str, Array] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.n = -(-self.rows // self.config.batch)
        for self.joined in (True, False):
            self.packed = _packed(self.products, self.config, self.joined)
            links = [self._link(i) for i in range(1, len(self.products))]
            self.links = [found for found in links if found is not None]
            if len(self.links) == len(links):
                return
        i = links.index(None)
        raise VtaError(
            f"VTA chain: the features between {self.products[i].op} and "
            f"{self.products[i + 1].op} move in a way that neither whole tiles nor transpositions "
            f"of {self.config.block_in} tiles make; take one launch for each"
        )

    def _link(self, i: int) -> Link | None:
        a, b = self.packed[i - 1], self.packed[i]
        index = self.products[i].index
        index = np.arange(self.products[i].op.n_in) if index is None else index
        return link(a, index, b, self.config.block_in, self.config.batch)

    def launch(self, name: str, x_columns: Array, y_columns: Array) -> Launch:
        """Record the chain; features lie at ``x_columns`` and ``y_columns`` of tiled rows."""
        first, last = natural(self.packed[0])[0], natural(self.packed[-1])[1]
        block = self.config.block_in
        x_row = max(first.size, int(x_columns.max()) // block + 1)
        self._reserve("x", self.n * x_row)
        x, x_at = ("x", x_row), first
        for i, joint in enumerate((*self.links, None)):
            y, y_row = ("y", last.size) if joint is None else (f"t{i}", joint.row)
            self._reserve(y, self.n * y_row)
            self._product(i, x, (y, y_row), x_at, last if joint is None else joint.y)
            x, x_at = (y, y_row), last if joint is None else joint.x
            if joint is not None and joint.transposition is not None:
                x = self._transpose(i, y, joint.transposition)
        recorded = self.record()
        return recorded.launch(
            name,
            self.config,
            Tiles("x", self.rows, len(x_columns), (x_row, 1), x_columns),
            Tiles("y", self.rows, len(y_columns), (last.size, 1), y_columns),
            self.constants,
        )

    def record(self) -> Recorded:
        """Return the stream."""
        return record_stages(tuple(self.stages), tuple(self.regions), self.config)

    def _product(
        self, i: int, x: tuple[str, int], y: tuple[str, int], x_at: Array, y_at: Array
    ) -> None:
        """Add the stages of a product between regions (name, tiles of a row)."""
        packed, after = self.packed[i], self.products[i].after
        epilogue = after.epilogue
        for number, piece in enumerate(pieces(x_at, y_at)):
            at = slice(piece.first, piece.first + piece.count)
            shared = len(packed.w) == 1 and packed.groups > 1
            name = f"w{i}.{number}"
            memory = Memory.WGT if self.products[i].diagonals is None else Memory.ACC8
            self._constant(name, memory, packed.w if shared else packed.w[at])
            for operand in epilogue.operands:
                tiles = packed.spread(after.operand(operand), self.config)[at]
                self._constant(f"{name}.{operand}", Memory.ACC, tiles)
            m, k = packed.w.shape[1:3]
            mixes = self.products[i].diagonals is not None
            shape = TileShape(self.n, piece.count, m, k, shared=shared and piece.count > 1)
            x_place = Place(x[0], piece.x[0], (x[1], *piece.x[1:]))
            y_place = Place(y[0], piece.y[0], (y[1], *piece.y[1:]))
            choose = choose_mix if mixes else choose_nest
            nest = choose(shape, epilogue, self.config, self._picker())
            self.stages.append(Stage(shape, nest, epilogue, x_place, name, y_place, mixes=mixes))

    def _transpose(self, i: int, source: str, move: Transposition) -> tuple[str, int]:
        """Add the stages of a transposition; returns the region of its result."""
        block = self.config.block_in
        if EYE not in self.constants:
            self._constant(EYE, Memory.INP, np.eye(block, dtype=np.int8))
        target = f"{source}.t"
        self._reserve(target, self.n * move.row_after)
        blocks = move.row // block
        to = np.arange(self.n)[:, None, None] * move.row_after + move.to
        whole = _even_blocks(to) if blocks == len(move.to) else None
        parts = [(0, to)] if whole else [(r * blocks, to[r : r + 1]) for r in range(self.n)]
        for first, rows in parts:
            found = _even_blocks(rows)
            if found is None:
                raise VtaError("VTA chain: a transposition whose tiles do not lie at even steps")
            (g, m), (base, per_g, per_m, per_lane) = found
            shape = TileShape(rows.shape[2], g, m, 1)
            nest = choose_nest(shape, NONE, self.config, self._picker())
            x = Place(EYE, 0, (1, 0, 0))
            y = Place(target, base, (per_lane, per_g, per_m))
            self.stages.append(Stage(shape, nest, NONE, x, source, y, w_first=first))
        return target, move.row_after

    def _picker(self) -> Pick:
        stage = len(self.stages)
        if not stage:
            return self.pick
        return lambda name, options, default: self.pick(f"{name}.{stage}", options, default)

    def _reserve(self, name: str, tiles: int) -> None:
        self.regions.append(Reserved(name, Memory.INP, tiles, constant=False))

    def _constant(self, name: str, memory: Memory, array: Array) -> None:
        tiles = array.nbytes // self.config.tile_bytes(memory)
        self.regions.append(Reserved(name, memory, tiles, constant=True))
        self.constants[name] = array


def _packed(products: Sequence[Product], config: Config, join: bool) -> list[Packed]:
    """Return the tiles of all products; dense ones follow the layout of blocks beside them."""
    found = [
        pack(p.op, config, join=join)
        if p.diagonals is None
        else pack_diagonals(p.diagonals, config)
        for p in products
    ]
    dense = [isinstance(p.op, ops.Dense) for p in products]
    for i in range(len(products) - 1):
        a, b = products[i].op, products[i + 1].op
        if products[i + 1].index is not None or dense[i] == dense[i + 1]:
            continue
        if isinstance(a, ops.Dense):
            columns = found[i + 1].x_columns
            wide = np.zeros((a.n_in, int(columns.max()) + 1), np.int8)
            wide[:, columns] = a.w
            found[i] = replace(pack(ops.Dense(wide), config), y_columns=columns)
        elif isinstance(b, ops.Dense):
            columns = found[i].y_columns
            tall = np.zeros((int(columns.max()) + 1, b.n_out), np.int8)
            tall[columns] = b.w
            found[i + 1] = replace(pack(ops.Dense(tall), config), x_columns=columns)
    return found


def _even_blocks(to: Array) -> tuple[tuple[int, int], tuple[int, ...]] | None:
    """Return groups and columns that blocks (rows, blocks, lanes) make at even steps, and these."""
    count = to.shape[0] * to.shape[1]
    for g in (d for d in range(1, count + 1) if count % d == 0):
        if found := even(to.reshape(g, count // g, to.shape[2])):
            return (g, count // g), found
    return None


def fold(products: Sequence[Product]) -> list[Product]:
    """Move the order of features into the weights of dense neighbours, where it costs nothing."""
    found: list[Product] = []
    for product in products:
        before = found[-1] if found else None
        index = product.index
        if before is not None and index is not None and isinstance(before.op, ops.Dense):
            found[-1] = _moved(before, index)
            product = replace(product, index=None)
        elif before is not None and index is not None and isinstance(product.op, ops.Dense):
            w = _scattered(product.op.w, index, before.op.n_out)
            product = product if w is None else replace(product, op=ops.Dense(w), index=None)
        found.append(product)
    return found


def _moved(product: Product, index: Array) -> Product:
    """Return a dense product whose output j is its output ``index[j]``, zero for -1."""
    there = index >= 0
    op, after = product.op, product.after
    assert isinstance(op, ops.Dense)
    w = np.where(there, op.w[:, index], 0).astype(np.int8)
    bias = np.where(there, after.bias[index], 0).astype(np.int32)
    return replace(
        product, op=ops.Dense(w), after=replace(after, bias=bias, shift=after.shift[index])
    )


def _scattered(w: Array, index: Array, n_in: int) -> Array | None:
    """Return weights that read feature ``index[j]`` in the place of j, None if one is twice."""
    there = index >= 0
    if len(set(index[there].tolist())) != there.sum():
        return None
    found = np.zeros((n_in, w.shape[1]), np.int8)
    found[index[there]] = w[there]
    return found
