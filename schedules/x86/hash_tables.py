"""LookupFFN's second half on x86: bits and scores of hashed features, gathers, weighted sums.

Tokens go by in chunks. First their codes and scores are computed, vectors of tables at a time,
and laid out so that the gather reads them in order. Then every thread takes slices of columns:
it lets all tokens of the chunk pass over the slice of `TOGETHER` tables, which stays in its
second-level cache with the sums of the chunk, before it goes on to the next tables. Those are
read ahead meanwhile, in order and a few lines for each token: as random rows they would come
from memory several times slower. A token's sums live in registers, so they are loaded and stored
once for `TOGETHER` rows gathered. Few tokens take `TokenByToken` instead.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from tvm import tirx
from tvm.ir import Expr
from tvm.script.ir_builder import tirx as T

from tvmstruct.schedules.builder import argument, fma, i64, loops, prim_func, symbol
from tvmstruct.schedules.compute.hash_tables import ITEM, Tables
from tvmstruct.schedules.compute.layer_norm import RowNorm
from tvmstruct.schedules.registry import Kernel, Pick, Space, make_kernel, pick_default
from tvmstruct.schedules.vector_math import replace_math
from tvmstruct.schedules.x86.attention_tile import pieces, ramp, registers, scratch, spread
from tvmstruct.schedules.x86.hash_codes import LINE, Hasher, TableRows, prefetch
from tvmstruct.schedules.x86.hash_tokens import TokenByToken
from tvmstruct.targets import Isa

GROUP = 16  # tables whose codes lie together
TOGETHER = 8  # tables that pass while a token's sums stay in registers
CHUNK = 4096  # tokens whose codes are computed at a time
AHEAD = 2  # tokens whose rows are prefetched
MANY = 512  # tokens over which reading the next tables ahead is spread
BLOCK = 16  # tokens hashed by a thread at a time
SERIAL_BYTES = 128 << 10  # of rows gathered: less is done before a second thread has woken
MOST_ENTRIES = 512  # of a table, each a few instructions of code
FEW = 256  # tokens up to which each is read by itself: hardly a row is read twice
FEW_AT_ONCE = 32  # of them whose sums lie in cache until all tables are through
NEAR_BYTES = 384 << 10  # of a token's rows, which with the next one's stay in second-level cache


def legal(t: Tables) -> bool:
    """Return whether there is a kernel: a neighbourhood of a thousand codes is none."""
    return t.entries <= MOST_ENTRIES


def hash_tables(isa: Isa, t: Tables, rows: int, threads: int) -> Kernel:
    """Return the kernel: z, tables, [scales], [bias], [residual], [gamma, beta], y."""
    work = t.h * t.entries * t.n
    least = _chunk(rows)

    def nest(rows: int, pick: Pick) -> _Nest:
        options = [c for c in (512, 1024, 2048, 4096, 8192) if c < 2 * rows] or [least]
        few = int(rows <= FEW and work * ITEM[t.dtype] <= NEAR_BYTES)
        by_token = bool(pick("by_token", (0, 1) if rows <= MANY else (0,), few))
        chunk = pick("chunk", options, least)
        shared = threads if rows * work * 4 > SERIAL_BYTES else 1
        return _Nest(chunk, shared, by_token)

    key = (isa.name, t, nest(rows, pick_default))
    space = Space(t.words, lambda rows, pick: _build(isa, t, nest(rows, pick)))
    return make_kernel(
        "hash_tables", key, lambda: _build(isa, t, nest(rows, pick_default)), work=work, space=space
    )


@dataclass(frozen=True)
class _Nest:
    """How tokens are cut, how many threads share a chunk, whether tokens are read one by one."""

    chunk: int
    threads: int
    by_token: bool = False


def _chunk(rows: int) -> int:
    """Return the tokens of a chunk: one of a few numbers, so that kernels are shared."""
    return min(CHUNK, 1 << (max(rows, 1) - 1).bit_length())


@dataclass(frozen=True)
class _Group:
    """``width`` tables from ``table`` on (an expression), and where their entries start."""

    table: Expr | int
    width: int
    base: Expr | int  # of the first token's first entry among all codes


@dataclass(frozen=True)
class _Part:
    """``count`` tables of a group from its ``start``-th on."""

    group: _Group
    start: Expr | int
    count: int


def _passes(width: int) -> list[tuple[int, int, int]]:
    """Cut a group into runs of passes: (first table, tables of a pass, passes)."""
    whole, rest = divmod(width, TOGETHER)
    out = [(0, TOGETHER, whole)] if whole else []
    return [*out, (whole * TOGETHER, rest, 1)] if rest else out


@dataclass(frozen=True)
class _Body:
    """Code of one kernel."""

    isa: Isa
    t: Tables
    nest: _Nest
    buffers: dict

    def emit(self, m, norm: RowNorm | None) -> None:
        """Emit chunk after chunk."""
        chunk = self.nest.chunk
        with loops((m + (chunk - 1)) // chunk) as (c,):
            first = c * chunk
            count = T.min(i64(chunk), m - first)
            self._hash(first, count)
            self._gather(first, count)
            if norm is not None:
                norm.emit(self.buffers["y"], first, count, parallel=self.nest.threads > 1)

    @property
    def _rows(self) -> TableRows:
        return TableRows(self.t, self.buffers["tables"], self.isa.lanes)

    @property
    def _kind(self):
        return T.parallel if self.nest.threads > 1 else None

    def _groups(self) -> Sequence[tuple[int, int, int]]:
        """Return (groups, tables of each, tables before them)."""
        whole, rest = divmod(self.t.h, GROUP)
        out = [(whole, GROUP, 0)] if whole else []
        return [*out, (1, rest, whole * GROUP)] if rest else out

    def _group(self, g: Expr, width: int, before: int) -> _Group:
        each = self.nest.chunk * self.t.entries
        return _Group(before + g * width, width, before * each + g * (width * each))

    def _hash(self, first: Expr, count: Expr) -> None:
        """Write codes and scores of a chunk, those of a token and a group together."""
        block = min(BLOCK, self.nest.chunk)
        with loops((count + (block - 1)) // block, kind=self._kind) as (b,):
            with loops(T.min(i64(block), count - b * block)) as (i,):
                token = b * block + i
                for groups, width, before in self._groups():
                    with loops(groups) as (g,):
                        group = self._group(g, width, before)
                        for start, lanes in pieces(width, self.isa.lanes):
                            self._hash_vector(first, token, group, start, lanes)

    def _hash_vector(self, first: Expr, token: Expr, group: _Group, start: int, lanes: int) -> None:
        """Hash ``lanes`` tables of a group."""
        at = group.base + token * (group.width * self.t.entries) + start

        def keep(e: int, row: Expr, score: Expr) -> None:
            place = [ramp(at + e * group.width, lanes)]
            T.buffer_store(self.buffers["codes"], row, place)
            T.buffer_store(self.buffers["scores"], score, place)

        hasher = Hasher(self.t, self.buffers["z"], self.buffers.get("scales"))
        hasher.emit(first + token, group.table + start, lanes, keep)

    def _gather(self, first: Expr, count: Expr) -> None:
        """Add up the rows of all tables, slice by slice; threads take slices and tokens."""
        t, lanes, chunk = self.t, self.isa.lanes, self.nest.chunk
        columns, slices = t.columns(lanes), t.slices(lanes)
        parts = self._parts(slices)
        step = -(-chunk // parts)
        with loops(slices * parts, kind=self._kind) as (item,):
            cut, begin = item // parts, item % parts * step
            tokens = T.max(T.min(i64(step), count - begin), i64(0))
            sums = scratch(step * columns)
            with loops(tokens, columns // lanes) as (i, v):
                zero = spread(T.float32(0), lanes)
                T.buffer_store(sums, zero, [ramp(i * columns + v * lanes, lanes)])
            for groups, width, before in self._groups():
                for start, count, times in _passes(width):
                    with loops(groups, times, tokens) as (g, k, i):
                        group = self._group(g, width, before)
                        part = _Part(group, start + k * count, count)
                        if chunk >= MANY:
                            self._fetch_tables(part, cut, i, step)
                        self._add_rows(part, cut, begin + i, sums, i * columns)
            self._finish(first + begin, tokens, cut, sums)

    def _parts(self, slices: int) -> int:
        """Return into how many ranges of tokens a chunk falls, so that threads share evenly."""
        threads = self.nest.threads
        most = min(self.nest.chunk, threads)
        even = (p for p in range(1, most + 1) if slices * p % threads == 0)
        return 1 if slices >= 4 * threads else next(even, most)

    def _add_rows(self, part: _Part, cut: Expr, token: Expr, sums, at: Expr) -> None:
        """Add to a token's sums its rows of a few tables."""
        t, lanes = self.t, self.isa.lanes
        vectors = t.columns(lanes) // lanes
        each = part.group.width * t.entries
        first = part.group.base + token * each + part.start
        with loops(t.entries, part.count) as (e, k):  # past the last token any row will do
            code = self.buffers["codes"][first + AHEAD * each + e * part.group.width + k]
            self._rows.fetch(cut, T.Cast("int64", code), 1)
        held = registers(lanes, vectors)
        for v, register in enumerate(held):
            T.buffer_store(register, sums[ramp(at + v * lanes, lanes)], [ramp(0, lanes)])
        with loops(t.entries, part.count) as (e, k):
            place = first + e * part.group.width + k
            row = T.Cast("int64", self.buffers["codes"][place])
            score = spread(self.buffers["scores"][place], lanes)
            for v, value in enumerate(self._rows.load(cut, row)):
                total = fma(score, value, held[v][ramp(0, lanes)], lanes, self.isa.fma)
                T.buffer_store(held[v], total, [ramp(0, lanes)])
        for v, register in enumerate(held):
            T.buffer_store(sums, register[ramp(0, lanes)], [ramp(at + v * lanes, lanes)])

    def _fetch_tables(self, part: _Part, cut: Expr, token: Expr, tokens: int) -> None:
        """Prefetch a token's share of the tables next, in order, into the second-level cache.

        The tables after the last are the first ones of the next slice.
        """
        t, tables = self.t, self.buffers["tables"]
        lines = max(1, t.columns(self.isa.lanes) * ITEM[t.dtype] // LINE)  # of a row
        first = (part.group.table + part.start + part.count) * (1 << t.tau)
        each = -(-(part.count << t.tau) * lines // tokens)  # lines for one token
        for i in range(each):
            line = token * each + i
            column = line % lines * (int(tables.shape[2]) // lines)
            element = tables[cut, first + line // lines, column]
            prefetch(element, 2)

    def _finish(self, first: Expr, tokens: Expr, cut: Expr, sums) -> None:
        """Write a slice of y with bias and residual; the last one may be narrower."""
        t, lanes = self.t, self.isa.lanes
        columns, slices = t.columns(lanes), t.slices(lanes)
        rest = t.n - (slices - 1) * columns

        def write(width: int) -> None:
            with loops(tokens) as (i,):
                for start, size in pieces(width, lanes):
                    column = cut * columns + start
                    value = sums[ramp(i * columns + start, size)]
                    if "bias" in self.buffers:
                        value = value + self.buffers["bias"][ramp(column, size)]
                    if "residual" in self.buffers:
                        value = value + self.buffers["residual"][first + i, ramp(column, size)]
                    T.buffer_store(self.buffers["y"], value, [first + i, ramp(column, size)])

        if rest == columns:
            write(columns)
            return
        with T.If(cut == slices - 1):
            with T.Then():
                write(rest)
            if slices > 1:
                with T.Else():
                    write(columns)


def _build(isa: Isa, t: Tables, nest: _Nest) -> tirx.PrimFunc:
    lanes, epilogue = isa.lanes, t.epilogue
    columns = t.columns(lanes)

    def body() -> None:
        m = symbol("m")
        b = {"z": argument("z", (m, i64(t.h * t.tau)))}
        width, dtype = {
            "f32": (columns, "float32"),
            "bf16": (columns // 2, "int32"),
            "int8": (columns, "int8"),
        }[t.dtype]
        rows = t.h << t.tau
        shape = (t.slices(lanes), t.stored_rows(lanes), width)
        b["tables"] = argument("tables", tuple(map(i64, shape)), dtype)
        if t.dtype == "int8":
            b["scales"] = argument("scales", (i64(rows),))
        if epilogue.bias:
            b["bias"] = argument("bias", (i64(t.n),))
        if epilogue.residual:
            b["residual"] = argument("residual", (m, i64(t.n)))
        norm = RowNorm.declare(lanes, t.n, epilogue.norm)
        b["y"] = argument("y", (m, i64(t.n)))
        if nest.by_token:
            TokenByToken(isa, t, min(nest.chunk, FEW_AT_ONCE), nest.threads, b).emit(m, norm)
            return
        count = (nest.chunk * t.h + AHEAD * GROUP) * t.entries
        b["codes"] = T.alloc_buffer((i64(count),), "int32", scope="global")
        b["scores"] = T.alloc_buffer((i64(count),), "float32", scope="global")
        _Body(isa, t, nest, b).emit(m, norm)

    return replace_math(prim_func(body))
