"""LookupFFN's second half on x86: bits and scores of hashed features, gathers, weighted sums.

Tokens go by in chunks, of which each thread takes its own where there are enough. First their
codes and scores are computed, vectors of tables at a time, and laid out so that the gather reads
them in order. Then come slices of columns, shared by the threads where the chunk is: a thread
lets all tokens of the chunk pass over the slice of `TOGETHER` tables, which stays in its
second-level cache with the sums of the chunk, before it goes on to the next tables. Those are
read ahead meanwhile, in order and a few lines for each token: as random rows they would come
from memory several times slower. A token's sums live in registers, so they are loaded and stored
once for `TOGETHER` rows gathered. Few tokens take `TokenByToken` instead.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace

import numpy as np
from tvm import tirx
from tvm.ir import Expr
from tvm.script.ir_builder import tirx as T

from tvmstruct.schedules.builder import argument, i64, loops, prim_func, symbol
from tvmstruct.schedules.compute.hash_tables import ITEM, Tables
from tvmstruct.schedules.compute.layer_norm import RowNorm
from tvmstruct.schedules.registry import Kernel, Pick, Space, make_kernel, pick_default
from tvmstruct.schedules.vector_math import replace_math
from tvmstruct.schedules.x86 import stream
from tvmstruct.schedules.x86.attention_tile import pieces, ramp, scratch
from tvmstruct.schedules.x86.hash_codes import Hasher
from tvmstruct.schedules.x86.hash_slices import AHEAD, MANY, Group, SliceWalk
from tvmstruct.schedules.x86.hash_tokens import TokenByToken
from tvmstruct.targets import Isa

GROUP = 16  # tables whose codes lie together
TOGETHER = 8  # tables that pass while a token's sums stay in registers
CHUNK = 4096  # tokens whose codes are computed at a time
APART = 2048  # tokens for each thread from which on it takes chunks of its own
BLOCK = 16  # tokens hashed by a thread at a time
SERIAL_BYTES = 128 << 10  # of rows gathered: less is done before a second thread has woken
MOST_ENTRIES = 512  # of a table, each a few instructions of code
FEW = 256  # tokens up to which each is read by itself: hardly a row is read twice
FEW_AT_ONCE = 32  # of them whose sums lie in cache until all tables are through
STREAM_BYTES = 16 << 20  # of y: more would push the tables out of the caches, and is not kept
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
        streams = 4 * rows * t.n > STREAM_BYTES and t.n % isa.lanes == 0 and t.epilogue.norm is None
        many = int(rows >= APART * threads and threads > 1)
        apart = not by_token and bool(pick("apart", (0, 1), many))
        return _Nest(chunk, shared, by_token, apart, streams and not by_token)

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
    apart: bool = False  # whether each thread takes chunks of its own
    streams: bool = False  # whether y goes to memory past the caches


def _chunk(rows: int) -> int:
    """Return the tokens of a chunk: one of a few numbers, so that kernels are shared."""
    return min(CHUNK, 1 << (max(rows, 1) - 1).bit_length())


def _entries(t: Tables, nest: _Nest) -> int:
    """Return the codes of a chunk, with those that are read ahead at its end."""
    return (nest.chunk * t.h + AHEAD * GROUP) * t.entries


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

    def emit(self, m: Expr, norm: RowNorm | None) -> None:
        """Emit chunk after chunk."""
        chunk = self.nest.chunk
        with loops((m + (chunk - 1)) // chunk) as (c,):
            first = c * chunk
            self._chunk(first, T.min(i64(chunk), m - first), norm)

    def emit_apart(self, m: Expr, norm: RowNorm | None) -> None:
        """Let every thread take chunks of its own, all of the same size: no waiting between."""
        threads, chunk = self.nest.threads, self.nest.chunk
        turns = (m + (threads * chunk - 1)) // (threads * chunk)
        each = (m + (threads * turns - 1)) // (threads * turns)
        with loops(threads, kind=T.parallel) as (thread,):
            alone = replace(self, nest=replace(self.nest, threads=1), buffers=dict(self.buffers))
            alone.hold(thread)
            with loops(turns) as (c,):
                first = (thread * turns + c) * each
                alone._chunk(first, T.max(T.min(each, m - first), i64(0)), norm)

    def hold(self, thread: Expr | int = 0) -> None:
        """Allocate the codes and scores of a chunk, or find those of a thread."""
        for name, dtype in (("codes", "int32"), ("scores", "float32")):
            given, size = self.buffers.get(name), i64(_entries(self.t, self.nest))
            if given is None:
                self.buffers[name] = T.alloc_buffer((size,), dtype, scope="global")
            else:
                own = {"data": given.data, "elem_offset": thread * size}
                self.buffers[name] = T.decl_buffer((size,), dtype, **own)

    def _chunk(self, first: Expr, count: Expr, norm: RowNorm | None) -> None:
        """Emit one chunk, from z or from codes that are given."""
        if "z" in self.buffers:
            self.hash(first, count)
        self.gather(first, count)
        if norm is not None:
            norm.emit(self.buffers["y"], first, count, parallel=self.nest.threads > 1)

    @property
    def _kind(self):
        return T.parallel if self.nest.threads > 1 else None

    def _groups(self) -> Sequence[tuple[int, int, int]]:
        """Return (groups, tables of each, tables before them)."""
        whole, rest = divmod(self.t.h, GROUP)
        out = [(whole, GROUP, 0)] if whole else []
        return [*out, (1, rest, whole * GROUP)] if rest else out

    def group(self, g: Expr, width: int, before: int) -> Group:
        """Return the ``g``-th of the groups of ``width`` tables that follow ``before`` others."""
        each = self.nest.chunk * self.t.entries
        return Group(before + g * width, width, before * each + g * (width * each))

    def hash(self, first: Expr, count: Expr) -> None:
        """Write codes and scores of a chunk, those of a token and a group together."""
        block = min(BLOCK, self.nest.chunk)
        with loops((count + (block - 1)) // block, kind=self._kind) as (b,):
            with loops(T.min(i64(block), count - b * block)) as (i,):
                token = b * block + i
                for groups, width, before in self._groups():
                    with loops(groups) as (g,):
                        group = self.group(g, width, before)
                        for start, lanes in pieces(width, self.isa.lanes):
                            self._hash_vector(first, token, group, start, lanes)

    def _hash_vector(self, first: Expr, token: Expr, group: Group, start: int, lanes: int) -> None:
        """Hash ``lanes`` tables of a group."""
        at = group.base + token * (group.width * self.t.entries) + start

        def keep(e: int, row: Expr, score: Expr) -> None:
            place = [ramp(at + e * group.width, lanes)]
            T.buffer_store(self.buffers["codes"], row, place)
            T.buffer_store(self.buffers["scores"], score, place)

        hasher = Hasher(self.t, self.buffers["z"], self.buffers.get("scales"))
        hasher.emit(first + token, group.table + start, lanes, keep)

    def gather(self, first: Expr, count: Expr) -> None:
        """Add up the rows of all tables, slice by slice; threads take slices and tokens."""
        t, lanes, chunk = self.t, self.isa.lanes, self.nest.chunk
        columns, slices = t.columns(lanes), t.slices(lanes)
        parts = self._parts(slices)
        step = -(-chunk // parts)
        with loops(slices * parts, kind=self._kind) as (item,):
            cut, begin = item // parts, item % parts * step
            tokens = T.max(T.min(i64(step), count - begin), i64(0))
            sums = scratch(step * columns)
            place = (cut, first, begin, tokens, step, sums)
            walk = SliceWalk(self.isa, t, self.nest.streams, self.buffers, self.group, *place)
            walk.emit(list(self._runs()))
            if self.nest.streams:
                stream.fence()

    def _runs(self) -> Iterator[tuple[int, int, int, int, int, int]]:
        """Yield runs of alike passes: groups, their width, tables before, and `_passes` of one."""
        for groups, width, before in self._groups():
            for start, count, times in _passes(width):
                yield groups, width, before, start, count, times

    def _parts(self, slices: int) -> int:
        """Return into how many ranges of tokens a chunk falls, so that threads share evenly."""
        threads = self.nest.threads
        most = min(self.nest.chunk, threads)
        even = (p for p in range(1, most + 1) if slices * p % threads == 0)
        return 1 if slices >= 4 * threads else next(even, most)


def gather_alone(isa: Isa, t: Tables, rows: int, threads: int) -> tuple[tirx.PrimFunc, int]:
    """Return what many tokens run after they are hashed, and the tokens of a chunk.

    Arguments are codes and scores, for each thread those of a chunk as `laid_out`, tables, [bias],
    [residual], y: every chunk of a thread has the same ones. Benchmarks compare this with the
    bandwidth.
    """
    nest = _Nest(_chunk(rows), threads, apart=True, streams=True)
    return _build(isa, t, nest, hashed=True), nest.chunk


def laid_out(t: Tables, values: np.ndarray) -> np.ndarray:
    """Return codes or scores (tokens, h) of tables without neighbours in the order they are read.

    Those of a few tables lie together, token after token.
    """
    assert t.entries == 1, t
    parts = [values[:, i : i + GROUP].reshape(-1) for i in range(0, t.h, GROUP)]
    return np.concatenate([*parts, np.zeros(AHEAD * GROUP, values.dtype)])


def _build(isa: Isa, t: Tables, nest: _Nest, *, hashed: bool = False) -> tirx.PrimFunc:
    lanes, epilogue = isa.lanes, t.epilogue
    columns = t.columns(lanes)

    def body() -> None:
        m = symbol("m")
        if hashed:
            shape = (i64(nest.threads), i64(_entries(t, nest)))
            b = {"codes": argument("codes", shape, "int32"), "scores": argument("scores", shape)}
        else:
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
        kernel = _Body(isa, t, nest, b)
        with stream.imported() if nest.streams else nullcontext():
            if nest.apart:
                kernel.emit_apart(m, norm)
            else:
                kernel.hold()
                kernel.emit(m, norm)

    return replace_math(prim_func(body))
