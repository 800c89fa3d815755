"""A recurrent layer on x86: all steps of a sequence in one kernel.

A dense hidden matrix meets tiles of rows and all gates of a few vectors of units: the sums stay
in registers until the units are updated, and the weights stream in the order they are packed in.
A structured one runs as the stages of its program on the state, then the units are updated from
its result, which is small. Two directions are two threads, each through the whole sequence;
else threads share the units or the stages of each step, where a step is long enough.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

from tvm import tirx
from tvm.ir import Expr
from tvm.s_tir import Schedule
from tvm.script.ir_builder import tirx as T

from tvmstruct.recurrent import Cell
from tvmstruct.schedules.builder import argument, block, i64, loops, prim_func, symbol
from tvmstruct.schedules.compute import recurrence as compute
from tvmstruct.schedules.compute.product_tile import Tile
from tvmstruct.schedules.compute.recurrence import (
    Recurrence,
    Unit,
    Vectors,
    hidden_parts,
)
from tvmstruct.schedules.registry import Kernel, make_kernel
from tvmstruct.schedules.vector_math import replace_math
from tvmstruct.schedules.x86.attention_tile import ramp, registers, scratch
from tvmstruct.schedules.x86.chain import schedule_chain
from tvmstruct.schedules.x86.packed_dense import SERIAL_MACS
from tvmstruct.schedules.x86.recurrent_product import (
    WIDTH,
    DenseProduct,
    Product,
    Shape,
    StructuredProduct,
    Sums,
)
from tvmstruct.stages import Program
from tvmstruct.targets import Isa

__all__ = ["WIDTH", "recurrence"]

STEPS = 16  # of a sequence at least, where nothing else is known


def recurrence(
    isa: Isa, r: Recurrence, programs: Sequence[Sequence[Program | None]], threads: int
) -> Kernel:
    """Return the kernel of `Recurrence` with the hidden matrices' programs, None for dense ones.

    Arguments are [lengths], h, [c], then of each side z, weights, [bias], [peepholes], last y, the
    new h and [c]. A side whose reset gate comes first has two programs.
    """
    macs = sum(_macs(r, side, p) for side, ps in zip(r.sides, programs, strict=True) for p in ps)
    keys = tuple(tuple(None if p is None else p.key for p in ps) for ps in programs)
    rows = max(2, r.batch)  # one row waits for its weights as long as two take to multiply
    apart = len(r.sides) > 1 and threads > 1 and macs * rows * STEPS > SERIAL_MACS
    workers = threads if not apart and macs * rows > SERIAL_MACS else 1

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

    key = (isa.name, r, keys, workers, apart)
    return make_kernel("recurrence", key, build, work=macs)


def _macs(r: Recurrence, side: compute.Side, program: Program | None) -> int:
    if program is None:
        return r.h * r.h * side.cell.gates
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
        r, lanes = self.r, self.isa.lanes
        m, count = symbol("m"), len(r.sides)
        states = (i64(count * r.batch), i64(r.h))
        self.steps = m // r.batch
        self.lengths = argument("lengths", (i64(r.batch),), "int32") if r.lengths else None
        first = [argument(name, states) for name in ("h0", "c0")[: 1 + r.lstm]]
        self.sides = [self._declare(i, m, -(-r.h // lanes) * lanes) for i in range(count)]
        self.y = argument("y", (m, i64(count * r.h)))
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

    def _declare(self, number: int, m, padded: int) -> _Side:
        side, r = self.r.sides[number], self.r
        gates = side.cell.gates
        z = argument(f"z{number}", (m, i64(gates * r.h)))
        weights = []
        for (_, some), program in zip(hidden_parts(side.cell), self.programs[number], strict=True):
            sizes = (
                [(r.h * some * padded, "float32")]
                if program is None
                else [
                    (program.words(i), "int32" if i in program.pairs else "float32")
                    for i in range(len(program.weights))
                ]
            )
            name = f"w{number}_{len(weights)}_"
            weights.append([argument(f"{name}{i}", (i64(n),), d) for i, (n, d) in enumerate(sizes)])
        bias = argument(f"bias{number}", (i64(gates * padded),)) if side.hidden_bias else None
        holes = argument(f"peepholes{number}", (i64(3 * padded),)) if side.peepholes else None
        return _Side(self, number, z, weights, bias, holes, padded)


@dataclass
class _Side:
    """Code of one direction; state rows are ``padded`` units apart, and double where dense."""

    kernel: _Kernel
    number: int
    z: tirx.Buffer
    weights: list[list[tirx.Buffer]]
    bias: tirx.Buffer | None
    holes: tirx.Buffer | None
    padded: int
    states: list = field(default_factory=list)

    @property
    def cell(self) -> Cell:
        """What a step does."""
        return self.kernel.r.sides[self.number].cell

    def allocate(self) -> None:
        """Allocate the state, the cell state, and what the reset gate makes of the state."""
        kernel, r = self.kernel, self.kernel.r
        self.size = r.batch * self.padded
        self.state = scratch(2 * self.size)
        self.memory = scratch(self.size) if r.lstm else None
        self.reset = [scratch(self.size) for _ in range(2 if self.cell.split_reset else 0)]
        lanes = kernel.isa.lanes
        self.vectors = Vectors(lanes, lambda value: _kept(value, lanes))
        shape = Shape(kernel.isa, r.batch, r.h, kernel.workers)
        self.products: list[Product] = []
        programs = kernel.programs[self.number]
        for (_, gates), program, weights in zip(
            hidden_parts(self.cell), programs, self.weights, strict=True
        ):
            if program is None:
                self.products.append(DenseProduct(shape, gates, *weights))
            else:
                self.products.append(
                    StructuredProduct(shape, gates, program, weights, kernel.tiles)
                )

    def emit(self) -> None:
        """Emit the first state, all steps, the last state."""
        kernel, r = self.kernel, self.kernel.r
        held = [self.state, self.memory][: 1 + r.lstm]
        for product in self.products:
            product.begin()
        for buffer, (given, _) in zip(held, self.states, strict=True):
            self._exchange(buffer, T.int64(0), given, load=True)
        with loops(kernel.steps) as (t,), block("step", [(kernel.steps, t)]) as (step,):
            self._touch()
            self._step(step)
        for buffer, (_, result) in zip(held, self.states, strict=True):
            place = kernel.steps % 2 * self.size if buffer is self.state else T.int64(0)
            self._exchange(buffer, place, result, load=False)

    def _exchange(self, buffer, place, states, *, load: bool) -> None:
        """Copy the states of this side, clearing the padding."""
        r = self.kernel.r
        with loops(r.batch) as (row,):
            mine = place + row * self.padded
            if load and self.padded > r.h:
                with loops(self.padded - r.h) as (i,):
                    T.buffer_store(buffer, T.float32(0), [mine + r.h + i])
            with self._units() as (unit, natural):
                theirs = [self.number * r.batch + row, natural]
                if load:
                    T.buffer_store(buffer, states[tuple(theirs)], [mine + unit])
                else:
                    T.buffer_store(states, buffer[mine + unit], theirs)

    @property
    def groups(self) -> int:
        """Groups that the units are sorted by, 1 for their natural order."""
        return self.kernel.r.sides[self.number].groups or 1

    @contextmanager
    def _units(self) -> Iterator[tuple[Expr, Expr]]:
        """Loop over the units: yield where one lies here and where in arguments and results."""
        groups, each = self.groups, self.kernel.r.h // self.groups
        with loops(groups, each) as (k, i):
            yield k * each + i, i * groups + k

    def _touch(self) -> None:
        """State what a step reads and writes."""
        kernel = self.kernel
        flat = [w for ws in self.weights for w in ws]
        flat += [b for b in (self.bias, self.holes, kernel.lengths) if b is not None]
        own = [b for b in (self.state, self.memory, *self.reset) if b is not None]
        own += [b for product in self.products for b in product.buffers]
        T.reads(*(_whole(b) for b in (*flat, *own, self.z, kernel.y)))
        T.writes(*(_whole(b) for b in (kernel.y, *own)))

    def _step(self, t: Expr) -> None:
        """Emit one step of all rows."""
        now, then = t % 2 * self.size, (t + 1) % 2 * self.size
        self._advance(t, now, then)
        if self.groups > 1:
            self._write_rows(t, then)

    def _write_rows(self, t: Expr, then: Expr) -> None:
        """Write y unit by unit, each to its natural place."""
        with loops(self.kernel.r.batch) as (row,), self._active(t, row) as at_row:
            with self._units() as (unit, natural):
                value = self.state[then + row * self.padded + unit]
                place = self.number * self.kernel.r.h + natural
                T.buffer_store(self.kernel.y, value, [at_row, place])

    def _advance(self, t: Expr, now: Expr, then: Expr) -> None:
        """Emit the new state of all rows, and y where units are in natural order."""
        if not self.cell.split_reset:
            self.products[0].emit(self.state, now, lambda *at: self._update(t, now, then, *at))
            return
        held, keep = self.reset

        def gates(row: Expr, unit: Expr, count: int, u: Sums) -> None:
            with self._active(t, row, unit, count) as at_row:
                at, place = self._unit(at_row, row, unit, count, now), self._place(row, unit)
                v = self.vectors
                reset = compute.gate_step(self.cell, v, at, 0, u[0])
                T.buffer_store(held, reset * at.h(), [place])
                T.buffer_store(keep, compute.gate_step(self.cell, v, at, 1, u[1]), [place])

        def candidate(row: Expr, unit: Expr, count: int, u: Sums) -> None:
            with self._active(t, row, unit, count, then=then, now=now) as at_row:
                at, place = self._unit(at_row, row, unit, count, now), self._place(row, unit)
                inner = u[0] if at.bias is None else u[0] + at.bias(2)
                h = compute.gru_step(self.cell, self.vectors, at, keep[place], inner)
                self._store(at_row, row, unit, count, then, h)

        self.products[0].emit(self.state, now, gates)
        self.products[1].emit(held, T.int64(0), candidate)

    def _update(
        self, t: Expr, now: Expr, then: Expr, row: Expr, unit: Expr, count: int, u: Sums
    ) -> None:
        """Emit the new state of a vector of units of a row."""
        with self._active(t, row, unit, count, then=then, now=now) as at_row:
            at, cell, v = self._unit(at_row, row, unit, count, now), self.cell, self.vectors
            if cell.kind == "lstm":
                h, c = compute.lstm_step(cell, v, at, u)
                T.buffer_store(self.memory, c, [self._place(row, unit)])
            elif cell.kind == "rnn":
                h = compute.rnn_step(cell, v, at, u[0])
            else:
                inner = u[2] if at.bias is None else u[2] + at.bias(2)
                reset = compute.gate_step(cell, v, at, 0, u[0])
                keep = compute.gate_step(cell, v, at, 1, u[1])
                h = compute.gru_step(cell, v, at, keep, reset * inner)
            self._store(at_row, row, unit, count, then, h)

    @contextmanager
    def _active(
        self,
        t: Expr,
        row: Expr,
        unit: Expr | int = 0,
        count: int = 0,
        then: Expr | None = None,
        now: Expr | None = None,
    ) -> Iterator[Expr]:
        """Yield the row of z and y of a step; a row that is at its end keeps its state."""
        kernel, batch = self.kernel, self.kernel.r.batch
        steps = kernel.steps
        if kernel.lengths is None:
            yield (steps - 1 - t if self.cell.reverse else t) * batch + row
            return
        bounded = T.min(steps, T.max(T.int64(0), T.Cast("int64", kernel.lengths[row])))
        with T.If(t < bounded):
            with T.Then():
                yield (bounded - 1 - t if self.cell.reverse else t) * batch + row
            if then is not None:
                with T.Else():
                    old = self.state[self._place(row, unit, now)]
                    T.buffer_store(self.state, old, [self._place(row, unit, then)])
                    self._store_y(t * batch + row, unit, count, self.vectors.splat(0))

    def _place(self, row: Expr, unit: Expr, start: Expr | int = 0):
        return ramp(start + row * self.padded + unit, self.kernel.isa.lanes)

    def _unit(self, at_row: Expr, row: Expr, unit: Expr, count: int, now: Expr) -> Unit:
        """Return where a vector of units finds what it reads."""
        h, lanes = self.kernel.r.h, self.kernel.isa.lanes

        def z(gate: int) -> Expr:
            first = gate * h + unit
            if count == lanes:
                return self.z[at_row, ramp(first, lanes)]
            (held,) = registers(lanes, 1)
            T.buffer_store(held, self.vectors.splat(0), [ramp(0, lanes)])
            for i in range(count):
                T.buffer_store(held, self.z[at_row, first + i], [i])
            return held[ramp(0, lanes)]

        def vector(buffer: tirx.Buffer | None) -> Callable[[int], Expr] | None:
            if buffer is None:
                return None
            return lambda k: buffer[ramp(k * self.padded + unit, lanes)]

        place = self._place(row, unit)
        return Unit(
            z=z,
            h=lambda: self.state[self._place(row, unit, now)],
            c=lambda: self.memory[place],
            bias=vector(self.bias),
            peephole=vector(self.holes),
        )

    def _store(self, at_row: Expr, row: Expr, unit: Expr, count: int, then: Expr, h: Expr) -> None:
        T.buffer_store(self.state, h, [self._place(row, unit, then)])
        if self.groups == 1:
            self._store_y(at_row, unit, count, h)

    def _store_y(self, at_row: Expr, unit: Expr, count: int, h: Expr) -> None:
        y, lanes = self.kernel.y, self.kernel.isa.lanes
        first = self.number * self.kernel.r.h + unit
        if count == lanes:
            T.buffer_store(y, h, [at_row, ramp(first, lanes)])
            return
        (held,) = registers(lanes, 1)
        T.buffer_store(held, h, [ramp(0, lanes)])
        for i in range(count):
            T.buffer_store(y, held[i], [at_row, first + i])


def _kept(value: Expr, lanes: int) -> Expr:
    """Hold a vector in a register, so that two uses of it compute it once."""
    (held,) = registers(lanes, 1)
    T.buffer_store(held, value, [ramp(0, lanes)])
    return held[ramp(0, lanes)]


def _whole(buffer: tirx.Buffer):
    return buffer[tuple(slice(0, extent) for extent in buffer.shape)]
