"""A tile of a grouped product: what a tensorised block of a structured operator computes.

`emit_tile` writes it as plain loops, once in the definition of a kernel and once more as the
description of a target's intrinsic, so that the two match by construction. Permutations around a
product are strides of its tiles.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import contextmanager
from dataclasses import dataclass

from tvm.script.ir_builder import tirx as T

from tvmstruct.rounding import BYTES, EACH, TYPES
from tvmstruct.schedules.builder import block, i64, loops
from tvmstruct.stages import Dim

HIGH = -65536  # 0xffff0000: the upper half of a word

Start = tuple  # an index of a buffer, onto which the places of a tile are added


@dataclass(frozen=True)
class Tile:
    """``c[row, g, q] (+)= sum_p a[row, g, p] * b[g, p, q]`` for a few rows, groups and outputs.

    Strides are those of the flat index of a feature. A row of ``a`` or ``c`` is an axis of its
    own where ``a_row`` or ``c_row`` is None, else that many elements away. ``columns`` are single
    outputs; vectors run along the groups where ``over_groups``, else along the columns.

    What a word of ``b`` holds says the ``form``: one "float", or "pairs", bfloat16 for two
    neighbouring vectors. A step of the depth are two bfloat16 of ``a`` and of a word in "halves",
    four unsigned bytes and four signed ones in "bytes". There the sums start ``b_more`` words from
    the first step, one step on are the bits of their scales, and a fourth buffer has those of the
    rows of ``a``.
    """

    rows: int
    groups: int
    depth: tuple[Dim, ...]  # of a
    columns: int
    lanes: int
    over_groups: bool
    a_row: int | None
    a_group: int
    b_group: int
    b_column: int
    b_depth: tuple[int, ...]  # strides in b of the dimensions of depth
    c_row: int | None
    c_group: int
    c_column: int
    form: str
    clear: bool  # whether c starts from zero
    b_more: int = 0
    s_row: int = 0  # elements from the scale of a row to that of the next

    @property
    def paired(self) -> bool:
        """Whether a word of b is two bfloat16."""
        return self.form == "pairs"

    @property
    def dots(self) -> bool:
        """Whether a step of the depth is a word of a times a word of b."""
        return self.form in EACH

    @property
    def scaled(self) -> bool:
        """Whether sums are integers, with scales for their rows and columns."""
        return self.form == BYTES

    @property
    def dtypes(self) -> tuple[str, ...]:
        """Types of the buffers a, b, c and, where rows have scales, s."""
        a = TYPES.get(self.form, "float32")
        found = (a, "float32" if self.form == "float" else "int32", "float32")
        return (*found, "float32") if self.scaled else found

    @property
    def span(self) -> tuple[tuple[int, ...], ...]:
        """Shapes of the regions of a, b, c and s that hold all elements."""
        a = (self.groups - 1) * self.a_group + sum((e - 1) * s for e, s in self.depth)
        a += EACH.get(self.form, 1)
        c = (self.groups - 1) * self.c_group + (self.columns - 1) * self.c_column + 1
        b = sum((e - 1) * s for (e, _), s in zip(self.depth, self.b_depth, strict=True))
        b = self.b_more + self.b_depth[-1] if self.scaled else b
        words = self.columns // 2 if self.paired else self.columns
        b += (self.groups - 1) * self.b_group + (words - 1) * self.b_column + 1
        found = self._rows(a, self.a_row), (b,), self._rows(c, self.c_row)
        return (*found, self._rows(1, self.s_row)) if self.scaled else found

    def _rows(self, span: int, stride: int | None) -> tuple[int, ...]:
        return (self.rows, span) if stride is None else ((self.rows - 1) * stride + span,)

    def a(self, row, group, at: list) -> tuple:
        """Return where an element of ``a`` lies, from its start."""
        index = group * self.a_group
        for i, (_, stride) in zip(at, self.depth, strict=True):
            index = index + i * stride
        return _row_place(row, index, self.a_row)

    def b(self, group, at: list, column) -> tuple:
        """Return where an element (or word) of ``b`` lies; columns of words count words."""
        index = group * self.b_group + column * self.b_column
        for i, stride in zip(at, self.b_depth, strict=False):
            index = index + i * stride
        return (index,)

    def c(self, row, group, column) -> tuple:
        """Return where an element of ``c`` lies."""
        return _row_place(row, group * self.c_group + column * self.c_column, self.c_row)

    def more(self, group, column) -> tuple[tuple, tuple]:
        """Return where the start of a sum and where its scale lie in ``b``."""
        index = self.b(group, [], column)[0] + self.b_more
        return (index,), (index + self.b_depth[-1],)

    def s(self, row) -> tuple:
        """Return where the scale of a row lies."""
        return (row * self.s_row,)


def _row_place(row, index, stride: int | None) -> tuple:
    return (row, index) if stride is None else (row * stride + index,)


def emit_tile(tile: Tile, buffers: tuple, starts: Sequence[Start]) -> None:
    """Emit the sblocks of a tile on buffers a, b, c from ``starts``.

    Axes of extent one would be simplified away while scheduling, so they are left out.
    """
    if tile.scaled:
        _emit_bytes(tile, buffers, starts)
        return
    (a, b, c), (a0, b0, c0) = buffers, starts
    place = _place
    outer = {"row": tile.rows, "group": tile.groups, "column": tile.columns}
    if tile.clear:
        with _axes("zero", outer) as at:
            T.buffer_store(c, T.float32(0), place(c0, tile.c(at["row"], at["group"], at["column"])))
    if tile.paired:  # words of vector pairs; no division of one axis, which would not match
        width = 1 if tile.over_groups else tile.lanes
        outer["column"] = tile.columns // (2 * width)
        outer["lane"] = width
    reduce = {f"depth{i}": extent for i, (extent, _) in enumerate(tile.depth)}
    with _axes("update", outer, reduce) as at:
        row, group, depth = at["row"], at["group"], [at[name] for name in reduce]
        if tile.dots:
            _add_halves(tile, buffers, starts, (row, group, depth, at["column"]))
            return
        word, columns = at["column"], [at["column"]]
        if tile.paired:
            word = word * width + at["lane"]
            columns = [at["column"] * (2 * width) + half * width + at["lane"] for half in (0, 1)]
        left = a[tuple(place(a0, tile.a(row, group, depth)))]
        right = b[tuple(place(b0, tile.b(group, depth, word)))]
        for half, column in enumerate(columns):
            weight = widen(right, half, 1) if tile.paired else right
            to = place(c0, tile.c(row, group, column))
            T.buffer_store(c, c[tuple(to)] + left * weight, to)


def _add_halves(tile: Tile, buffers: tuple, starts: Sequence[Start], at: tuple) -> None:
    """Add the two products of a word of bfloat16."""
    (a, b, c), (a0, b0, c0), (row, group, depth, column) = buffers, starts, at
    *first, last = _place(a0, tile.a(row, group, depth))
    word = b[tuple(_place(b0, tile.b(group, depth, column)))]
    to = _place(c0, tile.c(row, group, column))
    total = c[tuple(to)]
    for half in range(EACH[tile.form]):
        left = T.cast(a[(*first, last + half)], "int32") << T.int32(16)
        total = total + T.reinterpret("float32", left) * widen(word, half, 1)
    T.buffer_store(c, total, to)


def _emit_bytes(tile: Tile, buffers: tuple, starts: Sequence[Start]) -> None:
    """Emit a tile of bytes: sums as they start, then products one by one, all of them scaled."""
    (a, b, c, s), (a0, b0, c0, s0) = buffers, starts
    outer = {"row": tile.rows, "group": tile.groups, "column": tile.columns}
    steps = {f"depth{i}": extent for i, (extent, _) in enumerate(tile.depth)}

    def touch(at: dict, *, clear: bool) -> None:
        """State whole regions, for what would be found of two places of b has no simple form."""
        to = _place(c0, tile.c(*(at[name] for name in outer)))
        whole = zip((a, b, s), (a0, b0, s0), (tile.span[i] for i in (0, 1, 3)), strict=True)
        reads = [_region(*region) for region in whole]
        T.reads(*([] if clear else [c[tuple(to)]]), *reads)
        T.writes(c[tuple(to)])

    def put(at: dict, number, *, clear: bool) -> None:
        """Add a scaled integer to c."""
        row, group, column = (at[name] for name in outer)
        bits = b[tuple(_place(b0, tile.more(group, column)[1]))]
        scale = s[tuple(_place(s0, tile.s(row)))] * T.reinterpret("float32", bits)
        value, to = T.cast(number, "float32") * scale, _place(c0, tile.c(row, group, column))
        T.buffer_store(c, value if clear else c[tuple(to)] + value, to)

    with _axes("start", outer) as at:
        touch(at, clear=tile.clear)
        index = _place(b0, tile.more(at["group"], at["column"])[0])
        put(at, b[tuple(index)], clear=tile.clear)
    with _axes("update", outer, steps) as at:
        touch(at, clear=False)
        depth = [at[name] for name in steps]
        *first, last = _place(a0, tile.a(at["row"], at["group"], depth))
        word = b[tuple(_place(b0, tile.b(at["group"], depth, at["column"])))]
        total = T.int32(0)
        for i in range(EACH[tile.form]):  # no axis: its shifts would be simplified in two ways
            byte = (word << T.int32(24 - 8 * i)) >> T.int32(24)
            total = total + T.cast(a[(*first, last + i)], "int32") * byte
        put(at, total, clear=False)


def _place(start: Start, index: tuple) -> list:
    return [s + i for s, i in zip(start, index, strict=True)]


def touch_tile(tile: Tile, buffers: tuple, starts: Sequence[Start]) -> None:
    """State what the sblock around a tile reads and writes."""
    a, b, c, *s = (
        _region(buffer, start, shape)
        for buffer, start, shape in zip(buffers, starts, tile.span, strict=True)
    )
    T.reads(*([a, b] if tile.clear else [c, a, b]), *s)
    T.writes(c)


def _region(buffer, start: Start, shape: tuple[int, ...]):
    """Return the region of ``shape`` from ``start``."""
    return buffer[tuple(slice(s, s + extent) for s, extent in zip(start, shape, strict=True))]


def widen(words, half: int, lanes: int):
    """Return one bfloat16 of each word of a vector as float32: exact, by a shift or a mask."""
    splat = (lambda v: T.int32(v)) if lanes == 1 else (lambda v: T.broadcast(T.int32(v), lanes))
    bits = words & splat(HIGH) if half else words << splat(16)
    return T.reinterpret("float32" if lanes == 1 else f"float32x{lanes}", bits)


@contextmanager
def _axes(name: str, spatial: dict[str, int], reduce: dict[str, int] | None = None):
    """Open loops and an sblock over all axes of more than one step; yield them by name."""
    real = {n: e for n, e in spatial.items() if e > 1}
    inner = {n: e for n, e in (reduce or {}).items() if e > 1}
    with loops(*real.values(), *inner.values()) as variables:
        outer = list(zip(real.values(), variables, strict=False))
        rest = list(zip(inner.values(), variables[len(real) :], strict=True))
        with block(name, outer, rest) as found:
            at = dict.fromkeys([*spatial, *(reduce or {})], i64(0))
            yield at | dict(zip([*real, *inner], found, strict=True))
