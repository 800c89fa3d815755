"""Exact fused attention on x86: ``softmax(scale * q @ k.T + mask) @ v`` with a running maximum.

Scores live transposed, ``scores[key, query]``, with the queries on the vector axis: maximum,
exp and sum are then vertical, k and v are read in place by broadcast and by vector, and only
the small query tile is transposed, in registers. One tile times one chunk of keys is all the
score memory a thread needs. Chunk after chunk the tile keeps a running maximum; what was
accumulated under an older, smaller maximum is scaled down (online softmax).
"""

from collections.abc import Callable, Collection
from dataclasses import dataclass
from math import gcd, inf

from tvm import tirx
from tvm.ir import Expr
from tvm.script.ir_builder import tirx as T
from tvm.tirx import PrimFunc

from tvmstruct.schedules import builder, vector_math
from tvmstruct.schedules.registry import KERNEL
from tvmstruct.targets import Isa

PARALLEL_FLOPS = 500_000  # some 5 us on one core: below, waking a second one costs more
CHUNK = 128  # keys per chunk: with a tile of 32 queries the scores fill half of a 32 KB cache
MASK_DIMS = ("batch", "heads", "queries")

Load = Callable[[int, Expr | int, int], Expr]  # (row of the tile, first column, lanes)


def attention(
    isa: Isa,
    *,
    heads: int,
    head_dim: int,
    query_length: int,
    key_length: int,
    scale: float,
    q_layout: tuple[int, int],
    k_layout: tuple[int, int],
    v_layout: tuple[int, int],
    value_dim: int | None = None,
    mask: str = "none",
    mask_dims: Collection[str] = ("batch", "queries"),
    causal: bool = False,
    kv_heads: int = 0,
) -> PrimFunc:
    """Return the kernel ``(q, k, v[, mask], out)`` for a symbolic batch.

    q, k and v are row buffers (batch * length, width); a layout is (width, offset): head h is
    columns ``offset + h * head_dim`` on, so that all three may be slices of one buffer. ``out``
    is (batch * query_length, heads * value_dim). The mask is added to the scaled scores:
    "keys" is (batch, key_length), "full" is (batch, heads, query_length, key_length) with
    extent 1 for what is not in ``mask_dims``. ``causal`` hides key j from query i < j. A row
    whose scores are all -inf gives zeros. With ``kv_heads`` (0: one for each head) query head h
    reads key and value head ``h // (heads // kv_heads)``.
    """
    if mask not in ("none", "keys", "full"):
        raise ValueError(f'attention: mask is "{mask}", want "none", "keys" or "full"')
    if unknown := set(mask_dims) - set(MASK_DIMS):
        raise ValueError(f"attention: unknown mask_dims {sorted(unknown)}, known: {MASK_DIMS}")
    if heads % (kv_heads or heads):
        raise ValueError(f"attention: {heads} heads cannot share {kv_heads} key and value heads")
    value_dim = head_dim if value_dim is None else value_dim
    problem = _Problem(
        isa, heads, head_dim, value_dim, query_length, key_length, scale,
        {"q": q_layout[1], "k": k_layout[1], "v": v_layout[1]},
        mask, frozenset(mask_dims) if mask == "full" else frozenset(("batch",)), causal,
        heads // (kv_heads or heads),
    )  # fmt: skip
    widths = {"q": q_layout[0], "k": k_layout[0], "v": v_layout[0]}

    def body() -> None:
        rows, key_rows = builder.symbol("rows"), builder.symbol("key_rows")
        shapes: dict[str, tuple] = {n: (key_rows, widths[n]) for n in ("k", "v")}
        shapes["q"], shapes["out"] = (rows, widths["q"]), (rows, heads * value_dim)
        if mask != "none":
            shapes["mask"] = _mask_shape(problem)
        buffers = {
            n: builder.argument(n, shapes[n]) for n in ("q", "k", "v", "mask", "out") if n in shapes
        }
        _emit_tasks(problem, buffers, rows // query_length)

    func = builder.prim_func(body).with_attr("global_symbol", "attention")
    return func.with_attr("tirx.is_scheduled", True).with_attr(KERNEL, "attention")


@dataclass(frozen=True)
class _Problem:
    """The static side of one kernel."""

    isa: Isa
    heads: int
    head_dim: int
    value_dim: int
    query_length: int
    key_length: int
    scale: float
    offsets: dict[str, int]
    mask: str
    mask_dims: frozenset[str]
    causal: bool
    group: int  # query heads that read one key and value head

    @property
    def lanes(self) -> int:
        """Queries in a vector: as few lanes as hold all queries."""
        return _lanes(self.query_length, self.isa)

    @property
    def tile(self) -> int:
        """Queries in a full tile: two vectors, one where that holds all."""
        return self.lanes * (2 if self.query_length > self.lanes else 1)

    @property
    def flops(self) -> int:
        """Floating point operations of the two products, for one element of the batch."""
        pairs = self.query_length * self.key_length
        return 2 * self.heads * pairs * (self.head_dim + self.value_dim)

    @property
    def key_tile(self) -> int:
        """Keys in a register tile; a divisor of the key length where one is near."""
        vectors = self.tile // self.lanes
        most = {32: {1: 12, 2: 12}, 16: {1: 12, 2: 6}}[self.isa.registers][vectors]
        if not self.isa.fma:
            most = most * 2 // 3  # a product needs a register of its own
        return _near_divisor(self.key_length, most)

    @property
    def chunk(self) -> int:
        """Keys in a chunk: a multiple of the register tile and of the transposed block."""
        step = self.key_tile * self.lanes // gcd(self.key_tile, self.lanes)
        chunks = -(-self.key_length // max(CHUNK, step))
        return -(-self.key_length // (chunks * step)) * step

    @property
    def one_chunk(self) -> bool:
        """Whether the running maximum is the maximum."""
        return self.chunk >= self.key_length


@dataclass(frozen=True)
class _Tile:
    """One tile of queries: where it is, and its scratch memory."""

    problem: _Problem
    buffers: dict[str, tirx.Buffer]
    batch: Expr
    head: Expr
    start: Expr  # first query
    queries: int  # how many are real; further lanes repeat the last
    lanes: int
    vectors: int
    query: tirx.Buffer  # (head_dim, queries): the transposed tile
    scores: tirx.Buffer  # (chunk, queries)
    mask: tirx.Buffer | None  # (chunk, queries), only for masks that differ by query
    top: tirx.Buffer  # running maximum
    total: tirx.Buffer  # running sum
    shrink: tirx.Buffer  # factor for what an older maximum scaled

    @property
    def width(self) -> int:
        """Queries with the repeated ones."""
        return self.lanes * self.vectors

    def output(self, query: Expr, first: int, lanes: int) -> list[Expr]:
        """Return the place of a piece of the output, which also holds the sums so far."""
        p = self.problem
        row = self.batch * p.query_length + self.start + query
        return [row, _ramp(self.head * p.value_dim + first, lanes)]

    def vector(self, index: int) -> Expr:
        """Return the columns of vector ``index`` of the tile."""
        return T.ramp(index * self.lanes, 1, self.lanes)


def _mask_shape(p: _Problem) -> tuple:
    """Return the mask's shape; its batch is a variable of its own or 1."""
    batch = builder.symbol("mask_batch") if "batch" in p.mask_dims else 1
    if p.mask == "keys":
        return batch, p.key_length
    heads = p.heads if "heads" in p.mask_dims else 1
    return batch, heads, p.query_length if "queries" in p.mask_dims else 1, p.key_length


def _emit_tasks(p: _Problem, buffers: dict[str, tirx.Buffer], batch: Expr) -> None:
    """Loop over (batch, head, tile); on one thread where the work is small."""
    tiles = -(-p.query_length // p.tile)
    tasks = batch * (p.heads * tiles)

    def loop(kind: Callable) -> None:
        with kind(T.int64(0), tasks) as task:
            head = task // tiles
            _emit_tile(p, buffers, head // p.heads, head % p.heads, task % tiles)

    if p.flops >= PARALLEL_FLOPS:
        loop(T.parallel)
        return
    with T.If(batch * p.flops < PARALLEL_FLOPS):
        with T.Then():
            loop(T.serial)
        with T.Else():
            loop(T.parallel)


def _emit_tile(p: _Problem, buffers: dict, batch: Expr, head: Expr, tile: Expr) -> None:
    """Emit a full tile, and the ragged last one where there is one."""
    full, rest = divmod(p.query_length, p.tile)

    def emit(queries: int) -> None:
        _emit_queries(p, buffers, batch, head, tile * p.tile, queries)

    if not full or not rest:
        emit(p.tile if full else rest)
        return
    with T.If(tile < full):
        with T.Then():
            emit(p.tile)
        with T.Else():
            emit(rest)


def _emit_queries(
    p: _Problem, buffers: dict, batch: Expr, head: Expr, start: Expr, queries: int
) -> None:
    """Emit the attention of one tile of queries to all keys."""
    lanes = _lanes(queries, p.isa)
    vectors = -(-queries // lanes)
    width = lanes * vectors
    by_query = p.mask == "full" and "queries" in p.mask_dims
    tile = _Tile(
        p, buffers, batch, head, start, queries, lanes, vectors,
        query=_scratch(p.head_dim, width),
        scores=_scratch(p.chunk, width),
        mask=_scratch(p.chunk, width) if by_query else None,
        top=_scratch(width), total=_scratch(width), shrink=_scratch(width),
    )  # fmt: skip
    row, column = batch * p.query_length + start, head * p.head_dim + p.offsets["q"]
    _emit_transpose(
        lambda i, c, n: buffers["q"][row + min(i, queries - 1), _ramp(column + c, n)],
        tile.query, tile, p.head_dim // lanes, p.head_dim,
    )  # fmt: skip
    for v in range(vectors):
        T.buffer_store(tile.top, _splat(-inf, lanes), [tile.vector(v)])
        T.buffer_store(tile.total, _splat(0.0, lanes), [tile.vector(v)])
    if p.one_chunk:
        # The rows are never fewer, but LLVM does not know: it would unroll the loops over keys,
        # see constant indices, and take the scores for registers, which then spill.
        count = T.min(T.int64(p.key_length), buffers["k"].shape[0])
        _emit_chunk(tile, T.int64(0), count)
        return
    out = buffers["out"]
    with T.serial(0, queries) as i:
        for first, n in _pieces(p.value_dim, p.isa.lanes):
            T.buffer_store(out, _splat(0.0, n), tile.output(i, first, n))
    chunks = T.int64(-(-p.key_length // p.chunk))
    if p.causal:  # later chunks are hidden from every query of the tile
        chunks = T.min(chunks, (start + (queries - 1 + p.chunk)) // p.chunk)
    with T.serial(T.int64(0), chunks) as c:
        count = T.min(T.int64(p.chunk), p.key_length - c * p.chunk)
        _emit_chunk(tile, c * p.chunk, count)
    with T.serial(0, queries) as i:
        for first, n in _pieces(p.value_dim, p.isa.lanes):
            _emit_output(tile, i, first, out[*tile.output(i, first, n)], n)


def _emit_chunk(tile: _Tile, key: Expr, count: Expr) -> None:
    """Emit scores, softmax and weighted sum over ``count`` keys from ``key`` on."""
    p = tile.problem
    if tile.mask is not None:
        mask, at = tile.buffers["mask"], _mask_index(tile)
        last = tile.queries - 1
        _emit_transpose(
            lambda i, c, n: mask[*at[:2], at[2] + min(i, last), _ramp(key + c, n)],
            tile.mask, tile, count // tile.lanes, p.key_length, first=key,
        )  # fmt: skip
    old = _registers(tile.lanes, tile.vectors)
    for v in range(tile.vectors):
        T.buffer_store(old[v], tile.top[tile.vector(v)], [_ramp(0, tile.lanes)])
    _emit_scores(tile, key, count)
    _emit_softmax(tile, count, old)
    _emit_weighted_sum(tile, key, count)


def _emit_scores(tile: _Tile, key: Expr, count: Expr) -> None:
    """Emit ``scores[key, query]`` and the running maximum, a register tile of keys at a time."""
    p = tile.problem
    size, rest = p.key_tile, p.key_length % p.key_tile
    with T.serial(T.int64(0), count // size) as i:
        _emit_score_tile(tile, key, i * size, size)
    if rest and p.one_chunk:
        _emit_score_tile(tile, key, count // size * size, rest)
    elif rest:
        with T.If(key + count == p.key_length), T.Then():
            _emit_score_tile(tile, key, count // size * size, rest)


def _emit_score_tile(tile: _Tile, key: Expr, local: Expr, size: int) -> None:
    """Emit the scores of ``size`` keys: one register for each key and query vector."""
    p, lanes = tile.problem, tile.lanes
    k, column = tile.buffers["k"], tile.head // p.group * p.head_dim + p.offsets["k"]
    row = tile.batch * p.key_length + key + local
    sums = [_registers(lanes, size) for _ in range(tile.vectors)]
    for v in range(tile.vectors):
        for i in range(size):
            T.buffer_store(sums[v][i], _splat(0.0, lanes), [_ramp(0, lanes)])
    with T.serial(T.int64(0), T.int64(p.head_dim)) as d:
        for i in range(size):
            for v in range(tile.vectors):
                weight = T.broadcast(k[row + i, column + d], lanes)
                value = vector_math.fma(
                    weight, tile.query[d, tile.vector(v)], sums[v][i][_ramp(0, lanes)]
                )
                T.buffer_store(sums[v][i], value, [_ramp(0, lanes)])
    for i in range(size):
        for v in range(tile.vectors):
            score = sums[v][i][_ramp(0, lanes)] * _splat(p.scale, lanes)
            score = _masked(tile, score, key, local + i, v)
            T.buffer_store(tile.scores, score, [local + i, tile.vector(v)])
            stored = tile.scores[local + i, tile.vector(v)]
            top = tile.top[tile.vector(v)]
            # NaN is no maximum: it shows up again in the sum.
            T.buffer_store(tile.top, T.Select(stored > top, stored, top), [tile.vector(v)])


def _masked(tile: _Tile, score: Expr, key: Expr, local: Expr, v: int) -> Expr:
    """Return the score with the mask added and, if causal, later keys hidden."""
    p = tile.problem
    if tile.mask is not None:
        score = score + tile.mask[local, tile.vector(v)]
    elif p.mask != "none":
        value = tile.buffers["mask"][*_mask_index(tile), key + local]
        score = score + T.broadcast(value, tile.lanes)
    if p.causal:
        query = T.ramp(T.cast(tile.start, "int32") + v * tile.lanes, 1, tile.lanes)
        hidden = T.broadcast(T.cast(key + local, "int32"), tile.lanes) > query
        score = T.Select(hidden, _splat(-inf, tile.lanes), score)
    return score


def _mask_index(tile: _Tile) -> list[Expr]:
    """Return the mask's index up to the keys."""
    p = tile.problem
    place = {"batch": tile.batch, "heads": tile.head, "queries": tile.start}
    if p.mask == "keys":
        return [tile.batch]
    return [place[n] if n in p.mask_dims else T.int64(0) for n in MASK_DIMS]


def _emit_softmax(tile: _Tile, count: Expr, old: list[tirx.Buffer]) -> None:
    """Turn scores into weights ``exp(score - maximum)`` and add them up."""
    lanes, every = tile.lanes, range(tile.vectors)
    top, total = _registers(lanes, tile.vectors), _registers(lanes, tile.vectors)
    whole = [_ramp(0, lanes)]
    for v in every:
        new = tile.top[tile.vector(v)]
        # A row that is all -inf so far: -inf - 0 is -inf, where -inf - -inf were NaN.
        finite = T.Select(new == _splat(-inf, lanes), _splat(0.0, lanes), new)
        T.buffer_store(top[v], finite, whole)
        shrink = vector_math.exp(old[v][whole[0]] - top[v][whole[0]])
        T.buffer_store(tile.shrink, shrink, [tile.vector(v)])
        rescaled = tile.total[tile.vector(v)] * tile.shrink[tile.vector(v)]
        T.buffer_store(total[v], rescaled, whole)
    with T.serial(T.int64(0), count) as key:
        for v in every:
            shifted = tile.scores[key, tile.vector(v)] - top[v][whole[0]]
            T.buffer_store(tile.scores, vector_math.exp(shifted), [key, tile.vector(v)])
            weight = tile.scores[key, tile.vector(v)]
            T.buffer_store(total[v], total[v][whole[0]] + weight, whole)
    for v in every:
        T.buffer_store(tile.total, total[v][whole[0]], [tile.vector(v)])


def _emit_weighted_sum(tile: _Tile, key: Expr, count: Expr) -> None:
    """Emit ``sum_key weight[query, key] * v[key]``, a few queries at a time."""
    p = tile.problem
    pieces = _pieces(p.value_dim, p.isa.lanes)
    groups = -(-len(pieces) // (4 if p.isa.registers == 32 else 3))
    wide, longer = divmod(len(pieces), groups)
    for n in range(groups):
        group = pieces[n * wide + min(n, longer) : (n + 1) * wide + min(n + 1, longer)]
        most = (p.isa.registers - len(group) - 1 - (not p.isa.fma)) // len(group)
        size = _near_divisor(tile.queries, min(most, 12))
        full, rest = divmod(tile.queries, size)
        with T.serial(0, full) as i:
            _emit_sum_tile(tile, key, count, i * size, size, group)
        if rest:
            _emit_sum_tile(tile, key, count, T.int64(full * size), rest, group)


def _emit_sum_tile(
    tile: _Tile, key: Expr, count: Expr, query: Expr, size: int, pieces: list[tuple[int, int]]
) -> None:
    """Emit ``size`` queries times a few vectors of the value, all in registers."""
    p, v, out = tile.problem, tile.buffers["v"], tile.buffers["out"]
    row = tile.batch * p.key_length + key
    column = tile.head // p.group * p.value_dim + p.offsets["v"]
    sums = [_registers(n, size) for _, n in pieces]
    for i in range(size):
        for (first, n), registers in zip(pieces, sums, strict=True):
            start = _splat(0.0, n)
            if not p.one_chunk:
                shrink = _spread(tile.shrink[query + i], n)
                start = out[*tile.output(query + i, first, n)] * shrink
            T.buffer_store(registers[i], start, [_ramp(0, n)])
    with T.serial(T.int64(0), count) as j:
        for i in range(size):
            for (first, n), registers in zip(pieces, sums, strict=True):
                weight = _spread(tile.scores[j, query + i], n)
                value = v[row + j, _ramp(column + first, n)]
                value = vector_math.fma(weight, value, registers[i][_ramp(0, n)])
                T.buffer_store(registers[i], value, [_ramp(0, n)])
    for i in range(size):
        for (first, n), registers in zip(pieces, sums, strict=True):
            value = registers[i][_ramp(0, n)]
            if p.one_chunk:
                _emit_output(tile, query + i, first, value, n)
            else:
                T.buffer_store(out, value, tile.output(query + i, first, n))


def _emit_output(tile: _Tile, query: Expr, first: int, value: Expr, lanes: int) -> None:
    """Divide by the sum of weights and store; a sum of zero means that every score was -inf."""
    total = tile.total[query]
    share = T.Select(total == T.float32(0), T.float32(0), T.float32(1) / total)
    scaled = value * _spread(share, lanes)
    hidden = _spread(total == T.float32(0), lanes)
    scaled = T.Select(hidden, _splat(0.0, lanes), scaled)
    T.buffer_store(tile.buffers["out"], scaled, tile.output(query, first, lanes))


def _emit_transpose(
    load: Load, to: tirx.Buffer, tile: _Tile, blocks: Expr | int, columns: int, first: Expr = 0
) -> None:
    """Write the tile's rows into the columns of ``to``: ``blocks`` blocks of ``lanes`` columns.

    The ragged end goes in smaller blocks; it is left out unless the block range ends there.
    """
    lanes = tile.lanes

    def block(column: Expr, size: int) -> None:
        for row in range(0, tile.width, size):
            _emit_square(load, to, row, column, size)

    def rest() -> None:
        at = columns % lanes
        for offset, size in _pieces(at, lanes):
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


def _emit_square(load: Load, to: tirx.Buffer, row: int, column: Expr, size: int) -> None:
    """Transpose ``size`` x ``size`` values in registers, swapping ever smaller quarters."""
    rows = _registers(size, size)
    for i in range(size):
        T.buffer_store(rows[i], load(row + i, column, size), [_ramp(0, size)])
    half = size // 2
    while half:
        swapped = _registers(size, size)
        for i in (i for i in range(size) if not i & half):
            low, high = (rows[j][_ramp(0, size)] for j in (i, i + half))
            kept = [j if not j & half else size + (j ^ half) for j in range(size)]
            gone = [j | half if not j & half else size + j for j in range(size)]
            for j, picks in ((i, kept), (i + half, gone)):
                value = tirx.Shuffle([low, high], picks)
                T.buffer_store(swapped[j], value, [_ramp(0, size)])
        rows, half = swapped, half // 2
    for i in range(size):
        T.buffer_store(to, rows[i][_ramp(0, size)], [column + i, _ramp(row, size)])


def _registers(lanes: int, count: int) -> list[tirx.Buffer]:
    """Return ``count`` vectors that LLVM keeps in registers (scope global, constant indices)."""
    return [T.alloc_buffer((lanes,), "float32", scope="global") for _ in range(count)]


def _scratch(*shape: int) -> tirx.Buffer:
    return T.alloc_buffer(shape, "float32", scope="global")


def _lanes(count: int, isa: Isa) -> int:
    """Return the smallest vector that holds ``count`` values, at most a whole one."""
    return next((n for n in (4, 8) if count <= n <= isa.lanes), isa.lanes)


def _pieces(width: int, lanes: int) -> list[tuple[int, int]]:
    """Split columns into vectors, (first, lanes) each: whole ones, then 8, 4 and 1."""
    pieces, first = [], 0
    for size in (n for n in (16, 8, 4, 1) if n <= lanes):
        while width - first >= size:
            pieces.append((first, size))
            first += size
    return pieces


def _near_divisor(total: int, most: int) -> int:
    """Return the largest divisor of ``total`` in (most / 2, most], or ``most`` if none."""
    most = max(1, min(most, total))
    return next((n for n in range(most, most // 2, -1) if total % n == 0), most)


def _ramp(first: Expr | int, lanes: int) -> Expr:
    return first if lanes == 1 else T.ramp(first, 1, lanes)


def _splat(value: float, lanes: int) -> Expr:
    return _spread(T.float32(value), lanes)


def _spread(value: Expr, lanes: int) -> Expr:
    return value if lanes == 1 else T.broadcast(value, lanes)
