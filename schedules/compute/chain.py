"""What a structured operator computes, independent of any target: the stages of a `Program`.

Rows go through all stages block by block, so that features between two factors stay in cache. A
matrix product is made of tiles, each an sblock ``product`` that a target tensorises: `Tile` says
what such a block computes, and `emit_tile` writes it, here for the kernel and once more as the
description of the intrinsic. Permutations are strides of a tile. Everything else (copies,
transposes, butterflies, the epilogue) is loops over whole vectors.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace

from tvm import tirx
from tvm.script.ir_builder import tirx as T

from tvmstruct.schedules.builder import argument, block, i64, loops, prim_func, symbol
from tvmstruct.schedules.compute.dense import ACTIVATIONS, Epilogue, Segment, row_segments
from tvmstruct.schedules.compute.layer_norm import RowNorm
from tvmstruct.stages import Copy, Dim, Hadamard, MatMul, Program, Stage, X, Y, Zero, separable

PRODUCT = "product"  # name of the sblocks to tensorise
TILE = "tvmstruct.tile"  # their annotation: which tile of the definition they compute
GAP = 16  # features between two rows of scratch: rows a power of two apart share cache sets
BUSY = 8  # independent sums that hide the latency of an addition
HIGH = -65536  # 0xffff0000: the upper half of a word


@dataclass(frozen=True)
class RowNest:
    """How rows are cut: ``block`` of them pass all stages together, ``heights`` fit in registers.

    The threads, of which there are ``workers``, share the blocks ("rows"), the tiles of each stage
    of over ``shared_macs`` ("stages") or nothing ("none"). A tile has at most ``sums`` vectors,
    summed over ``depth`` products at a time.
    """

    heights: tuple[int, ...]
    block: int
    threads: str
    sums: int
    workers: int = 1
    shared_macs: int = 0
    depth: int = 256


@dataclass(frozen=True)
class Tile:
    """``c[row, g, q] (+)= sum_p a[row, g, p] * b[g, p, q]`` for a few rows, groups and outputs.

    Strides are those of the flat index of a feature. A row of ``a`` or ``c`` is an axis of its
    own where ``a_row`` or ``c_row`` is None, else that many elements away. ``columns`` are single
    outputs; vectors run along the groups where ``over_groups``, else along the columns. A word of
    ``b`` holds bfloat16 for two neighbouring vectors where ``paired``.
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
    paired: bool
    clear: bool  # whether c starts from zero

    @property
    def span(self) -> tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]:
        """Shapes of the regions of a, b and c that hold all elements."""
        a = (self.groups - 1) * self.a_group + sum((e - 1) * s for e, s in self.depth) + 1
        c = (self.groups - 1) * self.c_group + (self.columns - 1) * self.c_column + 1
        b = sum((e - 1) * s for (e, _), s in zip(self.depth, self.b_depth, strict=True))
        words = self.columns // 2 if self.paired else self.columns
        b += (self.groups - 1) * self.b_group + (words - 1) * self.b_column + 1
        return self._rows(a, self.a_row), (b,), self._rows(c, self.c_row)

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
        for i, stride in zip(at, self.b_depth, strict=True):
            index = index + i * stride
        return (index,)

    def c(self, row, group, column) -> tuple:
        """Return where an element of ``c`` lies."""
        return _row_place(row, group * self.c_group + column * self.c_column, self.c_row)


def _row_place(row, index, stride: int | None) -> tuple:
    return (row, index) if stride is None else (row * stride + index,)


Part = tuple[str, object, int]  # an axis of tiles, which part of it, of how many
Start = tuple  # an index of a buffer, onto which the places of a tile are added


def emit_tile(tile: Tile, buffers: tuple, starts: Sequence[Start]) -> None:
    """Emit the sblocks of a tile on buffers a, b, c from ``starts``.

    Axes of extent one would be simplified away while scheduling, so they are left out.
    """
    (a, b, c), (a0, b0, c0) = buffers, starts

    def place(start: Start, index: tuple) -> list:
        return [s + i for s, i in zip(start, index, strict=True)]

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


def touch_tile(tile: Tile, buffers: tuple, starts: Sequence[Start]) -> None:
    """State what the sblock around a tile reads and writes."""
    a, b, c = (
        buffer[tuple(slice(s, s + extent) for s, extent in zip(start, shape, strict=True))]
        for buffer, start, shape in zip(buffers, starts, tile.span, strict=True)
    )
    T.reads(*([a, b] if tile.clear else [c, a, b]))
    T.writes(c)


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


def chain(
    program: Program, nest: RowNest, epilogue: Epilogue, lanes: int, rows: int | None = None
) -> tuple[tirx.PrimFunc, list[Tile]]:
    """Return the definition and the tiles that its product blocks name.

    Arguments are x, the weights, [bias], [residual], [gamma, beta], y; ``rows=None`` is symbolic.
    """
    tiles: dict[Tile, int] = {}

    def body() -> None:
        m = symbol("m") if rows is None else i64(rows)
        kernel = _Kernel(program, nest, epilogue, lanes, tiles)
        kernel.declare(m)
        heights = nest.heights
        if nest.block > heights[0]:
            heights = (nest.block, *heights)
        with T.sblock("root"):  # by hand: a single product would be taken for it
            T.reads()
            T.writes()
            for segment in row_segments(m if rows is None else rows, heights):
                many = segment.height >= nest.heights[0]
                kernel.emit(segment, parallel=nest.threads == "rows" and many)

    return prim_func(body), list(tiles)


@dataclass
class _Kernel:
    """The arguments, and code for one segment of rows after the other."""

    program: Program
    nest: RowNest
    epilogue: Epilogue
    lanes: int
    tiles: dict[Tile, int]
    arguments: dict = field(default_factory=dict)

    def declare(self, m) -> None:
        sizes, weights = self.program.sizes, self.program.weights
        self.x = argument("x", (m, i64(sizes[X])))
        self.weights = [
            argument(
                f"w{i}",
                (i64(self.program.words(i)),),
                "int32" if i in self.program.pairs else "float32",
            )
            for i, _ in enumerate(weights)
        ]
        self.bias = argument("bias", (i64(sizes[Y]),)) if self.epilogue.bias else None
        residual = self.epilogue.residual
        self.residual = argument("residual", (m, i64(sizes[Y]))) if residual else None
        self.norm = RowNorm.declare(self.lanes, sizes[Y], self.epilogue.norm)
        self.y = argument("y", (m, i64(sizes[Y])))

    def emit(self, segment: Segment, *, parallel: bool) -> None:
        """Emit all stages for the row blocks of a segment, each an sblock of its own."""
        count, height = segment.count, segment.height
        scratch = [
            _Scratch(T.sblock_alloc_buffer((i64(height * (size + GAP)),), "float32"), size + GAP)
            if size
            else None
            for size in self.program.sizes[Y + 1 :]
        ]

        def rows(first) -> _Block:
            buffers = [_Rows(self.x, first), _Rows(self.y, first), *scratch]
            return _Block(self, first, height, buffers)

        if isinstance(count, tirx.IntImm) and int(count) == 1:
            self._stages(rows(segment.start))
            return
        with loops(count, kind=T.parallel if parallel else None) as (t,):
            with block("rows", [(count, t)]) as (vt,):
                work = rows(segment.start + vt * height)
                self.touch(work)
                self._stages(work)

    def touch(self, work: _Block) -> None:
        """State what a block of rows reads and writes: else small buffers inside would be named."""

        def rows(buffer):
            return buffer[work.first : work.first + work.height, 0 : buffer.shape[1]]

        own = [s.buffer[0 : s.buffer.shape[0]] for s in work.buffers[Y + 1 :] if s is not None]
        flat = [*self.weights, *([self.bias] if self.bias is not None else [])]
        flat += [self.norm.gamma, self.norm.beta] if self.norm is not None else []
        reads = [self.x, *([self.residual] if self.residual is not None else []), self.y]
        T.reads(*map(rows, reads), *(b[0 : b.shape[0]] for b in flat), *own)
        T.writes(rows(self.y), *own)

    def _stages(self, work: _Block) -> None:
        stages = list(self.program.stages)
        while stages:
            shards = work.shards(*stages[:2]) if len(stages) > 1 else 1
            if shards > 1:
                work.emit_shards(stages.pop(0), stages.pop(0), shards)
            else:
                work.emit(stages.pop(0))
        work.finish()


@dataclass(frozen=True)
class _Rows:
    """Rows of an argument from ``first``."""

    buffer: object
    first: object
    stride: int | None = None

    def at(self, row, index) -> tuple:
        return (self.first + row, index)


@dataclass(frozen=True)
class _Scratch:
    """Rows of scratch, flat: TVM would compact the gap between rows of a second axis away."""

    buffer: object
    stride: int

    def at(self, row, index) -> tuple:
        return (row * self.stride + index,)


@dataclass
class _Block:
    """Code of the stages for ``height`` rows from ``first``."""

    kernel: _Kernel
    first: object
    height: int
    buffers: list

    def emit(self, stage: Stage) -> None:
        if isinstance(stage, MatMul):
            self._multiply(stage)
        elif isinstance(stage, Copy):
            self._copy(stage)
        elif isinstance(stage, Zero):
            self._zero(stage)
        else:
            self._hadamard(stage)

    def _shared(self, macs: int) -> bool:
        """Return whether threads share so many multiply-adds for each row of the block.

        One row waits for its weights as long as two rows take to multiply.
        """
        nest = self.kernel.nest
        return nest.threads == "stages" and macs * max(2, self.height) > nest.shared_macs

    def shards(self, a: Stage, b: Stage) -> int:
        """Return into how many independent parts two stages fall, one for each thread, or 1."""
        if not (isinstance(a, MatMul) and isinstance(b, MatMul) and separable(a, b)):
            return 1
        if not self._shared(a.macs + b.macs):
            return 1
        columns, groups = a.q // self._tile(a).columns, b.groups // self._tile(b).groups
        most = self.kernel.nest.workers
        return next(n for n in range(most, 0, -1) if columns % n == 0 and groups % n == 0)

    def emit_shards(self, a: MatMul, b: MatMul, shards: int) -> None:
        """Emit two products such that a thread reads in the second what it wrote in the first."""
        with loops(shards, kind=T.parallel) as (t,):
            with block("shard", [(shards, t)]) as (shard,):
                self.kernel.touch(self)
                self._multiply(a, ("column", shard, shards))
                self._multiply(b, ("group", shard, shards))

    def _multiply(self, s: MatMul, part: Part | None = None) -> None:
        """Cover a product with tiles; a long depth goes in chunks, from a zeroed or an old dst."""
        rest = self._uneven(s) if part is None else 0
        if rest:
            even = s.groups - rest
            src, dst = s.src_offset + even * s.src_group, s.dst_offset + even * s.dst_group
            self._multiply(replace(s, groups=even))
            self._multiply(replace(s, groups=rest, src_offset=src, dst_offset=dst))
            return
        tile = self._tile(s)
        (extent, stride), *more = s.depth
        chunk = _divisor(extent, self.kernel.nest.depth) if not more else extent
        if chunk == extent:
            self._tiles(s, replace(tile, clear=not s.accumulate), (0, 1), part)
            return
        tile = replace(tile, depth=((chunk, stride),))
        self._tiles(s, replace(tile, clear=not s.accumulate), (0, 1), part)
        self._tiles(s, replace(tile, clear=False), (1, extent // chunk), part)

    def _uneven(self, s: MatMul) -> int:
        """Return how many groups to set apart, where too few divide a tile's worth of them."""
        if not s.shared or s.vector == "group":
            return 0
        rows, limit = self._rows(s), self._lines(s) // self._rows(s)
        if rows * _divisor(s.groups, max(1, limit)) * s.tile >= BUSY:
            return 0
        tiles = -(-s.groups // limit)
        return s.groups % -(-s.groups // tiles)

    def _lines(self, s: MatMul) -> int:
        """Return how many vectors of ``s.tile`` sums fit in registers."""
        return max(1, self.kernel.nest.sums // s.tile)

    def _rows(self, s: MatMul) -> int:
        """Return the rows of a tile."""
        return _divisor(min(self.height, self.kernel.nest.heights[0]), self._lines(s))

    def _tile(self, s: MatMul) -> Tile:
        """Return the largest tile whose sums fit in registers."""
        rows, words = self._rows(s), 2 if s.paired else 1
        if s.vector == "group":
            each = 1 if s.shared else s.lanes
            groups, columns, width = s.lanes, s.tile, s.tile * each
            b_group, b_column = 0 if s.shared else 1, each
        else:
            limit = max(1, self._lines(s) // rows) if s.shared else 1
            groups, columns, width = _divisor(s.groups, limit), s.tile * s.lanes, s.tile * s.lanes
            b_group, b_column = 0, 1
        inner = [width // words]
        for extent, _ in reversed(s.depth[1:]):
            inner.insert(0, inner[0] * extent)
        return Tile(
            rows=rows,
            groups=groups,
            depth=s.depth,
            columns=columns,
            lanes=s.lanes,
            over_groups=s.vector == "group",
            a_row=self.buffers[s.src].stride,
            a_group=s.src_group,
            b_group=b_group,
            b_column=b_column,
            b_depth=tuple(inner),
            c_row=self.buffers[s.dst].stride,
            c_group=s.dst_group,
            c_column=s.dst_q,
            paired=s.paired,
            clear=True,
        )

    def _tiles(self, s: MatMul, tile: Tile, chunks: tuple[int, int], part: Part | None) -> None:
        """Loop over the tiles of a part of a product and of some chunks of its depth."""
        first, stop = chunks
        extents = {
            "group": s.groups // tile.groups,
            "column": s.q // tile.columns,
            "chunk": stop - first,
            "row": self.height // tile.rows,
        }
        src, dst, columns = self.buffers[s.src], self.buffers[s.dst], extents["column"]
        panels = (1 if s.shared else extents["group"]) * columns
        panel_size = self.kernel.program.words(s.weight) // panels
        (steps, stride), *_ = tile.depth
        with self._turns(extents, part, shared=part is None and self._shared(s.macs)) as at:
            chunk = at["chunk"] + first
            row, group = at["row"] * tile.rows, at["group"] * tile.groups
            q = at["column"] * tile.columns
            panel = (i64(0) if s.shared else at["group"]) * columns + at["column"]
            starts = (
                src.at(row, s.src_offset + group * s.src_group + chunk * (steps * stride)),
                (panel * panel_size + chunk * (steps * tile.b_depth[0]),),
                dst.at(row, s.dst_offset + group * s.dst_group + q * s.dst_q),
            )
            self._declare(tile, (src.buffer, self.kernel.weights[s.weight], dst.buffer), starts)

    @contextmanager
    def _turns(self, extents: dict[str, int], part: Part | None, *, shared: bool) -> Iterator[dict]:
        """Loop over tiles and open the product's sblock: rows innermost, groups with columns."""
        if part is not None:
            extents = extents | {part[0]: extents[part[0]] // part[2]}
        turns, columns = extents["group"] * extents["column"], extents["column"]
        real = {"turn": turns, "chunk": extents["chunk"], "row": extents["row"]}
        real = {name: extent for name, extent in real.items() if extent > 1}
        with loops(*real.values(), kind=T.parallel if shared and turns > 1 else None) as variables:
            found = dict(zip(real, variables, strict=True))
            turn = found.pop("turn", i64(0))
            found |= {"group": turn // columns, "column": turn % columns}
            with T.sblock(PRODUCT):
                at = dict.fromkeys(extents, i64(0))
                for name, extent in extents.items():
                    if extent > 1:
                        axis = T.axis.reduce if name == "chunk" else T.axis.spatial
                        at[name] = axis(i64(extent), found[name])
                if part is not None:
                    at[part[0]] = at[part[0]] + part[1] * extents[part[0]]
                yield at

    def _declare(self, tile: Tile, buffers: tuple, starts: tuple) -> None:
        """State what a product block touches, name its tile, and emit it."""
        number = self.kernel.tiles.setdefault(tile, len(self.kernel.tiles))
        touch_tile(tile, buffers, starts)
        T.sblock_attr({TILE: number})
        emit_tile(tile, buffers, starts)

    def load(self, buffer: int, row, index, lanes: int = 1):
        held = self.buffers[buffer]
        return held.buffer[_vector(held.at(row, index), lanes)]

    def save(self, buffer: int, row, index, value, lanes: int = 1) -> None:
        held = self.buffers[buffer]
        T.buffer_store(held.buffer, value, list(_vector(held.at(row, index), lanes)))

    def _copy(self, s: Copy) -> None:
        square = _square(s, self.kernel.lanes)
        if square is not None:
            self._transpose(s, *square)
            return
        *outer, (extent, stride) = s.dims or ((1, 1),)
        runs = self._runs(extent) if stride == 1 else [(0, extent, 1)]
        for start, count, lanes in runs:
            with loops(self.height, *(e for e, _ in outer), count) as (row, *at, last):
                src, place = _walk(outer, at, s.src_offset)
                last = start + last * lanes
                self._move(s, row, src + last * stride, place * extent + last, lanes)

    def _move(self, s: Copy, row, src, place, lanes: int) -> None:
        value = self.load(s.src, row, src, lanes)
        if s.weight is not None:
            value = value * self.kernel.weights[s.weight][_vector((place,), lanes)]
        if s.accumulate:
            value = value + self.load(s.dst, row, s.dst_offset + place, lanes)
        self.save(s.dst, row, s.dst_offset + place, value, lanes)

    def _transpose(self, s: Copy, side: int, lanes: int) -> None:
        """Copy ``[..., q, g]`` from where q lies in runs: squares turned inside registers."""
        *outer, (q, _), (g, stride) = s.dims
        whole, rest = divmod(q, lanes)
        with loops(self.height, *(e for e, _ in outer), g // side) as (row, *at, band):
            src, place = _walk(outer, at, s.src_offset)
            src, place = src + band * (side * stride), place * (q * g) + band * side

            def turn(first) -> None:
                """Turn ``side`` vectors of ``lanes`` consecutive q into runs of g."""
                rows = [self.load(s.src, row, src + i * stride + first, lanes) for i in range(side)]
                step = lanes if side == g else g
                for i, value in enumerate(transposed(rows, lanes)):
                    to = s.dst_offset + place + first * g + i * step
                    self.save(s.dst, row, to, value, lanes)

            with loops(whole) as (chunk,):
                turn(chunk * lanes)
            if rest:  # the last square overlaps the one before it
                turn(i64(q - lanes))

    def _zero(self, s: Zero) -> None:
        for start, count, lanes in self._runs(s.stop - s.start):
            with loops(self.height, count) as (row, i):
                zero = _splat(0.0, lanes)
                self.save(s.dst, row, s.start + start + i * lanes, zero, lanes)

    def _hadamard(self, s: Hadamard) -> None:
        half = 1
        while half < s.n:
            self._butterflies(s, half)
            half *= 2
        if s.scale != 1.0 or s.n == 1:
            for start, count, lanes in self._runs(s.n * s.blocks):
                with loops(self.height, count) as (row, i):
                    at = start + i * lanes
                    value = self.load(s.dst, row, at, lanes) * _splat(s.scale, lanes)
                    self.save(s.dst, row, at, value, lanes)

    def _butterflies(self, s: Hadamard, half: int) -> None:
        lanes = next(v for v in (self.kernel.lanes, 8, 4, 2, 1) if half % v == 0)
        pairs, steps = s.n * s.blocks // (2 * half), half // lanes
        with loops(self.height, pairs, steps) as (row, pair, i):
            low = pair * (2 * half) + i * lanes
            both = T.alloc_buffer((2 * lanes,), "float32", scope="global")
            for part in (0, 1):
                value = self.load(s.dst, row, low + part * half, lanes)
                T.buffer_store(both, value, list(_vector((part * lanes,), lanes)))
            a, b = (both[_vector((part * lanes,), lanes)] for part in (0, 1))
            self.save(s.dst, row, low, a + b, lanes)
            self.save(s.dst, row, low + half, a - b, lanes)

    def finish(self) -> None:
        """Apply the epilogue while the rows are still in cache."""
        kernel, epilogue = self.kernel, self.kernel.epilogue
        if replace(epilogue, norm=None) != Epilogue():
            self._finish()
        if kernel.norm is not None:
            kernel.norm.emit(kernel.y, self.first, self.height, parallel=False)

    def _finish(self) -> None:
        """Apply bias, activation and residual."""
        kernel, epilogue = self.kernel, self.kernel.epilogue
        for start, count, lanes in self._runs(kernel.program.sizes[Y]):
            with loops(self.height, count) as (row, i):
                at = start + i * lanes
                value = self.load(Y, row, at, lanes)
                if kernel.bias is not None:
                    value = value + kernel.bias[_vector((at,), lanes)]
                value = ACTIVATIONS[epilogue.activation](value)
                if kernel.residual is not None:
                    value = value + kernel.residual[_vector((self.first + row, at), lanes)]
                self.save(Y, row, at, value, lanes)

    def _runs(self, n: int) -> list[tuple[int, int, int]]:
        """Cut n features into (start, vectors, lanes) runs with ever fewer lanes."""
        start, runs = 0, []
        for lanes in (self.kernel.lanes, 4, 1):
            count = (n - start) // lanes
            if count:
                runs.append((start, count, lanes))
                start += count * lanes
        return runs


def _walk(dims: list[Dim], at: list, offset: int) -> tuple:
    """Return where a step of a nest reads, and how many steps came before it."""
    src, place = i64(offset), i64(0)
    for i, (extent, stride) in zip(at, dims, strict=True):
        src, place = src + i * stride, place * extent + i
    return src, place


def _square(s: Copy, most: int) -> tuple[int, int] | None:
    """Return the vectors and their lanes of the squares that turn ``[..., q, g]``, if it is one."""
    if len(s.dims) < 2 or s.weight is not None or s.accumulate:
        return None
    (q, along), (g, stride) = s.dims[-2:]
    if along != 1 or stride == 1:
        return None
    for lanes in (v for v in (16, 8, 4) if v <= min(most, q)):
        side = next(v for v in (lanes, 8, 4, 2, 1) if v <= lanes and g % v == 0)
        if side > 1 and side in (g, lanes):
            return side, lanes
    return None


def transposed(rows: list, lanes: int) -> list:
    """Return the elements of ``rows``, vectors of ``lanes``, column after column.

    Riffling the first half of the vectors into the second, once for each power of two in their
    number, is a transposition: two shuffles of a pair of vectors per pair and round.
    """
    side, take = len(rows), range(lanes)
    low = [tirx.const(i // 2 + lanes * (i % 2), "int32") for i in take]
    high = [tirx.const((lanes + i) // 2 + lanes * (i % 2), "int32") for i in take]
    count = side
    while count > 1:
        kept = [_keep(row, lanes) for row in rows]
        pairs = [(kept[i], kept[i + side // 2]) for i in range(side // 2)]
        rows = [
            tirx.Shuffle([_kept(a, lanes), _kept(b, lanes)], order)
            for a, b in pairs
            for order in (low, high)
        ]
        count //= 2
    return rows


def _keep(value, lanes: int):
    """Hold a vector in a buffer of its own, so that two uses of it compute it once."""
    held = T.alloc_buffer((lanes,), "float32", scope="global")
    T.buffer_store(held, value, [T.ramp(0, 1, lanes)])
    return held


def _kept(held, lanes: int):
    return held[T.ramp(0, 1, lanes)]


def _divisor(of: int, most: int) -> int:
    """Return the largest divisor up to ``most``."""
    return next(d for d in range(min(of, most), 0, -1) if of % d == 0)


def _vector(index: tuple, lanes: int) -> tuple:
    """Turn the last index into a vector of consecutive indices."""
    return index if lanes == 1 else (*index[:-1], T.ramp(index[-1], 1, lanes))


def _splat(value: float, lanes: int):
    return T.float32(value) if lanes == 1 else T.broadcast(T.float32(value), lanes)
