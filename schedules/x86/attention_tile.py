"""One tile of queries attending to keys on x86: scores, running maximum, weights, weighted sum.

Scores live transposed, ``scores[key, query]``, with the queries on the vector axis: maximum,
exp and sum are then vertical, k and v are read in place by broadcast and by vector, and only
the small query tile is transposed, in registers. One tile times one chunk of keys is all the
score memory a thread needs. Chunk after chunk the tile keeps a running maximum; what was
accumulated under an older, smaller maximum is scaled down (online softmax; NLP-Fast eq. 4 in a
form that cannot overflow). The kernels around a tile say where its operands and its result lie.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from math import gcd, inf

from tvm import tirx
from tvm.ir import Expr
from tvm.script.ir_builder import tirx as T

from tvmstruct.schedules import vector_math
from tvmstruct.schedules.builder import i64
from tvmstruct.targets import Isa

CHUNK = 128  # keys per chunk: with a tile of 32 queries the scores fill half of a 32 KB cache

Load = Callable[[int, Expr | int, int], Expr]  # (row of the tile, first column, lanes)
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
        """Keys in a chunk: a multiple of the register tile and of the transposed block."""
        step = self.key_tile * self.lanes // gcd(self.key_tile, self.lanes)
        chunks = -(-self.key_length // max(self.most_keys, step))
        return -(-self.key_length // (chunks * step)) * step

    @property
    def chunks(self) -> int:
        """Chunks of all keys; the last may be ragged."""
        return -(-self.key_length // self.chunk)

    @property
    def one_chunk(self) -> bool:
        """Whether the running maximum is the maximum."""
        return self.chunk >= self.key_length


@dataclass(frozen=True)
class Operands:
    """Where a tile's operands lie, from its first query and the first key on.

    ``out`` (queries, value_dim) also holds the sums so far where there are several chunks. The
    mask has one row for all queries, or one for each where the problem says ``by_query``.
    """

    q: View
    k: View
    v: View
    out: View
    mask: View | None = None


@dataclass(frozen=True)
class Tile:
    """One tile of queries: where it is, and its scratch memory.

    ``start`` is its first query and ``queries`` how many are real; further lanes repeat the
    last. ``top`` and ``total`` are the running maximum and sum of each query.
    """

    problem: Problem
    at: Operands
    start: Index
    queries: int
    lanes: int
    vectors: int
    query: tirx.Buffer  # (head_dim, queries): the transposed tile
    scores: tirx.Buffer  # (chunk, queries)
    mask: tirx.Buffer | None  # (chunk, queries), only for masks that differ by query
    top: tirx.Buffer
    total: tirx.Buffer
    shrink: tirx.Buffer  # factor for what an older maximum scaled

    @classmethod
    def declare(cls, problem: Problem, at: Operands, start: Index, queries: int) -> Tile:
        """Allocate the scratch memory of a tile."""
        lanes = fewest_lanes(queries, problem.isa)
        vectors = -(-queries // lanes)
        width = lanes * vectors
        return cls(
            problem, at, start, queries, lanes, vectors,
            query=scratch(problem.head_dim, width),
            scores=scratch(problem.chunk, width),
            mask=scratch(problem.chunk, width) if problem.by_query else None,
            top=scratch(width), total=scratch(width), shrink=scratch(width),
        )  # fmt: skip

    @property
    def width(self) -> int:
        """Queries with the repeated ones."""
        return self.lanes * self.vectors

    def vector(self, index: int) -> Expr:
        """Return the columns of vector ``index`` of the tile."""
        return T.ramp(index * self.lanes, 1, self.lanes)

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

    def begin(self) -> None:
        """Transpose the queries and start with no key seen."""
        last = self.queries - 1
        _transpose(
            lambda i, c, n: self.at.q.load(min(i, last), c, n),
            self.query, self, self.problem.head_dim // self.lanes, self.problem.head_dim,
        )  # fmt: skip
        for v in range(self.vectors):
            T.buffer_store(self.top, splat(-inf, self.lanes), [self.vector(v)])
            T.buffer_store(self.total, splat(0.0, self.lanes), [self.vector(v)])

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
                self._finish(i, first, self.at.out.load(i, first, n), n)

    def add_chunk(self, key: Expr, count: Expr) -> None:
        """Emit scores, softmax and weighted sum over ``count`` keys from ``key`` on."""
        if self.mask is not None:
            self._transpose_mask(key, count)
        old = registers(self.lanes, self.vectors)
        for v in range(self.vectors):
            T.buffer_store(old[v], self.top[self.vector(v)], [ramp(0, self.lanes)])
        self._emit_scores(key, count)
        self._emit_weights(count, old)
        self._emit_weighted_sum(key, count)

    def _transpose_mask(self, key: Expr, count: Expr) -> None:
        mask, last = self.at.mask, self.queries - 1
        assert mask is not None
        assert self.mask is not None
        _transpose(
            lambda i, c, n: mask.load(min(i, last), key + c, n),
            self.mask, self, count // self.lanes, self.problem.key_length, first=key,
        )  # fmt: skip

    def _emit_scores(self, key: Expr, count: Expr) -> None:
        """Emit ``scores[key, query]`` and the maximum, a register tile of keys at a time."""
        p = self.problem
        size, rest = p.key_tile, p.key_length % p.key_tile
        with T.serial(T.int64(0), count // size) as i:
            self._emit_score_tile(key, i * size, size)
        if rest and p.one_chunk:
            self._emit_score_tile(key, count // size * size, rest)
        elif rest:
            with T.If(key + count == p.key_length), T.Then():
                self._emit_score_tile(key, count // size * size, rest)

    def _emit_score_tile(self, key: Expr, local: Expr, size: int) -> None:
        """Emit the scores of ``size`` keys: one register for each key and query vector."""
        p, lanes, k = self.problem, self.lanes, self.at.k
        sums = [registers(lanes, size) for _ in range(self.vectors)]
        for v in range(self.vectors):
            for i in range(size):
                T.buffer_store(sums[v][i], splat(0.0, lanes), [ramp(0, lanes)])
        with T.serial(T.int64(0), T.int64(p.head_dim)) as d:
            for i in range(size):
                for v in range(self.vectors):
                    weight = T.broadcast(k.load(key + local + i, d), lanes)
                    value = vector_math.fma(
                        weight, self.query[d, self.vector(v)], sums[v][i][ramp(0, lanes)]
                    )
                    T.buffer_store(sums[v][i], value, [ramp(0, lanes)])
        for i in range(size):
            for v in range(self.vectors):
                score = sums[v][i][ramp(0, lanes)] * splat(p.scale, lanes)
                score = self._masked(score, key, local + i, v)
                T.buffer_store(self.scores, score, [local + i, self.vector(v)])
                stored = self.scores[local + i, self.vector(v)]
                top = self.top[self.vector(v)]
                # NaN is no maximum: it shows up again in the sum.
                T.buffer_store(self.top, T.Select(stored > top, stored, top), [self.vector(v)])

    def _masked(self, score: Expr, key: Expr, local: Expr, v: int) -> Expr:
        """Return the score with the mask added and, if causal, later keys hidden."""
        p = self.problem
        if self.mask is not None:
            score = score + self.mask[local, self.vector(v)]
        elif self.at.mask is not None:
            score = score + T.broadcast(self.at.mask.load(0, key + local), self.lanes)
        if p.causal:
            query = T.ramp(T.cast(i64(self.start), "int32") + v * self.lanes, 1, self.lanes)
            hidden = T.broadcast(T.cast(key + local, "int32"), self.lanes) > query
            score = T.Select(hidden, splat(-inf, self.lanes), score)
        return score

    def _emit_weights(self, count: Expr, old: list[tirx.Buffer]) -> None:
        """Turn scores into weights ``exp(score - maximum)`` and add them up."""
        lanes, every = self.lanes, range(self.vectors)
        top, total = registers(lanes, self.vectors), registers(lanes, self.vectors)
        whole = [ramp(0, lanes)]
        for v in every:
            T.buffer_store(top[v], self._finite_top(v), whole)
            shrink = vector_math.exp(old[v][whole[0]] - top[v][whole[0]])
            T.buffer_store(self.shrink, shrink, [self.vector(v)])
            rescaled = self.total[self.vector(v)] * self.shrink[self.vector(v)]
            T.buffer_store(total[v], rescaled, whole)
        with T.serial(T.int64(0), count) as key:
            for v in every:
                shifted = self.scores[key, self.vector(v)] - top[v][whole[0]]
                T.buffer_store(self.scores, vector_math.exp(shifted), [key, self.vector(v)])
                weight = self.scores[key, self.vector(v)]
                T.buffer_store(total[v], total[v][whole[0]] + weight, whole)
        for v in every:
            T.buffer_store(self.total, total[v][whole[0]], [self.vector(v)])

    def _finite_top(self, v: int) -> Expr:
        """Return the maximum, 0 for a row that is all -inf so far: -inf - -inf were NaN."""
        new = self.top[self.vector(v)]
        return T.Select(new == splat(-inf, self.lanes), splat(0.0, self.lanes), new)

    def _emit_weighted_sum(self, key: Expr, count: Expr) -> None:
        """Emit ``sum_key weight[query, key] * v[key]``, a few queries at a time."""
        for size, group in self._sum_groups():
            full, rest = divmod(self.queries, size)
            with T.serial(0, full) as i:
                self._emit_sum_tile(key, count, i * size, size, group)
            if rest:
                self._emit_sum_tile(key, count, T.int64(full * size), rest, group)

    def _sum_groups(self) -> list[tuple[int, list[tuple[int, int]]]]:
        """Return the columns of each register tile of the sums, and its queries."""
        isa = self.problem.isa
        columns = pieces(self.problem.value_dim, isa.lanes)
        groups = -(-len(columns) // (4 if isa.registers == 32 else 3))
        wide, longer = divmod(len(columns), groups)
        found = []
        for n in range(groups):
            group = columns[n * wide + min(n, longer) : (n + 1) * wide + min(n + 1, longer)]
            most = (isa.registers - len(group) - 1 - (not isa.fma)) // len(group)
            found.append((near_divisor(self.queries, min(most, 12)), group))
        return found

    def _emit_sum_tile(
        self, key: Expr, count: Expr, query: Expr, size: int, columns: list[tuple[int, int]]
    ) -> None:
        """Emit ``size`` queries times a few vectors of the value, all in registers."""
        p, v = self.problem, self.at.v
        sums = [registers(n, size) for _, n in columns]
        for i in range(size):
            for (first, n), totals in zip(columns, sums, strict=True):
                start = splat(0.0, n)
                if not p.one_chunk:
                    shrink = spread(self.shrink[query + i], n)
                    start = self.at.out.load(query + i, first, n) * shrink
                T.buffer_store(totals[i], start, [ramp(0, n)])
        with T.serial(T.int64(0), count) as step:
            j = self._key_of(step)
            for i in range(size):
                for (first, n), totals in zip(columns, sums, strict=True):
                    weight = spread(self.scores[j, query + i], n)
                    value = vector_math.fma(
                        weight, v.load(key + j, first, n), totals[i][ramp(0, n)]
                    )
                    T.buffer_store(totals[i], value, [ramp(0, n)])
        for i in range(size):
            for (first, n), totals in zip(columns, sums, strict=True):
                value = totals[i][ramp(0, n)]
                if p.one_chunk:
                    self._finish(query + i, first, value, n)
                else:
                    self.at.out.store(value, query + i, first, n)

    def _key_of(self, step: Expr) -> Expr:
        """Return the key, within the chunk, of a step of the weighted sum."""
        return step

    def _finish(self, query: Expr, first: int, value: Expr, lanes: int) -> None:
        """Divide by the sum of weights and store; a sum of zero means that all were -inf."""
        total = self.total[query]
        share = T.Select(total == T.float32(0), T.float32(0), T.float32(1) / total)
        hidden = spread(total == T.float32(0), lanes)
        scaled = T.Select(hidden, splat(0.0, lanes), value * spread(share, lanes))
        self.at.out.store(scaled, query, first, lanes)


def _transpose(
    load: Load, to: tirx.Buffer, tile: Tile, blocks: Index, columns: int, first: Index = 0
) -> None:
    """Write the tile's rows into the columns of ``to``: ``blocks`` blocks of ``lanes`` columns.

    The ragged end goes in smaller blocks; it is left out unless the block range ends there.
    """
    lanes = tile.lanes

    def block(column: Expr, size: int) -> None:
        for row in range(0, tile.width, size):
            _transpose_square(load, to, row, column, size)

    def rest() -> None:
        at = columns % lanes
        for offset, size in pieces(at, lanes):
            block(blocks * lanes + offset, size)

    with T.serial(T.int64(0), blocks) as i:
        block(i * lanes, lanes)
    if columns % lanes == 0:
        return
    if isinstance(first, int) or tile.problem.one_chunk:
        rest()
        return
    with T.If(first + tile.problem.chunk >= columns), T.Then():
        rest()


def _transpose_square(load: Load, to: tirx.Buffer, row: int, column: Expr, size: int) -> None:
    """Transpose ``size`` x ``size`` values in registers, swapping ever smaller quarters."""
    rows = registers(size, size)
    for i in range(size):
        T.buffer_store(rows[i], load(row + i, column, size), [ramp(0, size)])
    half = size // 2
    while half:
        swapped = registers(size, size)
        for i in (i for i in range(size) if not i & half):
            low, high = (rows[j][ramp(0, size)] for j in (i, i + half))
            kept = [j if not j & half else size + (j ^ half) for j in range(size)]
            gone = [j | half if not j & half else size + j for j in range(size)]
            for j, picks in ((i, kept), (i + half, gone)):
                value = tirx.Shuffle([low, high], picks)
                T.buffer_store(swapped[j], value, [ramp(0, size)])
        rows, half = swapped, half // 2
    for i in range(size):
        T.buffer_store(to, rows[i][ramp(0, size)], [column + i, ramp(row, size)])


def registers(lanes: int, count: int) -> list[tirx.Buffer]:
    """Return ``count`` vectors that LLVM keeps in registers (scope global, constant indices)."""
    return [T.alloc_buffer((lanes,), "float32", scope="global") for _ in range(count)]


def scratch(*shape: int) -> tirx.Buffer:
    """Allocate float32 memory of a thread."""
    return T.alloc_buffer(shape, "float32", scope="global")


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
