"""Tokens of a chunk over one slice of all tables of a LookupFFN layer, pass after pass.

A pass takes a few tables. Their slice stays in the second-level cache while all tokens go by, each
with its sums in registers; the tables of the next pass are read ahead meanwhile.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from tvm import tirx
from tvm.ir import Expr
from tvm.script.ir_builder import tirx as T

from tvmstruct.schedules.builder import fma, i64, loops
from tvmstruct.schedules.compute.hash_tables import ITEM, Tables
from tvmstruct.schedules.x86 import stream
from tvmstruct.schedules.x86.attention_tile import pieces, ramp, registers, spread
from tvmstruct.schedules.x86.hash_codes import LINE, TableRows, prefetch
from tvmstruct.targets import Isa

AHEAD = 4  # tokens whose rows are prefetched
MANY = 512  # tokens over which reading the next tables ahead is spread


@dataclass(frozen=True)
class Group:
    """``width`` tables from ``table`` on (an expression), and where their entries start."""

    table: Expr | int
    width: int
    base: Expr | int  # of the first token's first entry among all codes


@dataclass(frozen=True)
class Part:
    """``count`` tables of a group from its ``start``-th on."""

    group: Group
    start: Expr | int
    count: int


@dataclass(frozen=True)
class SliceWalk:
    """Tokens from ``begin`` of a chunk over all tables of slice ``cut``, pass after pass.

    The first pass starts from zero, the last one writes to y, the others add to ``sums``.
    """

    isa: Isa
    t: Tables
    streams: bool  # whether y goes to memory past the caches
    buffers: dict
    group: Callable[..., Group]  # (number, tables of each group, tables before them)
    cut: Expr
    first: Expr  # token of the chunk
    begin: Expr
    tokens: Expr
    most: int  # tokens at most
    sums: tirx.Buffer

    def emit(self, runs: list[tuple[int, int, int, int, int, int]]) -> None:
        """Emit all passes."""
        for r, (groups, width, before, start, count, times) in enumerate(runs):

            def part(p: Expr, width=width, before=before, start=start, count=count, times=times):
                group = self.group(p // times, width, before)
                return Part(group, start + p % times * count, count)

            total, ends = groups * times, r == len(runs) - 1
            begins = r == 0 and not (ends and total == 1)
            if begins:
                self._pass(part(i64(0)), fresh=True)
            middle = total - begins - ends
            with loops(middle) as (p,):
                self._pass(part(p + int(begins)))
            if ends:
                self._last_pass(part(i64(total - 1)), fresh=r == 0 and total == 1)

    def _pass(self, part: Part, *, fresh: bool = False) -> None:
        """Add the rows of a few tables to the sums of every token."""
        lanes, columns = self.isa.lanes, self.t.columns(self.isa.lanes)
        with loops(self.tokens) as (i,):
            after = part.group.table + part.start + part.count
            self._fetch_tables(part, self.cut, after * (1 << self.t.tau), i)
            for v, register in enumerate(self._add_rows(part, i, fresh=fresh)):
                place = [ramp(i * columns + v * lanes, lanes)]
                T.buffer_store(self.sums, register[ramp(0, lanes)], place)

    def _last_pass(self, part: Part, *, fresh: bool) -> None:
        """Add the rows of the last tables and write y; the last slice may be narrower."""
        t, lanes = self.t, self.isa.lanes
        columns, slices = t.columns(lanes), t.slices(lanes)
        rest = t.n - (slices - 1) * columns

        def write(width: int) -> None:
            with loops(self.tokens) as (i,):
                self._fetch_tables(part, self.cut + 1, i64(0), i)
                held = self._add_rows(part, i, fresh=fresh)
                for start, size in pieces(width, lanes):
                    value = held[start // lanes][ramp(start % lanes, size)]
                    self._finish(
                        self.first + self.begin + i, self.cut * columns + start, size, value
                    )

        if rest == columns:
            write(columns)
            return
        with T.If(self.cut == slices - 1):
            with T.Then():
                write(rest)
            if slices > 1:
                with T.Else():
                    write(columns)

    def _add_rows(self, part: Part, i: Expr, *, fresh: bool) -> list[tirx.Buffer]:
        """Return a token's sums with its rows of a few tables, in registers."""
        t, lanes, columns = self.t, self.isa.lanes, self.t.columns(self.isa.lanes)
        rows = TableRows(t, self.buffers["tables"], lanes)
        codes, each = self.buffers["codes"], part.group.width * t.entries
        first = part.group.base + (self.begin + i) * each + part.start
        with loops(t.entries, part.count) as (e, k):  # past the last token any row will do
            code = codes[first + AHEAD * each + e * part.group.width + k]
            rows.fetch(self.cut, T.Cast("int64", code), 1)
        held = registers(lanes, columns // lanes)
        for v, register in enumerate(held):
            zero = spread(T.float32(0), lanes)
            before = zero if fresh else self.sums[ramp(i * columns + v * lanes, lanes)]
            T.buffer_store(register, before, [ramp(0, lanes)])
        with loops(t.entries, part.count) as (e, k):
            place = first + e * part.group.width + k
            row = T.Cast("int64", codes[place])
            score = spread(self.buffers["scores"][place], lanes)
            for v, value in enumerate(rows.load(self.cut, row)):
                total = fma(score, value, held[v][ramp(0, lanes)], lanes, self.isa.fma)
                T.buffer_store(held[v], total, [ramp(0, lanes)])
        return held

    def _fetch_tables(self, part: Part, cut: Expr, first: Expr, token: Expr) -> None:
        """Prefetch a token's share of the tables next, from row ``first`` of slice ``cut`` on.

        In order, into the second-level cache; of addresses after the last table a no-op.
        """
        t, tables = self.t, self.buffers["tables"]
        if self.most < MANY:
            return
        lines = max(1, t.columns(self.isa.lanes) * ITEM[t.dtype] // LINE)  # of a row
        each = -(-(part.count << t.tau) * lines // self.most)  # lines for one token
        for n in range(each):
            line = token * each + n
            column = line % lines * (int(tables.shape[2]) // lines)
            prefetch(tables[cut, first + line // lines, column], 2)

    def _finish(self, token: Expr, column: Expr, size: int, value: Expr) -> None:
        """Write sums with bias and residual."""
        buffers = self.buffers
        if "bias" in buffers:
            value = value + buffers["bias"][ramp(column, size)]
        if "residual" in buffers:
            value = value + buffers["residual"][token, ramp(column, size)]
        if self.streams:
            stream.store(buffers["y"], value, [token, column], size)
        else:
            T.buffer_store(buffers["y"], value, [token, ramp(column, size)])
