"""Few tokens through the tables of a LookupFFN layer: one after the other, all columns at once.

Nothing is read twice, so a token costs what memory takes to answer. All rows of a token are
prefetched into the second-level cache as soon as their codes are known. A thread takes some of the
tables for all tokens of a chunk, codes included, and their sums are added up at the end: one
launch, and each thread reads from half of the addresses or fewer.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from tvm import tirx
from tvm.ir import Expr
from tvm.script.ir_builder import tirx as T

from tvmstruct.schedules.builder import fma, i64, loops
from tvmstruct.schedules.compute.hash_tables import Tables
from tvmstruct.schedules.compute.layer_norm import RowNorm
from tvmstruct.schedules.x86.attention_tile import pieces, ramp, registers, scratch, spread
from tvmstruct.schedules.x86.hash_codes import Hasher, TableRows
from tvmstruct.targets import Isa

Write = Callable[[Expr, list[tirx.Buffer], int], None]  # (first slice, its sums, columns)


@dataclass(frozen=True)
class TokenByToken:
    """Code for chunks of ``chunk`` tokens, whose tables ``threads`` share."""

    isa: Isa
    t: Tables
    chunk: int
    threads: int
    buffers: dict

    def emit(self, m: Expr, norm: RowNorm | None) -> None:
        """Emit chunk after chunk."""
        with loops((m + (self.chunk - 1)) // self.chunk) as (c,):
            first = c * self.chunk
            count = T.min(i64(self.chunk), m - first)
            self._share_tables(first, count)
            if norm is not None:
                norm.emit(self.buffers["y"], first, count, parallel=False)

    def _share_tables(self, first: Expr, count: Expr) -> None:
        """Let every thread take tables, and add up what they found."""
        wide = self.t.slices(self.isa.lanes) * self.t.columns(self.isa.lanes)
        units = max(1, self.t.h // self.isa.lanes)
        parts = min(self.threads, units)
        found = scratch(parts * self.chunk * wide)
        with loops(parts, kind=T.parallel if parts > 1 else None) as (part,):
            tables = _Part(self, part, -(-units // parts), parts)
            with loops(count) as (i,):
                tables.hash(first + i)

                def write(cut: Expr, held: list[tirx.Buffer], columns: int, i=i) -> None:
                    at = (part * self.chunk + i) * wide + cut * self.t.columns(self.isa.lanes)
                    for v, start in enumerate(range(0, columns, self.isa.lanes)):
                        value = held[v][ramp(0, self.isa.lanes)]
                        T.buffer_store(found, value, [ramp(at + start, self.isa.lanes)])

                tables.gather(write)
        with loops(count) as (i,):
            self._add_up(first + i, [(p * self.chunk + i) * wide for p in range(parts)], found)

    def _add_up(self, token: Expr, starts: list[Expr], found: tirx.Buffer) -> None:
        """Write the sum of all threads' sums of a token."""
        n, lanes = self.t.n, self.isa.lanes

        def write(column: Expr, size: int) -> None:
            value = found[ramp(starts[0] + column, size)]
            for start in starts[1:]:
                value = value + found[ramp(start + column, size)]
            self._finish(token, column, size, value)

        with loops(n // lanes) as (v,):
            write(v * lanes, lanes)
        for start, size in pieces(n % lanes, lanes):
            write(i64(n - n % lanes + start), size)

    def _finish(self, token: Expr, column: Expr, size: int, value: Expr) -> None:
        """Write sums with bias and residual."""
        if "bias" in self.buffers:
            value = value + self.buffers["bias"][ramp(column, size)]
        if "residual" in self.buffers:
            value = value + self.buffers["residual"][token, ramp(column, size)]
        T.buffer_store(self.buffers["y"], value, [token, ramp(column, size)])


class _Part:
    """What one thread does for a token: the ``part``-th run of ``units`` vectors of tables."""

    def __init__(self, body: TokenByToken, part: Expr, units: int, parts: int) -> None:
        self.isa, self.t = body.isa, body.t
        self.rows = TableRows(self.t, body.buffers["tables"], self.isa.lanes)
        self.hasher = Hasher(self.t, body.buffers["z"], body.buffers.get("scales"))
        whole = self.t.h // self.isa.lanes
        self.part, self.parts = part, parts
        self.first = part * units
        self.count = T.max(T.min(i64(units), whole - self.first), i64(0))
        count = self.t.h * self.t.entries
        self.codes = T.alloc_buffer((count,), "int32", scope="global")
        self.scores = scratch(count)

    @property
    def _rest(self) -> int:
        """Tables after the last whole vector, which the last thread takes."""
        return self.t.h % self.isa.lanes

    def hash(self, token: Expr) -> None:
        """Hash a token and prefetch its rows."""
        lanes = self.isa.lanes
        with loops(self.count) as (u,):
            self._hash(token, (self.first + u) * lanes, lanes)
        if self._rest:
            with self._last():
                for start, size in pieces(self._rest, lanes):
                    self._hash(token, i64(self.t.h - self._rest + start), size)

    @contextmanager
    def _last(self) -> Iterator[None]:
        """Emit what only the last thread does."""
        if self.parts == 1:
            yield
            return
        with T.If(self.part == self.parts - 1), T.Then():
            yield

    def _hash(self, token: Expr, table: Expr, lanes: int) -> None:
        at = table * self.t.entries

        def keep(e: int, row: Expr, score: Expr) -> None:
            place = [ramp(at + e * lanes, lanes)]
            T.buffer_store(self.codes, row, place)
            T.buffer_store(self.scores, score, place)

        self.hasher.emit(token, table, lanes, keep)
        with loops(lanes * self.t.entries, self.t.slices(self.isa.lanes)) as (k, cut):
            self.rows.fetch(cut, T.Cast("int64", self.codes[at + k]), 2)

    def gather(self, write: Write) -> None:
        """Add up the rows of a token, as many slices at a time as registers hold."""
        t, lanes = self.t, self.isa.lanes
        columns, slices = t.columns(lanes), t.slices(lanes)
        narrow = t.n % columns
        whole = slices - 1 if narrow else slices
        most = max(1, self.isa.registers // 2 // self.rows.vectors)
        with loops(whole // most) as (b,):
            self._add_rows(b * most, most, columns, write)
        if whole % most:
            self._add_rows(i64(whole // most * most), whole % most, columns, write)
        if narrow:
            self._add_rows(i64(whole), 1, narrow, write)

    def _add_rows(self, cut: Expr, count: int, columns: int, write: Write) -> None:
        """Add up the rows of ``count`` slices, the last ``columns`` wide."""
        lanes, entries, vectors = self.isa.lanes, self.t.entries, self.rows.vectors
        held = registers(lanes, count * vectors)
        for register in held:
            T.buffer_store(register, spread(T.float32(0), lanes), [ramp(0, lanes)])
        start, tables = self.first * (lanes * entries), self.count * lanes
        if self._rest:
            more = i64(self._rest)
            if self.parts > 1:
                more = T.Select(self.part == self.parts - 1, more, i64(0))
            tables = tables + more
        with loops(tables * entries) as (k,):
            place = start + k
            row = T.Cast("int64", self.codes[place])
            score = spread(self.scores[place], lanes)
            for j in range(count):
                for v, value in enumerate(self.rows.load(cut + j, row)):
                    sums = held[j * vectors + v]
                    total = fma(score, value, sums[ramp(0, lanes)], lanes, self.isa.fma)
                    T.buffer_store(sums, total, [ramp(0, lanes)])
        for j in range(count):
            some = held[j * vectors : (j + 1) * vectors]
            write(cut + j, some, columns)
