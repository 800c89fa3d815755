"""The default schedule: whatever no kernel of ours covers still runs vectorised and parallel.

Every step is tried on a copy of the schedule. A step that does not apply leaves a note in the
attribute ``tvmstruct.schedule_note`` and the next simpler one is tried; the last one is to
leave the loops as they are, which is always right.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

import tvm_ffi
from tvm import tirx
from tvm.ir import Call, Expr, TensorLoad, Var
from tvm.s_tir import Schedule
from tvm.sym import detect_linear_equation
from tvm.tirx import PrimFunc

from tvmstruct.schedules import vector_math
from tvmstruct.schedules.registry import KERNEL
from tvmstruct.targets import Isa

NOTE = "tvmstruct.schedule_note"
PARALLEL_WORK = 32_768  # element operations; below, waking a second thread costs more
EXPENSIVE = frozenset(
    f"tirx.{name}" for name in "exp erf tanh sigmoid log pow sqrt rsqrt sin cos tan atan".split()
)
EXPENSIVE_WEIGHT = 8  # element operations that one of them takes
CONTROL = frozenset(("tirx.if_then_else", "tirx.call_extern", "tirx.call_packed"))
FAILURES = (RuntimeError, ValueError, TypeError)  # what schedule primitives raise
ACCUMULATOR_BYTES = 1024  # LLVM keeps smaller buffers in registers

POWERS: dict[float, Callable[[Expr], Expr]] = {
    0.5: tirx.sqrt,
    1.0: lambda x: x,
    2.0: lambda x: x * x,
    3.0: lambda x: x * x * x,
}

Step = Callable[[Schedule, "_Block", Isa], None]


def schedule_generic(func: PrimFunc, isa: Isa) -> PrimFunc:
    """Return ``func`` inlined, vectorised, parallel where that pays, and without libm calls."""
    if func.attrs and func.attrs.get("tirx.is_scheduled", False):
        return func
    notes: list[str] = []
    scheduled = func
    try:
        sch = Schedule(func)
        names = _leaves(sch)
    except FAILURES as error:
        notes.append(f"kept as written: {_reason(error)}")
        scheduled = _serial_if_small(func)
    else:
        for name in names:
            sch = _attempt(sch, name, isa, [_inline], notes)
        for name in _leaves(sch):
            if name in _leaves(sch):  # an epilogue may have moved into the block before it
                sch = _attempt(sch, name, isa, _steps(sch, name, isa), notes)
        scheduled = sch.mod[sch.mod.get_global_vars()[0]]
    scheduled = vector_math.replace_math(_replace_calls(scheduled))
    if notes:
        scheduled = scheduled.with_attr(NOTE, "; ".join(notes))
    return scheduled.with_attr("tirx.is_scheduled", True).with_attr(KERNEL, "generic")


@dataclass(frozen=True)
class _Block:
    """What the rules look at in one sblock."""

    name: str
    stmt: Any  # tirx.SBlock
    extents: tuple[int | None, ...]  # of the block's axes; None where symbolic
    reduce: tuple[bool, ...]
    loads: tuple[Any, ...]
    calls: frozenset[str]

    @property
    def is_reduction(self) -> bool:
        return any(self.reduce)

    @property
    def work(self) -> int:
        """Element operations; a symbolic axis counts as long."""
        weight = EXPENSIVE_WEIGHT if self.calls & EXPENSIVE else 1
        return weight * prod(PARALLEL_WORK if n is None else n for n in self.extents)

    @property
    def vectorizable(self) -> bool:
        """Whether TVM's vectoriser keeps the body a vector; LLVM may still do it for others."""
        types = {str(load.ty.dtype) for load in self.loads}
        types |= {str(region.source.dtype) for region in self.stmt.writes}
        return "bool" not in types and not self.calls & CONTROL

    def stride(self, access: tuple[Any, Sequence[Expr]], axis: int) -> int | None:
        """Return how far an access moves in memory when ``axis`` grows by one, if constant."""
        buffer, indices = access
        var, step, total = self.stmt.iter_vars[axis].var, 1, 0
        for index, extent in reversed(list(zip(indices, buffer.shape, strict=True))):
            slope, size = _slope(index, var), _constant(extent)
            if slope is None or (size is None and step is not None):
                return None
            total, step = total + slope * step, step * (size or 1)
        return total

    @property
    def accesses(self) -> list[tuple[Any, Sequence[Expr]]]:
        """Return what the body reads, as (buffer, indices), except its own result."""
        written = {region.source.name for region in self.stmt.writes}
        pairs = [(load.source, load.indices) for load in self.loads]
        return [pair for pair in pairs if pair[0].name not in written]

    @property
    def result(self) -> tuple[Any, list[Expr]]:
        """Return the (first) place written, as (buffer, indices)."""
        region = self.stmt.writes[0]
        return region.source, [r.min for r in region.region]


def _leaves(sch: Schedule) -> list[str]:
    """Return the names of the blocks under the root."""
    return [sch.get(b).name_hint for b in sch.get_child_blocks(sch.get_sblock("root"))]


def _examine(sch: Schedule, name: str) -> _Block:
    stmt = sch.get(sch.get_sblock(name))
    loads, calls = [], set()

    def see_load(load: Any) -> None:
        loads.append(load)

    def see_call(call: Call) -> None:
        calls.add(getattr(call.op, "name", ""))

    tvm_ffi.structural_walk(stmt.body, [(TensorLoad, see_load), (Call, see_call)])
    return _Block(
        name,
        stmt,
        tuple(_constant(axis.dom.extent) for axis in stmt.iter_vars),
        tuple(axis.iter_type == tirx.IterVar.CommReduce for axis in stmt.iter_vars),
        tuple(loads),
        frozenset(calls),
    )


def _attempt(sch: Schedule, name: str, isa: Isa, steps: list[Step], notes: list[str]) -> Schedule:
    """Return the schedule after the first of ``steps`` that applies, else ``sch`` as it was."""
    for step in steps:
        trial = sch.copy()
        try:
            step(trial, _examine(trial, name), isa)
        except _NotApplicable:
            continue
        except FAILURES as error:
            notes.append(f"{name}: {step.__name__.strip('_')}: {_reason(error)}")
            continue
        return trial
    return sch


class _NotApplicable(Exception):
    """A step has nothing to do for this block."""


def _inline(sch: Schedule, block: _Block, isa: Isa) -> None:
    """Inline a producer where that repeats no work."""
    consumers = [sch.get(c).name_hint for c in sch.get_consumers(sch.get_sblock(block.name))]
    if block.is_reduction or not consumers:
        raise _NotApplicable
    reads = [_examine(sch, name) for name in consumers]
    cheap = not block.calls & (EXPENSIVE | CONTROL)
    once = len(reads) == 1 and reads[0].work <= max(block.work, prod(map(_or_one, block.extents)))
    trivial = not block.calls and _is_copy(block)
    spatial = not any(consumer.is_reduction for consumer in reads)
    if not (once or (spatial and (cheap or trivial))):
        raise _NotApplicable
    sch.compute_inline(block.name)


def _steps(sch: Schedule, name: str, isa: Isa) -> list[Step]:
    """Return what to try for a block, best first."""
    block = _examine(sch, name)
    if not sch.get_loops(name):
        return []
    if not block.is_reduction:
        return [_vector_map, _plain_map]
    if _reads_along_reduction(block):
        return [_vector_reduction, _plain_reduction]
    return [_register_tile, _stream_tile, _plain_reduction]


def _vector_map(sch: Schedule, block: _Block, isa: Isa) -> None:
    """Schedule an elementwise block: parallel over the outer, vectors along the inner axes."""
    if not block.vectorizable:
        raise _NotApplicable
    outer, inner = _outer_and_inner(sch, block, isa.lanes)
    lanes = _vector_lanes(_extent(sch, inner), isa.lanes)
    if lanes == 1:
        raise _NotApplicable
    rest, vector = sch.split(inner, [None, lanes])
    sch.vectorize(vector)
    few = prod(_extent(sch, loop) or PARALLEL_WORK for loop in outer) < 8
    _parallel(sch, [*outer, rest] if few else outer, block)


def _plain_map(sch: Schedule, block: _Block, isa: Isa) -> None:
    """Schedule a block whose inner loop LLVM vectorises by itself where it can."""
    outer, inner = _outer_and_inner(sch, block, isa.lanes)
    if not outer and block.work >= PARALLEL_WORK:
        outer = [sch.split(inner, [64, None])[0]]
    _parallel(sch, outer, block)


def _vector_reduction(sch: Schedule, block: _Block, isa: Isa) -> None:
    """Reduce along contiguous memory: vectors of partial results, combined at the end."""
    spatial, reduce = _split_loops(sch, block)
    extent = _extent(sch, reduce[-1]) or 1
    # Adding up the lanes takes as long as adding up the vectors when there are equally many.
    widest = 4 if extent >= (4 * isa.lanes) ** 2 else 2 if extent >= (2 * isa.lanes) ** 2 else 1
    lanes = _vector_lanes(extent, isa.lanes, widest)
    if not block.vectorizable or lanes < min(4, isa.lanes) or lanes == extent:
        raise _NotApplicable
    _, vector = sch.split(reduce[-1], [None, lanes])
    partial = sch.rfactor(vector, factor_axis=len(spatial))
    if spatial:
        sch.compute_at(partial, sch.get_loops(block.name)[len(spatial) - 1])
        vector, *others = sch.get_loops(partial)[len(spatial) :]
        sch.reorder(*others, vector)
    else:
        *others, vector = sch.get_loops(partial)
    sch.vectorize(vector)
    if spatial:
        _parallel(sch, sch.get_loops(block.name)[: len(spatial)], block)
    sch.decompose_reduction(partial, others[0])
    sch.decompose_reduction(block.name, sch.get_loops(block.name)[-1])


def _register_tile(sch: Schedule, block: _Block, isa: Isa) -> None:
    """Tile a sum of products: rows times vectors of columns stay in registers."""
    spatial, reduce = _split_loops(sch, block)
    wide = [loop for loop in spatial if (_extent(sch, loop) or 0) > 1]
    if not wide or not block.vectorizable or len(block.stmt.writes) > 1:
        raise _NotApplicable
    column, row = wide[-1], wide[-2] if len(wide) > 1 else None
    size = _extent(sch, column) or 1
    lanes = _vector_lanes(size, isa.lanes)
    if 2 * lanes < isa.lanes:
        raise _NotApplicable
    vectors = next(n for n in (2, 1) if size % (n * lanes) == 0 and n * lanes <= 2 * isa.lanes)
    store = sch.cache_write(block.name, 0, "global")
    _inline_epilogue(sch, store)
    columns, *inner = sch.split(column, [None, vectors, lanes])
    rows = (
        sch.split(row, [None, _tile_rows(_extent(sch, row), vectors * lanes, isa)]) if row else []
    )
    outer = [loop for loop in spatial if loop not in (column, row)] + rows[:1] + [columns]
    sch.reorder(*outer, *reduce, *rows[1:], *inner)
    tile = sch.fuse(*outer)
    sch.reverse_compute_at(store, tile)
    for loop in [*rows[1:], inner[0]]:
        sch.unroll(loop)
    sch.vectorize(inner[1])
    *unrolled, last = sch.get_loops(store)[1:]
    rest, vector = sch.split(last, [None, lanes])
    for loop in [*unrolled, rest]:
        sch.unroll(loop)
    if _examine(sch, sch.get(store).name_hint).vectorizable:
        sch.vectorize(vector)
    _parallel(sch, [tile], block)
    sch.decompose_reduction(block.name, reduce[0])


def _stream_tile(sch: Schedule, block: _Block, isa: Isa) -> None:
    """Add four terms to four rows at a time, for columns that no vector length divides.

    LLVM vectorises the loop over columns, tail included; sixteen products for each load and
    store of a result reach most of the peak.
    """
    spatial, reduce = _split_loops(sch, block)
    wide = [loop for loop in spatial if (_extent(sch, loop) or 2) > 1]
    depth = next((x for x in reversed(reduce) if (_extent(sch, x) or 1) % 4 == 0), reduce[-1])
    if not wide or len(block.stmt.writes) > 1 or block.calls & CONTROL:
        raise _NotApplicable
    column, row = wide[-1], wide[-2] if len(wide) > 1 else None
    terms = next(n for n in (4, 5, 3, 2, 1) if (_extent(sch, depth) or 1) % n == 0)
    outer = [loop for loop in spatial if loop not in (column, row)]
    unrolled = []
    if row is not None:
        few = next(n for n in (4, 3, 2, 1) if (_extent(sch, row) or 1) % n == 0)
        row, within = sch.split(row, [None, few])
        outer, unrolled = [*outer, row], [within]
    blocks, within = sch.split(depth, [None, terms])
    order = [loop for loop in reduce if loop is not depth] + [blocks]
    sch.reorder(*outer, *order, column, within, *unrolled)
    for loop in [within, *unrolled]:
        sch.unroll(loop)
    _parallel(sch, outer, block)
    sch.decompose_reduction(block.name, order[0])


def _plain_reduction(sch: Schedule, block: _Block, isa: Isa) -> None:
    """Reduce in the given order, columns innermost where they are contiguous."""
    spatial, reduce = _split_loops(sch, block)
    if spatial and not _reads_along_reduction(block):
        sch.reorder(*spatial[:-1], *reduce, spatial[-1])
        spatial = spatial[:-1]
    else:
        sch.reorder(*spatial, *reduce)
    _parallel(sch, spatial, block)
    sch.decompose_reduction(block.name, reduce[0])


def _split_loops(sch: Schedule, block: _Block) -> tuple[list, list]:
    """Return the spatial and the reduction loops of a block that nothing has touched."""
    loops = sch.get_loops(block.name)
    if len(loops) != len(block.reduce):
        raise _NotApplicable
    pairs = list(zip(loops, block.reduce, strict=True))
    return [x for x, reduce in pairs if not reduce], [x for x, reduce in pairs if reduce]


def _outer_and_inner(sch: Schedule, block: _Block, lanes: int) -> tuple[list, Any]:
    """Fuse inner loops until a vector fits in; all of them where memory order does not care."""
    *outer, inner = sch.get_loops(block.name)
    while outer and (size := _extent(sch, inner)) is not None:
        if size >= lanes and (size % lanes == 0 or not _is_flat(block)):
            break
        inner = sch.fuse(outer.pop(), inner)
    return outer, inner


def _parallel(sch: Schedule, loops: list, block: _Block) -> None:
    """Fuse ``loops`` and run them on all threads where there is enough to do."""
    if loops and block.work >= PARALLEL_WORK:
        sch.parallel(sch.fuse(*loops))


def _inline_epilogue(sch: Schedule, store: Any) -> None:
    """Apply what follows a sum of products while it is stored, where that is possible."""
    consumers = sch.get_consumers(store)
    if len(consumers) != 1 or _examine(sch, sch.get(consumers[0]).name_hint).is_reduction:
        return
    try:
        sch.reverse_compute_inline(consumers[0])
    except FAILURES:  # it stays a loop of its own, with its own schedule
        return


def _is_flat(block: _Block) -> bool:
    """Return whether every access walks memory as the result does."""
    axes = range(len(block.extents))
    steps = [block.stride(block.result, axis) for axis in axes]
    return None not in steps and all(
        [block.stride(access, axis) for axis in axes] == steps for access in block.accesses
    )


def _reads_along_reduction(block: _Block) -> bool:
    """Return whether the last reduction axis, and no spatial one, is contiguous in memory."""
    last = max(axis for axis, reduce in enumerate(block.reduce) if reduce)
    wide = [
        axis
        for axis, (size, reduce) in enumerate(zip(block.extents, block.reduce, strict=True))
        if size != 1 and not reduce
    ]
    along = any(block.stride(access, last) == 1 for access in block.accesses)
    across = wide and any(block.stride(access, wide[-1]) == 1 for access in block.accesses)
    return along and not across


def _tile_rows(extent: int | None, width: int, isa: Isa) -> int:
    """Return the largest divisor of ``extent`` whose accumulators fit in registers."""
    registers = isa.registers - 2 - max(1, width // isa.lanes)
    most = min(registers * isa.lanes // width, (ACCUMULATOR_BYTES - 1) // (4 * width))
    return next(n for n in range(max(1, most), 0, -1) if (extent or 1) % n == 0)


def _vector_lanes(extent: int | None, lanes: int, widest: int = 1) -> int:
    """Return a vector length that divides ``extent``, whole vectors first; 1 if there is none."""
    if extent is None:
        return 1
    whole = [lanes * n for n in (4, 2, 1) if n <= widest]
    fours = range(2 * lanes - 4, lanes // 2 - 1, -4)
    others = range(2 * lanes - 1, 3, -1)
    return next((n for n in (*whole, *fours, *others) if n >= 4 and extent % n == 0), 1)


def _serial_if_small(func: PrimFunc) -> PrimFunc:
    """Return ``func`` without the parallel loops that TVM's scan and sort kernels always have."""
    sizes = [map(_constant, getattr(buffer, "shape", ())) for buffer in func.params]
    if max((prod(n or PARALLEL_WORK for n in size) for size in sizes), default=0) >= PARALLEL_WORK:
        return func

    def replace(loop: tirx.For) -> tirx.For:
        if loop.kind != tirx.ForKind.PARALLEL:
            return loop
        kind = tirx.ForKind.SERIAL
        return tirx.For(loop.loop_var, loop.min, loop.extent, kind, loop.body)

    return tvm_ffi.structural_map(func, (tirx.For, replace), order="post")


def _replace_calls(func: PrimFunc) -> PrimFunc:
    """Write small constant powers as products, and math on float16 as math on float32."""

    def replace(call: Call) -> Expr:
        name = getattr(call.op, "name", "")
        if name == "tirx.pow":
            build = POWERS.get(float(getattr(call.args[1], "value", "nan")))
            if build is None:
                return call
            steps = vector_math.Steps()
            return steps.close(build(steps.bind(call.args[0])))
        if name in vector_math.REPLACEMENTS and str(call.ty.dtype).startswith("float16"):
            dtype = str(call.ty.dtype)
            wide = tirx.Cast(dtype.replace("16", "32", 1), call.args[0])
            return tirx.Cast(dtype, vector_math.REPLACEMENTS[name](wide))
        return call

    return tvm_ffi.structural_map(func, (Call, replace), order="post")


def _is_copy(block: _Block) -> bool:
    """Return whether the block only moves values."""
    return isinstance(getattr(block.stmt.body, "value", None), TensorLoad)


def _slope(index: Expr, var: Var) -> int | None:
    """Return the constant by which ``index`` grows with ``var``, or None."""
    parts = detect_linear_equation(index, [var])
    return _constant(parts[0]) if len(parts) == 2 else None


def _extent(sch: Schedule, loop: Any) -> int | None:
    return _constant(sch.get(loop).extent)


def _constant(value: Expr) -> int | None:
    return int(value.value) if isinstance(value, tirx.IntImm) else None


def _or_one(extent: int | None) -> int:
    return 1 if extent is None else extent


def _reason(error: Exception) -> str:
    """Return the line of TVM's text that says what is wrong."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or ["no text"]
    return next((line for line in lines if line.startswith("Error message:")), lines[0])
