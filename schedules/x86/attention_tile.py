"""What a tile of queries is on x86, whichever way its scores lie in vectors.

One tile times one chunk of keys is all the score memory a thread needs. Chunk after chunk the
tile keeps a running maximum; what was accumulated under an older, smaller maximum is scaled down
(online softmax; NLP-Fast eq. 4 in a form that cannot overflow). The kernels around a tile say
where its operands and its result lie; `wide_tile` and `narrow_tile` say how it is computed.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from math import lcm

from tvm import tirx
from tvm.ir import Expr
from tvm.script.ir_builder import tirx as T

from tvmstruct.targets import Isa

FEW_QUERIES = 4  # up to so many, keys fill the vectors instead
CHUNK = 128  # keys per chunk: with a tile of 32 queries the scores fill half of a 32 KB cache
STREAMED = 8192  # keys from which on few queries wait for memory
STREAM = 4096  # keys per chunk then: prefetchers take a while to follow from k to v and back
STREAM_CHUNKS = 128  # at least

Index = Expr | int


@dataclass(frozen=True)
class View:
    """A matrix inside a buffer: element (r, c) is ``buffer[*lead, row + r, column + c]``.

    With a ``stride`` the buffer is flat, and rows lie that far apart.
    """

    buffer: tirx.Buffer
    row: Index = 0
    column: Index = 0
    lead: tuple = ()
    stride: int = 0

    def at(self, row: Index, column: Index, lanes: int = 1) -> list:
        """Return the index of ``lanes`` elements of a row."""
        if self.stride:
            return [ramp((self.row + row) * self.stride + self.column + column, lanes)]
        return [*self.lead, self.row + row, ramp(self.column + column, lanes)]

    def load(self, row: Index, column: Index, lanes: int = 1) -> Expr:
        """Return ``lanes`` elements of a row."""
        return self.buffer[*self.at(row, column, lanes)]

    def store(self, value: Expr, row: Index, column: Index, lanes: int = 1) -> None:
        """Write ``lanes`` elements of a row."""
        T.buffer_store(self.buffer, value, self.at(row, column, lanes))


@dataclass(frozen=True)
class Problem:
    """The static side of a tile. ``by_query`` says that the mask differs from query to query."""

    isa: Isa
    head_dim: int
    value_dim: int
    query_length: int
    key_length: int
    scale: float
    masked: bool = False
    by_query: bool = False
    causal: bool = False
    most_keys: int = CHUNK  # in a chunk
    skip: tuple[float, bool] | None = None  # threshold of weights that are zero, and whether raw
    in_parts: bool = False  # whether the sums are divided apart, even after a single chunk
    makes_values: bool = False  # once the weights of a chunk are known for all queries

    @property
    def lanes(self) -> int:
        """Queries in a vector: as few lanes as hold all queries."""
        return fewest_lanes(self.query_length, self.isa)

    @property
    def tile(self) -> int:
        """Queries in a full tile: two vectors, one where that holds all."""
        return self.lanes * (2 if self.query_length > self.lanes else 1)

    @property
    def key_tile(self) -> int:
        """Keys in a register tile; a divisor of the key length where one is near."""
        vectors = self.tile // self.lanes
        most = {32: {1: 12, 2: 12}, 16: {1: 12, 2: 6}}[self.isa.registers][vectors]
        if not self.isa.fma:
            most = most * 2 // 3  # a product needs a register of its own
        return near_divisor(self.key_length, most)

    @property
    def chunk(self) -> int:
        """Keys in a chunk: whole register tiles and transposed blocks, or whole vectors."""
        step = self.isa.lanes if self.narrow else lcm(self.key_tile, self.lanes)
        most = self.most_keys
        if self.streamed:  # threads of a large machine want their share of the chunks
            most = max(most, min(STREAM // self.query_length, self.key_length // STREAM_CHUNKS))
        chunks = -(-self.key_length // max(most, step))
        return -(-self.key_length // (chunks * step)) * step

    @property
    def chunks(self) -> int:
        """Chunks of all keys; the last may be ragged."""
        return -(-self.key_length // self.chunk)

    @property
    def one_chunk(self) -> bool:
        """Whether the running maximum is the maximum."""
        return self.chunk >= self.key_length and not self.in_parts

    @property
    def narrow(self) -> bool:
        """Whether a vector of queries would be mostly empty, and heads are whole vectors."""
        whole = not self.head_dim % self.isa.lanes and not self.value_dim % self.isa.lanes
        return self.query_length <= FEW_QUERIES and whole and not self.makes_values

    @property
    def streamed(self) -> bool:
        """Whether keys and values come from memory, once, rather than from a cache."""
        return self.narrow and self.key_length >= STREAMED


@dataclass(frozen=True)
class Operands:
    """Where a tile's operands lie, from its first query and the first key on.

    ``out`` (queries, value_dim) also holds the sums so far where there are several chunks. The
    mask has one row for all queries, or one for each where the problem says ``by_query``. ``best``
    (1, queries) are the largest scores that any thread has found so far, to skip by.
    """

    q: View
    k: View
    v: View
    out: View
    mask: View | None = None
    best: View | None = None


class Tile(ABC):
    """Attention of a few queries, ``at`` says where, to ranges of keys.

    ``top`` and ``total`` are the running maximum and sum of weights of each query.
    """

    problem: Problem
    at: Operands
    start: Index  # first query
    queries: int
    top: tirx.Buffer
    total: tirx.Buffer

    @abstractmethod
    def begin(self) -> None:
        """Start with no key seen."""

    @abstractmethod
    def add_chunk(self, key: Expr, count: Expr) -> None:
        """Add scores, softmax and weighted sum of ``count`` keys from ``key`` on."""

    def attend(self) -> None:
        """Emit the attention to all keys, from nothing to the divided result."""
        p = self.problem
        self.begin()
        if p.one_chunk:
            # The rows are never fewer, but LLVM does not know: it would unroll the loops over
            # keys, see constant indices, and take the scores for registers, which then spill.
            count = T.min(T.int64(p.key_length), self.at.k.buffer.shape[0])
            self.add_chunk(T.int64(0), count)
            return
        self.clear()
        self.add_chunks(T.int64(0), T.int64(p.chunks))
        self.divide()

    def clear(self) -> None:
        """Set the sums to zero."""
        with T.serial(0, self.queries) as i:
            for first, n in pieces(self.problem.value_dim, self.problem.isa.lanes):
                self.at.out.store(splat(0.0, n), i, first, n)

    def add_chunks(self, first: Expr, stop: Expr) -> None:
        """Add the chunks ``[first, stop)`` of keys."""
        p = self.problem
        if p.causal:  # later chunks are hidden from every query of the tile
            stop = T.min(stop, (self.start + (self.queries - 1 + p.chunk)) // p.chunk)
        with T.serial(first, stop) as c:
            count = T.min(T.int64(p.chunk), p.key_length - c * p.chunk)
            self.add_chunk(c * p.chunk, count)

    def divide(self) -> None:
        """Divide the sums by the sum of weights."""
        with T.serial(0, self.queries) as i:
            for first, n in pieces(self.problem.value_dim, self.problem.isa.lanes):
                self.finish(i, first, self.at.out.load(i, first, n), n)

    def finish(self, query: Index, first: int, value: Expr, lanes: int) -> None:
        """Divide by the sum of weights and store; a sum of zero means that all were -inf."""
        total = self.total[query]
        share = T.Select(total == T.float32(0), T.float32(0), T.float32(1) / total)
        hidden = spread(total == T.float32(0), lanes)
        scaled = T.Select(hidden, splat(0.0, lanes), value * spread(share, lanes))
        self.at.out.store(scaled, query, first, lanes)


def registers(lanes: int, count: int) -> list[tirx.Buffer]:
    """Return ``count`` vectors that LLVM keeps in registers (scope global, constant indices)."""
    return [T.alloc_buffer((lanes,), "float32", scope="global") for _ in range(count)]


def scratch(*shape: int) -> tirx.Buffer:
    """Allocate float32 memory of a thread."""
    return T.alloc_buffer(shape, "float32", scope="global")


def reduce_lanes(value: Expr, lanes: int, join: Callable[[Expr, Expr], Expr]) -> Expr:
    """Return a scalar from the lanes of a vector, joining one half with the other."""
    while lanes > 1:
        lanes //= 2
        (held,) = registers(2 * lanes, 1)
        T.buffer_store(held, value, [ramp(0, 2 * lanes)])
        value = join(held[ramp(0, lanes)], held[ramp(lanes, lanes)])
    return value


def fewest_lanes(count: int, isa: Isa) -> int:
    """Return the smallest vector that holds ``count`` values, at most a whole one."""
    return next((n for n in (4, 8) if count <= n <= isa.lanes), isa.lanes)


def pieces(width: int, lanes: int) -> list[tuple[int, int]]:
    """Split columns into vectors, (first, lanes) each: whole ones, then 8, 4 and 1."""
    found, first = [], 0
    for size in (n for n in (16, 8, 4, 1) if n <= lanes):
        while width - first >= size:
            found.append((first, size))
            first += size
    return found


def near_divisor(total: int, most: int) -> int:
    """Return the largest divisor of ``total`` in (most / 2, most], or ``most`` if none."""
    most = max(1, min(most, total))
    return next((n for n in range(most, most // 2, -1) if total % n == 0), most)


def ramp(first: Index, lanes: int) -> Index:
    """Return the indices of ``lanes`` neighbours."""
    return first if lanes == 1 else T.ramp(first, 1, lanes)


def splat(value: float, lanes: int) -> Expr:
    """Return a vector of one number."""
    return spread(T.float32(value), lanes)


def spread(value: Expr, lanes: int) -> Expr:
    """Return a vector of one scalar expression."""
    return value if lanes == 1 else T.broadcast(value, lanes)
