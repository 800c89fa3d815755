"""What a LookupFFN layer costs beside the feed-forward block that it replaces.

Memory, FLOPs as Tables 1 to 4 of the paper count them, bytes by level of the memory and their
energy.  A layer needs *more* memory than the dense block, for fewer FLOPs: whether that pays is
decided by the level from which its tables are read.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from tvmstruct.caches import Caches
from tvmstruct.energy import Energy, Traffic, add_up, at, operands
from tvmstruct.errors import InputError
from tvmstruct.lookup import MOST_BITS, Lookup, entries
from tvmstruct.ops import next_power_of_two

if TYPE_CHECKING:
    from collections.abc import Iterator

ORDERS = ("table-major", "row-major")
FLOAT, CODE = 4, 8  # bytes of an activation; of a code and its score
PAIRS = 4  # block-diagonal matrices and Hadamard transforms of BH4


@dataclass(frozen=True)
class Projection:
    """The hash: ``flops`` of a token, ``macs`` of those with weights, and ``params`` stored."""

    flops: int
    macs: int
    params: int

    @classmethod
    def dense(cls, n_in: int, bits: int) -> Projection:
        """Return a matrix from n_in features to all bits."""
        return cls(2 * n_in * bits, n_in * bits, n_in * bits)

    @classmethod
    def bh4(cls, n_in: int, bits: int, block: int) -> Projection:
        """Return BH4 of block size ``block``: ceil(bits / d') repeats on d' padded features.

        A repeat has four block-diagonal matrices, 8 d' b FLOPs, and four Hadamard transforms,
        4 d' log2(d') additions.
        """
        width = next_power_of_two(n_in)
        if block < 1 or width % block:
            raise InputError(f"BH4: block size {block} does not divide {width} padded features")
        repeats, stored = -(-bits // width), PAIRS * width * block
        additions = PAIRS * width * (width.bit_length() - 1)
        return cls(repeats * (2 * stored + additions), repeats * stored, repeats * stored)


@dataclass(frozen=True, kw_only=True)
class TableSize:
    """Sizes of the tables: h of 2^tau rows x n_out, an element of ``item`` bytes.

    A token takes of each table the rows whose code differs in at most ``flips`` bits from its.
    """

    h: int
    tau: int
    n_out: int
    item: int = 4
    flips: int = 0

    def __post_init__(self) -> None:
        least = min(self.n_out, self.h, self.tau, self.item)
        if least < 1 or self.tau > MOST_BITS or not 0 <= self.flips <= self.tau:
            raise InputError(
                f"lookup: {self.h} tables of 2^{self.tau} rows x {self.n_out} of {self.item} "
                f"bytes, {self.flips} flips; want sizes of 1 or more, at most {MOST_BITS} bits "
                "and flips of 0 to tau"
            )

    @property
    def rows(self) -> int:
        """Rows that a token takes of all tables."""
        return self.h * entries(self.tau, self.flips)

    @property
    def table_bytes(self) -> int:
        """Bytes of all tables."""
        return self.h * (1 << self.tau) * self.n_out * self.item

    @property
    def gather_flops(self) -> int:
        """FLOPs of the weighted sum of rows for a token."""
        return 2 * self.rows * self.n_out


@dataclass(frozen=True, kw_only=True)
class LookupSize(TableSize):
    """Sizes of a layer: tables, the projection of ``n_in`` features, and the dense block.

    ``hidden`` is the inner size of the block that it replaces, four times n_in if not given.
    """

    n_in: int
    projection: Projection
    hidden: int = 0

    @classmethod
    def of(cls, layer: Lookup, *, item: int = 4, hidden: int = 0) -> LookupSize:
        """Return the sizes of a layer."""
        op = layer.projection
        projection = Projection(2 * op.macs + op.adds, op.macs, op.params)
        return cls(
            n_in=layer.n_in, n_out=layer.n_out, h=layer.h, tau=layer.tau,
            projection=projection, item=item, flips=layer.flips, hidden=hidden,
        )  # fmt: skip

    @property
    def inner(self) -> int:
        """Hidden features of the dense block."""
        return self.hidden or 4 * self.n_in

    @property
    def dense_macs(self) -> int:
        """Multiply-adds of the dense block for a token, and the weights it has."""
        return self.inner * (self.n_in + self.n_out)

    @property
    def hash_flops(self) -> int:
        """FLOPs of the projection for a token."""
        return self.projection.flops

    @property
    def flops(self) -> int:
        """FLOPs of a token in all."""
        return self.hash_flops + self.gather_flops


@dataclass(frozen=True, kw_only=True)
class Walk:
    """How tables are walked: "table-major" lets a chunk of tokens pass over a slice of columns.

    The slice of ``group`` tables stays in cache meanwhile, and a token's sums in registers.
    "row-major" takes a token's whole rows, one after the other.
    """

    order: str = "table-major"
    columns: int = 32
    group: int = 8
    chunk: int = 4096

    def __post_init__(self) -> None:
        if self.order not in ORDERS or min(self.columns, self.group, self.chunk) < 1:
            raise InputError(f"{self}: want an order of {', '.join(ORDERS)} and sizes of 1 or more")


@dataclass(frozen=True)
class LookupCost:
    """A layer and the dense block it replaces on so many tokens: bytes moved, and energy."""

    size: LookupSize
    tokens: int
    caches: Caches
    walk: Walk
    hash: Traffic
    gather: Traffic
    dense: Traffic

    @property
    def traffic(self) -> Traffic:
        """Bytes of the layer in all."""
        return self.hash + self.gather

    @property
    def energy(self) -> Energy:
        """Energy of the layer."""
        return self.traffic.energy

    @property
    def stored(self) -> int:
        """Bytes of tables and projection."""
        return self.size.table_bytes + FLOAT * self.size.projection.params

    @property
    def dense_stored(self) -> int:
        """Bytes of the dense block's weights, in elements of the size of the tables'."""
        return self.size.dense_macs * self.size.item

    def lines(self) -> Iterator[str]:
        """Yield what a report says of the layer."""
        size, tables = self.size, self.size.table_bytes
        ratio = self.stored / self.dense_stored
        more = (
            f"{ratio:.1f} times the memory of" if ratio >= 1 else f"{1 / ratio:.1f} times less than"
        )
        home = self.caches.holding(tables, split=False)
        yield (
            f"{size.h} tables of {1 << size.tau} x {size.n_out}: {self.stored / 1e6:.1f} MB, "
            f"{more} the dense block's {self.dense_stored / 1e6:.1f} MB; tables in {home}"
        )
        yield (
            f"{size.flops / 1e6:.2f} MFLOP a token (hash {size.hash_flops / 1e6:.2f}, gather "
            f"{size.gather_flops / 1e6:.2f}); dense {2 * size.dense_macs / 1e6:.2f}"
        )
        yield f"energy of {self.tokens} tokens: {self.energy}; dense {self.dense.energy}"


def memory_line(size: TableSize, stored: int, dense: int, caches: Caches) -> str:
    """Return what tables take beside the weights of a dense block, and where they are read."""
    ratio = stored / dense
    more = f"{ratio:.1f} times the memory of" if ratio >= 1 else f"{1 / ratio:.1f} times less than"
    return (
        f"{size.h} tables of {1 << size.tau} x {size.n_out}: {stored / 1e6:.1f} MB, {more} "
        f"the dense block's {dense / 1e6:.1f} MB; tables in {caches.holding(size.table_bytes)}"
    )


def lookup_cost(
    size: LookupSize, tokens: int, caches: Caches, walk: Walk | None = None
) -> LookupCost:
    """Return what ``tokens`` tokens cost, in steady state, all codes of a table as likely."""
    if tokens < 1:
        raise InputError(f"lookup_cost: tokens is {tokens}, want 1 or more")
    walk = walk or Walk()
    return LookupCost(
        size, tokens, caches, walk,
        _hash(size, tokens, caches),
        gather_traffic(size, tokens, caches, walk),
        dense_traffic(size, tokens, caches),
    )  # fmt: skip


def gather_traffic(size: TableSize, tokens: int, caches: Caches, walk: Walk) -> Traffic:
    """Return the bytes of the weighted sum of rows: tables, sums, codes and the result."""
    gather = _sliced if walk.order == "table-major" else _row_by_row
    return gather(size, tokens, caches, walk)


def dense_traffic(size: LookupSize, tokens: int, caches: Caches) -> Traffic:
    """Return the bytes of ``W_2 activation(W_1 x)``; hidden features stay with a block of rows."""
    weights = size.dense_macs * size.item
    hidden = FLOAT * size.inner
    outside = (_activation(tokens * n * FLOAT, caches) for n in (size.n_in, size.n_out))
    return add_up(
        [
            at(caches.holding(weights, split=True), weights),
            at(caches.holding(min(tokens, 128) * hidden), 2 * tokens * hidden),
            operands(tokens * size.dense_macs, size.item),
            *outside,
        ]
    )


def distinct_rows(tau: int, draws: int) -> float:
    """Return how many rows of a table ``draws`` codes are expected to name, all as likely."""
    rows = 1 << tau
    return rows * -math.expm1(draws * math.log1p(-1 / rows)) if rows > 1 else 1.0


def _hash(size: LookupSize, tokens: int, caches: Caches) -> Traffic:
    """Return the bytes of the projection: weights, features, bits, and operands of products."""
    weights = FLOAT * size.projection.params
    return add_up(
        [
            at(caches.holding(weights, split=True), weights),
            _activation(tokens * size.n_in * FLOAT, caches),
            _activation(tokens * size.h * size.tau * FLOAT, caches, times=2),
            operands(tokens * size.projection.macs),
        ]
    )


def _row_by_row(size: TableSize, tokens: int, caches: Caches, walk: Walk) -> Traffic:
    """Every row comes from wherever it happens to be; sums stay in the first level."""
    read = float(tokens) * size.rows * size.n_out * size.item
    shares = caches.shares(size.table_bytes)
    rows = Traffic({level: read * share for level, share in shares.items() if share})
    sums = at(caches.holding(size.n_out * FLOAT), 2.0 * tokens * size.rows * size.n_out * FLOAT)
    return rows + sums + _activation(tokens * size.n_out * FLOAT, caches)


def _sliced(size: TableSize, tokens: int, caches: Caches, walk: Walk) -> Traffic:
    """Rows come from the slice in cache, which is filled once for every chunk of tokens."""
    chunk, columns = min(tokens, walk.chunk), min(walk.columns, size.n_out)
    chunks, slices = -(-tokens // chunk), -(-size.n_out // columns)
    each = entries(size.tau, size.flips)
    wide = slices * columns
    hot = caches.holding(min(walk.group, size.h) * (1 << size.tau) * columns * size.item)
    home = caches.holding(size.table_bytes, split=True)
    touched = distinct_rows(size.tau, chunk * each) * size.h * wide * size.item
    filled = at(home, chunks * touched) if home != hot else Traffic()
    sums = 2.0 * tokens * -(-size.h // walk.group) * wide * FLOAT
    codes = float(tokens) * size.rows * CODE
    return add_up(
        [
            at(hot, float(tokens) * size.rows * wide * size.item),
            filled,
            at(caches.holding(chunk * columns * FLOAT), sums),
            at(caches.holding(chunk * size.rows * CODE), (slices + 1) * codes),
            _activation(tokens * size.n_out * FLOAT, caches),
        ]
    )


def _activation(size: float, caches: Caches, times: int = 1) -> Traffic:
    return at(caches.holding(size, split=True), times * size)
