"""A recurrent layer on x86: all steps of a sequence in one kernel.

A dense hidden matrix meets tiles of rows and all gates of a few vectors of units: the sums stay
in registers until the units are updated, and the weights stream in the order they are packed in.
A structured one runs as the stages of its program on the state, then the units are updated from
its result, which is small. Two directions are two threads, each through the whole sequence;
else threads share the units or the stages of each step, where a step is long enough.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from tvm import tirx
from tvm.s_tir import Schedule
from tvm.script.ir_builder import tirx as T

from tvmstruct.schedules.builder import argument, i64, prim_func, symbol
from tvmstruct.schedules.compute.low_precision import DYNAMIC
from tvmstruct.schedules.compute.product_tile import Tile
from tvmstruct.schedules.compute.recurrence import Layout, Recurrence, Side, hidden_parts
from tvmstruct.schedules.registry import Kernel, make_kernel
from tvmstruct.schedules.vector_math import replace_math
from tvmstruct.schedules.x86.chain import schedule_chain
from tvmstruct.schedules.x86.packed_dense import SERIAL_MACS
from tvmstruct.schedules.x86.recurrent_bytes import BYTE_WIDTH
from tvmstruct.schedules.x86.recurrent_product import WIDTH
from tvmstruct.schedules.x86.recurrent_steps import Shared, SideSteps
from tvmstruct.stages import Program
from tvmstruct.targets import Isa

__all__ = ["recurrence", "unit_width"]

STEPS = 16  # of a sequence at least, where nothing else is known
PHASE_MACS = 8 << 10  # of one row that take as long as threads wait for each other


def recurrence(
    isa: Isa, r: Recurrence, programs: Sequence[Sequence[Program | None]], threads: int
) -> Kernel:
    """Return the kernel of `Recurrence` with the hidden matrices' programs.

    None stands for a dense matrix, or for one dense block for each group of units. Arguments are
    [lengths], h, [c], then of each side z, weights, [bias], [peepholes], last y, the new h and
    [c]. A side whose reset gate comes first has two programs.
    """
    macs = sum(
        _macs(r, side, gates, p)
        for side, ps in zip(r.sides, programs, strict=True)
        for (_, gates), p in zip(hidden_parts(side.cell), ps, strict=True)
    )
    keys = tuple(tuple(None if p is None else p.key for p in ps) for ps in programs)
    rows = max(2, r.batch)  # one row waits for its weights as long as two take to multiply
    apart = len(r.sides) > 1 and threads > 1 and macs * rows * STEPS > SERIAL_MACS
    phases = 1 + sum(len(p.stages) for ps in programs for p in ps if p is not None)
    shares = not apart and macs * rows > 2 * PHASE_MACS * phases
    if any(side.hidden == DYNAMIC for side in r.sides):
        shares = False  # threads that share a step do not always agree on its scale: a race
    workers = threads if shares else 1

    def build() -> tirx.PrimFunc:
        tiles: dict[Tile, int] = {}

        def body() -> None:
            kernel = _Kernel(isa, r, programs, workers, apart, tiles)
            kernel.declare()
            with T.sblock("root"):  # by hand: it has no axes of its own
                T.reads()
                T.writes()
                kernel.emit()

        schedule = Schedule(prim_func(body))
        schedule_chain(schedule, isa, list(tiles))
        return replace_math(schedule.mod["main"])

    by_pairs = not isa.dots and any(side.rounded for side in r.sides)
    key = (f"{isa.name}{' pairs' if by_pairs else ''}", r, keys, workers, apart)
    return make_kernel("recurrence", key, build, work=macs)


def unit_width(precision: str) -> int:
    """Return the vectors of units whose gates lie together in a dense hidden matrix."""
    return WIDTH if precision == "f32" else BYTE_WIDTH


def _macs(r: Recurrence, side: Side, gates: int, program: Program | None) -> int:
    if program is None:
        macs = r.h * r.h * gates // (side.groups or 1)
        return macs if side.hidden == "f32" else macs // 4  # as long as so many in f32 take
    return sum(getattr(stage, "macs", 0) for stage in program.stages)


@dataclass
class _Kernel:
    """The arguments and the loop over the steps of each side."""

    isa: Isa
    r: Recurrence
    programs: Sequence[Sequence[Program | None]]
    workers: int
    apart: bool
    tiles: dict[Tile, int]

    def declare(self) -> None:
        """Declare the arguments."""
        r = self.r
        m, count = symbol("m"), len(r.sides)
        states = (i64(count * r.batch), i64(r.h))
        lengths = argument("lengths", (i64(r.batch),), "int32") if r.lengths else None
        shared = Shared(self.isa, r, self.workers, self.tiles, m // r.batch, lengths)
        first = [argument(name, states) for name in ("h0", "c0")[: 1 + r.lstm]]
        self.sides = [self._declare(i, m, shared) for i in range(count)]
        shared.y = argument("y", (m, i64(count * r.h)))
        last = [argument(name, states) for name in ("h", "c")[: 1 + r.lstm]]
        for side in self.sides:
            side.states = [*zip(first, last, strict=True)]

    def emit(self) -> None:
        """Run the sides beside or after each other."""
        for side in self.sides:
            side.allocate()
        if self.apart:
            with T.parallel(T.int64(0), T.int64(len(self.sides))) as number:
                for i, side in enumerate(self.sides):
                    with T.If(number == i), T.Then():
                        side.emit()
        else:
            for side in self.sides:
                side.emit()

    def _declare(self, number: int, m, shared: Shared) -> SideSteps:
        side, r = self.r.sides[number], self.r
        gates, groups = side.cell.gates, side.groups or 1
        layout = Layout(groups, r.h // groups, self.isa.lanes)
        z = argument(f"z{number}", (m, i64(gates * r.h)))
        weights = self._weights(number, layout)
        bias = argument(f"bias{number}", (i64(gates * layout.size),)) if side.hidden_bias else None
        holes = argument(f"peepholes{number}", (i64(3 * layout.size),)) if side.peepholes else None
        programs = self.programs[number]
        return SideSteps(shared, number, programs, z, weights, bias, holes, layout)

    def _weights(self, number: int, layout: Layout) -> list[list[tirx.Buffer]]:
        """Declare the tensors of each hidden product of a side."""
        side, h = self.r.sides[number], self.r.h
        if side.hidden != "f32":
            size = side.cell.gates * layout.size
            words = argument(f"words{number}", (i64(-(-h // 4) * size),), "int32")
            start = argument(f"start{number}", (i64(size),), "int32")
            held = [words, start]
            if side.rounded:
                held.append(argument(f"shift{number}", (i64(1),), "int32"))
            return [[*held, argument(f"scale{number}", (i64(size),))]]
        found = []
        programs = self.programs[number]
        for (first, gates), program in zip(hidden_parts(side.cell), programs, strict=True):
            sizes = [(layout.each * gates * layout.size, "float32")]
            if program is not None:
                sizes = [(program.words(i), program.type(i)) for i in range(len(program.weights))]
            name = f"w{number}_{first}_"
            found.append([argument(f"{name}{i}", (i64(n),), d) for i, (n, d) in enumerate(sizes)])
        return found
