"""What a structured operator computes, independent of any target: the stages of a `Program`.

Rows go through all stages block by block, so that features between two factors stay in cache. A
matrix product is made of tiles (see ``product_tile.py``), each an sblock ``product`` that a target
tensorises; everything else is loops over whole vectors (``row_steps.py``).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field, replace

from tvm import tirx
from tvm.script.ir_builder import tirx as T

from tvmstruct.rounding import BYTES, Round
from tvmstruct.schedules.builder import argument, block, i64, loops, prim_func, symbol
from tvmstruct.schedules.compute.dense import Epilogue, Segment, depth_step, row_segments
from tvmstruct.schedules.compute.layer_norm import RowNorm
from tvmstruct.schedules.compute.product_tile import Tile, emit_tile, touch_tile
from tvmstruct.schedules.compute.row_steps import Rows, RowSteps, Scratch
from tvmstruct.schedules.compute.row_words import round_rows
from tvmstruct.schedules.compute.team import alone, barrier
from tvmstruct.stages import MatMul, Program, Stage, X, Y, separable

PRODUCT = "product"  # name of the sblocks to tensorise
TILE = "tvmstruct.tile"  # their annotation: which tile of the definition they compute
GAP = 16  # features between two rows of scratch: rows a power of two apart share cache sets
LINE = 64  # bytes, the same for rows of bytes
OPERANDS = 4  # vectors that a tile over groups reads and uses more than once
BUSY = 8  # independent sums that hide the latency of an addition


@dataclass(frozen=True)
class RowNest:
    """How rows are cut: ``block`` of them pass all stages together, ``heights`` fit in registers.

    The threads, of which there are ``workers``, share the blocks ("rows"), the parts of a program
    or the tiles of each stage of over ``shared_macs`` ("stages"), as a team those of every stage
    ("team"), or nothing ("none"). A tile has at most ``sums`` vectors.
    """

    heights: tuple[int, ...]
    block: int
    threads: str
    sums: int
    workers: int = 1
    shared_macs: int = 0


Part = tuple[str, object, int]  # an axis of tiles, which part of it, of how many


def chain(
    program: Program,
    nest: RowNest,
    epilogue: Epilogue,
    lanes: int,
    rows: int | None = None,
    llvm: str = "",
) -> tuple[tirx.PrimFunc, list[Tile]]:
    """Return the definition and the tiles that its product blocks name.

    Arguments are x, the weights, [bias], [residual], [gamma, beta], y; ``rows=None`` is symbolic.
    ``llvm`` is source of functions that are called.
    """
    tiles: dict[Tile, int] = {}

    def body() -> None:
        m = symbol("m") if rows is None else i64(rows)
        kernel = _Kernel(program, nest, epilogue, lanes, tiles)
        kernel.declare(m)
        heights = nest.heights
        if nest.block > heights[0]:
            heights = (nest.block, *heights)
        with ExitStack() as stack:
            stack.enter_context(T.sblock("root"))  # by hand: a single product would be taken for it
            T.reads()
            T.writes()
            if llvm:
                stack.enter_context(T.attr(T.int64(0), "pragma_import_llvm", llvm))
            for segment in row_segments(m if rows is None else rows, heights):
                many = segment.height >= nest.heights[0]
                kernel.emit(segment, parallel=nest.threads == "rows" and many)

    return prim_func(body), list(tiles)


@dataclass(frozen=True)
class StagedProduct:
    """The stages of a program between two flat buffers inside another kernel, ``height`` rows."""

    program: Program
    nest: RowNest
    lanes: int
    tiles: dict[Tile, int]  # of all products of that kernel
    height: int

    def scratch(self) -> list[int]:
        """Return the elements of the buffers between the stages, 0 for one that is not used."""
        return [self.height * (n + GAP) if n else 0 for n in self.program.sizes[Y + 1 :]]

    def emit(self, source: Scratch, target: Scratch, weights: list, between: list) -> None:
        """Emit the stages on rows of ``source`` and ``target``; ``between`` are the others."""
        kernel = _Kernel(self.program, self.nest, Epilogue(), self.lanes, self.tiles, weights)
        sizes = self.program.sizes[Y + 1 :]
        own = [
            None if buffer is None else Scratch(buffer, size + GAP)
            for buffer, size in zip(between, sizes, strict=True)
        ]
        kernel.stages(_Block(kernel, i64(0), self.height, [source, target, *own]))


@dataclass(frozen=True)
class StagedRows:
    """The stages of a program, and its epilogue, between rows of two buffers of another kernel."""

    program: Program
    nest: RowNest
    epilogue: Epilogue
    lanes: int
    tiles: dict[Tile, int]  # of all products of that kernel
    rows: int
    weights: list
    bias: tirx.Buffer | None = None
    residual: tirx.Buffer | None = None
    norm: RowNorm | None = None

    def allocate(self) -> list:
        """Allocate the buffers between the stages in the block at hand."""
        return _between(self.program, self.rows)

    def emit(self, x: tirx.Buffer, y: tirx.Buffer, between: list, first: object) -> None:
        """Emit everything from the rows of ``x`` to those of ``y``, from ``first`` on."""
        kernel = _Kernel(
            self.program, self.nest, self.epilogue, self.lanes, self.tiles,
            self.weights, self.bias, self.residual, self.norm,
        )  # fmt: skip
        kernel.x, kernel.y = x, y
        work = _Block(kernel, first, self.rows, [Rows(x, first), Rows(y, first), *between])
        if self.nest.threads != "rows":
            kernel.stages(work)
            return
        with block("member", []):
            kernel.touch(work)
            kernel.stages(work)


def _between(program: Program, height: int) -> list:
    """Allocate what ``height`` rows need between the stages."""
    numbers = range(Y + 1, len(program.sizes))
    return [_scratch(program, i, height) if program.sizes[i] else None for i in numbers]


def _scratch(program: Program, number: int, height: int) -> Scratch:
    """Allocate a buffer between stages."""
    size, dtype = program.sizes[number], program.types.get(number, "float32")
    stride = size + GAP if dtype == "float32" else -(-size // LINE) * LINE + LINE
    return Scratch(T.sblock_alloc_buffer((i64(height * stride),), dtype), stride)


@dataclass
class _Kernel:
    """The arguments, and code for one segment of rows after the other."""

    program: Program
    nest: RowNest
    epilogue: Epilogue
    lanes: int
    tiles: dict[Tile, int]
    weights: list = field(default_factory=list)
    bias: tirx.Buffer | None = None
    residual: tirx.Buffer | None = None
    norm: RowNorm | None = None

    def declare(self, m) -> None:
        sizes, weights = self.program.sizes, self.program.weights
        self.x = argument("x", (m, i64(sizes[X])))
        self.weights = [
            argument(
                f"w{i}",
                (i64(self.program.words(i) * self.program.parts),),
                self.program.type(i),
            )
            for i, _ in enumerate(weights)
        ]
        n = self.program.n_out
        self.bias = argument("bias", (i64(n),)) if self.epilogue.bias else None
        self.residual = argument("residual", (m, i64(n))) if self.epilogue.residual else None
        self.norm = RowNorm.declare(self.lanes, n, self.epilogue.norm)
        self.y = argument("y", (m, i64(n)))

    def emit(self, segment: Segment, *, parallel: bool) -> None:
        """Emit all stages for the row blocks of a segment, each an sblock of its own."""
        count, height = segment.count, segment.height
        scratch = _between(self.program, height)

        def rows(first) -> _Block:
            buffers = [Rows(self.x, first), Rows(self.y, first), *scratch]
            return _Block(self, first, height, buffers)

        if isinstance(count, tirx.IntImm) and int(count) == 1:
            self.stages(rows(segment.start))
            return
        with loops(count, kind=T.parallel if parallel else None) as (t,):
            with block("rows", [(count, t)]) as (vt,):
                work = rows(segment.start + vt * height)
                self.touch(work)
                self.stages(work)

    def touch(self, work: _Block) -> None:
        """State what a block of rows reads and writes: else small buffers inside would be named."""
        x, y, *own = (b.region(work.height) for b in work.buffers if b is not None)
        flat = [*self.weights, *([self.bias] if self.bias is not None else [])]
        flat += [self.norm.gamma, self.norm.beta] if self.norm is not None else []
        more = [] if self.residual is None else [Rows(self.residual, work.first)]
        T.reads(
            x, y, *(r.region(work.height) for r in more), *(b[0 : b.shape[0]] for b in flat), *own
        )
        T.writes(y, *own)

    def stages(self, work: _Block) -> None:
        """Emit all stages of all parts for a block of rows, and the epilogue."""
        parts = self.program.parts
        if parts == 1:
            self._part(work)
        else:
            steps = sum(product.steps for product in self.program.products) * parts
            kind = T.parallel if work.shared(steps) else None
            with work.wait(), loops(parts, kind=kind) as (t,):
                with block("part", [(parts, t)]) as (part,):
                    self.touch(work)
                    self._part(work.of_part(part))
        work.finish()

    def _part(self, work: _Block) -> None:
        """Emit all stages of a part."""
        stages = list(self.program.stages)
        while stages:
            shards = work.shards(*stages[:2]) if len(stages) > 1 else 1
            if shards > 1:
                work.emit_shards(stages.pop(0), stages.pop(0), shards)
            else:
                work.emit(stages.pop(0))


@dataclass
class _Block:
    """Code of the stages for ``height`` rows from ``first``."""

    kernel: _Kernel
    first: object
    height: int
    buffers: list
    part: object | None = None  # which one, where there are more

    def of_part(self, part) -> _Block:
        """Return the code of one part: its features of y, its weights."""
        x, y, *own = self.buffers
        y = replace(y, column=part * self.kernel.program.sizes[Y])
        return replace(self, buffers=[x, y, *own], part=part)

    def emit(self, stage: Stage) -> None:
        """Emit one stage."""
        if isinstance(stage, MatMul):
            self._multiply(stage)
            return
        with self._alone():
            if isinstance(stage, Round):
                round_rows(stage, self._steps)
            else:
                self._steps.emit(stage)

    def finish(self) -> None:
        """Apply the epilogue while the rows are still in cache."""
        if self.kernel.epilogue == Epilogue():
            return
        with self._alone():
            self._finish()

    def _finish(self) -> None:
        kernel, epilogue = self.kernel, self.kernel.epilogue
        if replace(epilogue, norm=None) != Epilogue():
            residual = None if kernel.residual is None else Rows(kernel.residual, self.first)
            n = kernel.program.n_out
            self._steps.finish(n, epilogue.activation, kernel.bias, residual)
        if kernel.norm is not None:
            kernel.norm.emit(kernel.y, self.first, self.height, parallel=False)

    @property
    def _steps(self) -> RowSteps:
        kernel = self.kernel
        starts = [self._start(i) for i in range(len(kernel.weights))]
        return RowSteps(kernel.lanes, self.height, self.buffers, kernel.weights, starts)

    def _start(self, weight: int):
        """Return where the weight of a part starts."""
        return i64(0) if self.part is None else self.part * self.kernel.program.words(weight)

    def shared(self, steps: int) -> bool:
        """Return whether threads share so many multiply-adds for each row of the block.

        One row waits for its weights as long as two rows take to multiply.
        """
        nest = self.kernel.nest
        if self.part is not None:
            return False
        long = steps * max(2, self.height) > nest.shared_macs
        return self._team or (nest.threads == "stages" and long)

    def shards(self, a: Stage, b: Stage) -> int:
        """Return into how many independent parts two stages fall, one for each thread, or 1."""
        if not (isinstance(a, MatMul) and isinstance(b, MatMul) and separable(a, b)):
            return 1
        if not self.shared(a.steps + b.steps):
            return 1
        columns, groups = a.q // self._tile(a).columns, b.groups // self._tile(b).groups
        most = self.kernel.nest.workers
        return next(n for n in range(most, 0, -1) if columns % n == 0 and groups % n == 0)

    def emit_shards(self, a: MatMul, b: MatMul, shards: int) -> None:
        """Emit two products such that a thread reads in the second what it wrote in the first."""
        with self.wait(), loops(shards, kind=T.parallel) as (t,):
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
        chunk = extent if more or tile.dots else depth_step(extent)
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
        """Return how many lines of ``s.tile`` vectors of sums fit in registers.

        Over groups a line's own operand is a vector too, which takes a register of its own.
        """
        free = OPERANDS if s.vector == "group" else 0
        return max(1, (self.kernel.nest.sums - free) // s.tile)

    def _rows(self, s: MatMul) -> int:
        """Return the rows of a tile."""
        return _divisor(self.height, min(self.kernel.nest.heights[0], self._lines(s)))

    def _tile(self, s: MatMul) -> Tile:
        """Return the largest tile whose sums fit in registers."""
        rows, words = self._rows(s), 2 if s.form == "pairs" else 1
        if s.vector == "group":
            groups, columns = s.lanes, s.tile
            b_group, b_column = 0 if s.shared else 1, s.width // s.tile
        else:
            limit = max(1, self._lines(s) // rows) if s.shared else 1
            groups, columns = _divisor(s.groups, limit), s.tile * s.lanes
            b_group, b_column = 0, 1
        inner = [s.width // words]
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
            form=s.form,
            clear=True,
            b_more=s.words * s.width if s.form == BYTES else 0,
            s_row=0 if s.scale is None else self.buffers[s.scale].stride,
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
        with self._turns(extents, part, shared=part is None and self.shared(s.steps)) as at:
            chunk = at["chunk"] + first
            row, group = at["row"] * tile.rows, at["group"] * tile.groups
            q = at["column"] * tile.columns
            panel = (i64(0) if s.shared else at["group"]) * columns + at["column"]
            starts = (
                src.at(row, s.src_offset + group * s.src_group + chunk * (steps * stride)),
                (self._start(s.weight) + panel * panel_size + chunk * (steps * tile.b_depth[0]),),
                dst.at(row, s.dst_offset + group * s.dst_group + q * s.dst_q),
            )
            buffers = src.buffer, self.kernel.weights[s.weight], dst.buffer
            if s.scale is not None:
                scales = self.buffers[s.scale]
                starts, buffers = (*starts, scales.at(row, i64(0))), (*buffers, scales.buffer)
            self._declare(tile, buffers, starts)

    @contextmanager
    def _turns(self, extents: dict[str, int], part: Part | None, *, shared: bool) -> Iterator[dict]:
        """Loop over tiles and open the product's sblock: rows innermost, groups with columns."""
        if part is not None:
            extents = extents | {part[0]: extents[part[0]] // part[2]}
        turns, columns = extents["group"] * extents["column"], extents["column"]
        real = {"turn": turns, "chunk": extents["chunk"], "row": extents["row"]}
        real = {name: extent for name, extent in real.items() if extent > 1}
        with ExitStack() as stack:
            if part is None and self._team:
                stack.enter_context(barrier() if turns > 1 else alone())
            kind = T.parallel if shared and turns > 1 else None
            variables = stack.enter_context(loops(*real.values(), kind=kind))
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

    @property
    def _team(self) -> bool:
        """Whether all threads of a team pass here, not only the one with this part."""
        return self.kernel.nest.threads == "team" and self.part is None

    def wait(self):
        """Return the end of a loop that threads share: in a team they wait there."""
        return barrier() if self._team else nullcontext()

    def _alone(self):
        """Return where one thread works: in a team the others wait."""
        return alone() if self._team else nullcontext()

    def _declare(self, tile: Tile, buffers: tuple, starts: tuple) -> None:
        """State what a product block touches, name its tile, and emit it."""
        number = self.kernel.tiles.setdefault(tile, len(self.kernel.tiles))
        touch_tile(tile, buffers, starts)
        T.sblock_attr({TILE: number})
        emit_tile(tile, buffers, starts)


def _divisor(of: int, most: int) -> int:
    """Return the largest divisor up to ``most``."""
    return next(d for d in range(min(of, most), 0, -1) if of % d == 0)
