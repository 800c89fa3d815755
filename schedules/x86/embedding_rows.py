"""Embedding rows on x86: looked up or made of tensor products, summed and normalised in one pass.

A row that is a sum of tensor products is the product of two subtrees of its leaves, ``out[k1, k2]
= sum_r left[r, k1] right[r, k2]``: the vector axis is k2, sums over r stay in registers, and
vectors that would pass the end of k2 lie over their neighbours, so every store is a whole vector.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import product

from tvm import tirx
from tvm.ir import Expr
from tvm.script.ir_builder import tirx as T

from tvmstruct.schedules.builder import argument, i64, loops, prim_func, symbol
from tvmstruct.schedules.compute.embedding import EmbeddingSum, Rows, Tensors, Term
from tvmstruct.schedules.compute.layer_norm import RowNorm
from tvmstruct.schedules.registry import Kernel, make_kernel
from tvmstruct.schedules.x86.register_tile import accumulate
from tvmstruct.schedules.x86.tensor_tree import Halves, Vectors, cover, ramp, spread
from tvmstruct.targets import Isa

BLOCK = 16  # rows of a task: a thread takes its scratch once for all of them
PARALLEL_ELEMENTS = 32_768  # below, waking a second thread costs more than it saves
RANKS = 8  # terms of a tensor product that cost as much as writing a row
COLUMNS = 4  # vectors of a register tile
RUN_LANES = 8  # of vectors over line ends: of longer ones more are mixed, and mixing costs an FMA
WASTE = 1.1  # lanes over features of a line
MOST_RUNS = 128  # vectors of a row, for all of them are unrolled


def embedding_rows(isa: Isa, spec: EmbeddingSum) -> Kernel:
    """Return the kernel: tables and ids of each term, [gamma, beta], out, for any rows."""
    return make_kernel(
        "embedding_rows", (isa.name, spec), lambda: _build(isa, spec), work=spec.work
    )


def _build(isa: Isa, spec: EmbeddingSum) -> tirx.PrimFunc:
    cost = spec.n * (1 + sum(t.rank // RANKS for t in spec.terms if isinstance(t, Tensors)))

    def body() -> None:
        rows = symbol("rows")
        terms = [_Source.declare(term, i, rows, spec.n) for i, term in enumerate(spec.terms)]
        norm = RowNorm.declare(isa.lanes, spec.n, spec.norm)
        out = argument("out", (rows, i64(spec.n)))

        def loop(kind: Callable) -> None:
            with kind(T.int64(0), (rows + (BLOCK - 1)) // BLOCK) as task:
                first = task * BLOCK
                work = _RowWriter(isa, spec, terms, out)
                with loops(T.min(i64(BLOCK), rows - first)) as (i,):
                    work.emit(first + i)
                    if norm is not None:
                        norm.emit(out, first + i, 1, parallel=False)

        with T.If(rows * cost < PARALLEL_ELEMENTS):
            with T.Then():
                loop(T.serial)
            with T.Else():
                loop(T.parallel)

    return prim_func(body)


@dataclass(frozen=True)
class _Source:
    """The arguments of one term."""

    term: Term
    tables: list[tirx.Buffer]
    ids: tirx.Buffer | None

    @classmethod
    def declare(cls, term: Term, i: int, rows: Expr, n: int) -> _Source:
        """Declare tables and ids."""
        tables = [
            argument(f"table{i}_{j}", tuple(map(i64, shape)))
            for j, shape in enumerate(term.arguments(n))
        ]
        ids = argument(f"ids{i}", (rows,), term.ids) if term.ids else None
        return cls(term, tables, ids)

    def row(self, i: Expr) -> Expr:
        """Return the row of the table that row i reads; never one outside it."""
        if self.ids is None:
            return i64(0) if self.term.size == 1 else i % self.term.size
        found = T.Cast("int64", self.ids[i])
        return T.max(T.min(found, i64(self.term.size - 1)), i64(0))


class _RowWriter:
    """Code that writes one row at a time; its scratch is allocated once."""

    def __init__(
        self, isa: Isa, spec: EmbeddingSum, sources: Sequence[_Source], out: tirx.Buffer
    ) -> None:
        self.isa, self.n, self.out = isa, spec.n, out
        self.dense = [s for s in sources if isinstance(s.term, Rows)]
        self.made = next((s for s in sources if isinstance(s.term, Tensors)), None)
        if len(self.dense) + 1 < len(sources):
            raise ValueError(f"embedding_rows: {spec.terms}; want one tensor product at most")
        self.index = T.alloc_buffer((max(1, len(self.dense)),), "int64", scope="global")
        if self.made is not None:
            assert isinstance(self.made.term, Tensors)
            self.tensors = self.made.term
            self.halves = Halves(isa.lanes, self.tensors, self.made.tables)

    def emit(self, i: Expr) -> None:
        """Write row i."""
        for k, source in enumerate(self.dense):
            T.buffer_store(self.index, source.row(i), [k])
        if self.made is None:
            self._add_up(i)
            return
        left, right = self.halves.emit(self.made.row(i))
        if runs_over_lines(self.isa, self.n, right.width):
            self._runs(i, left, right)
            return
        lines, rest = divmod(self.n, right.width)
        self._lines(i, (0, lines), left, right, right.width)
        if rest:
            self._lines(i, (lines, 1), left, right, rest)

    def _add_up(self, i: Expr) -> None:
        """Write the sum of dense terms."""
        last, lanes = cover(self.n, self.isa.lanes)[-1]
        with loops(self.n // lanes) as (step,):
            at = step * lanes
            T.buffer_store(self.out, self._sum(None, at, lanes), [i, ramp(at, lanes)])
        if self.n % lanes:
            T.buffer_store(self.out, self._sum(None, last, lanes), [i, ramp(last, lanes)])

    def _sum(self, value: Expr | None, at: Expr | int, lanes: int) -> Expr:
        """Add the dense terms at ``lanes`` features from ``at``."""
        for k, source in enumerate(self.dense):
            term = source.tables[0][self.index[k], ramp(at, lanes)]
            if source.term.scale != 1.0:
                term = term * spread(T.float32(source.term.scale), lanes)
            value = term if value is None else value + term
        assert value is not None
        return value

    def _lines(
        self, i: Expr, lines: tuple[int, int], left: Vectors, right: Vectors, width: int
    ) -> None:
        """Write (first, count) lines k1 of row i, of each the first ``width`` features."""
        first, count = lines
        columns = cover(width, self.isa.lanes)
        sums = self.isa.registers * 3 // 4
        for start in range(0, len(columns) if count else 0, COLUMNS):
            group = columns[start : start + COLUMNS]
            blocks = -(-count // max(1, sums // len(group)))
            height = -(-count // blocks)
            full, rest = divmod(count, height)
            with loops(full) as (b,):
                self._tile(i, first + b * height, height, left, right, group)
            if rest:
                self._tile(i, i64(first + full * height), rest, left, right, group)

    def _tile(
        self,
        i: Expr,
        line: Expr,
        height: int,
        left: Vectors,
        right: Vectors,
        group: list[tuple[int, int]],
    ) -> None:
        """Sum ``height`` lines of some columns over all terms in registers, and write them."""
        lanes = group[0][1]

        def step(r: Expr, add) -> None:
            vectors = [right.load(r, at, lanes) for at, _ in group]
            for k, (c, vector) in product(range(height), enumerate(vectors)):
                add(k, c, spread(left.load(r, line + k, 1), lanes), vector)

        rank = self.tensors.rank
        sums = accumulate(self.isa, lanes, (height, len(group)), rank, step)
        for k, (c, (at, _)) in product(range(height), enumerate(group)):
            self._store(i, (line + k) * right.width + at, sums[c][k], lanes)

    def _runs(self, i: Expr, left: Vectors, right: Vectors) -> None:
        """Write the row in whole vectors, each of which may lie on the end of a line and the next.

        Lines of 20 features are 3 vectors of 8 each; as one run, 2 lines are 5.
        """
        lanes, n = min(RUN_LANES, self.isa.lanes), self.n
        tile = self.isa.registers * 3 // 4
        starts = [min(at, n - lanes) for at in range(0, n, lanes)]
        for first in range(0, len(starts), tile):
            group = starts[first : first + tile]

            def step(r: Expr, add, group: list[int] = group) -> None:
                for k, start in enumerate(group):
                    line, at = divmod(start, right.width)
                    here = right.width - at  # features of this line
                    factor, vector = spread(left.load(r, line, 1), lanes), right.load(r, at, lanes)
                    if here < lanes:
                        after = spread(left.load(r, line + 1, 1), lanes)
                        factor = _joined(factor, after, here, lanes)
                        # Loads begin and end outside the leaf, inside its table's slack.
                        vector = _joined(vector, right.load(r, -here, lanes), here, lanes)
                    add(k, 0, factor, vector)

            sums = accumulate(self.isa, lanes, (len(group), 1), self.tensors.rank, step)
            for k, start in enumerate(group):
                self._store(i, i64(start), sums[0][k], lanes)

    def _store(self, i: Expr, at: Expr, value: Expr, lanes: int) -> None:
        """Write the product's ``value`` and the dense terms at ``lanes`` features from ``at``."""
        if self.halves.shift is not None:
            value = value - spread(self.halves.shift[0], lanes)
        if self.tensors.scale != 1.0:
            value = value * spread(T.float32(self.tensors.scale), lanes)
        T.buffer_store(self.out, self._sum(value, at, lanes), [i, ramp(at, lanes)])


def runs_over_lines(isa: Isa, n: int, width: int) -> bool:
    """Return whether vectors that stop at line ends would be many more than those of runs."""
    lanes = min(RUN_LANES, isa.lanes)
    padded = -(-width // isa.lanes) * isa.lanes
    return lanes <= width and lanes <= n <= lanes * MOST_RUNS and padded > WASTE * width


def _joined(a: Expr, b: Expr, count: int, lanes: int) -> Expr:
    """Return the first ``count`` lanes of ``a`` and the others of ``b``."""
    take = [tirx.const(lane if lane < count else lanes + lane, "int32") for lane in range(lanes)]
    return tirx.Shuffle([a, b], take)
