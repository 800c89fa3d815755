"""One direction of a recurrent kernel: all its steps, their state, and what is written of it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import partial

from tvm import tirx
from tvm.ir import Expr
from tvm.script.ir_builder import tirx as T

from tvmstruct.recurrent import Cell
from tvmstruct.schedules.builder import block, i64, loops
from tvmstruct.schedules.compute import recurrence as compute
from tvmstruct.schedules.compute.product_tile import Tile
from tvmstruct.schedules.compute.recurrence import (
    Layout,
    Reads,
    Recurrence,
    Units,
    Vectors,
    hidden_parts,
)
from tvmstruct.schedules.compute.team import share, team
from tvmstruct.schedules.x86.attention_tile import ramp, registers, scratch
from tvmstruct.schedules.x86.intrinsics import fetch
from tvmstruct.schedules.x86.recurrent_bytes import ByteProduct
from tvmstruct.schedules.x86.recurrent_product import (
    BlockProduct,
    Product,
    Shape,
    StructuredProduct,
    Sums,
)
from tvmstruct.stages import Program
from tvmstruct.targets import Isa


@dataclass
class Shared:
    """What the directions of a kernel have in common; ``workers`` threads share each step."""

    isa: Isa
    r: Recurrence
    workers: int
    tiles: dict[Tile, int]
    steps: Expr
    lengths: tirx.Buffer | None
    y: tirx.Buffer = field(init=False)  # the arguments of all sides come before it


@dataclass
class SideSteps:
    """Code of one direction: a step reads one half of its state and writes the other."""

    kernel: Shared
    number: int
    programs: Sequence[Program | None]
    z: tirx.Buffer
    weights: list[list[tirx.Buffer]]
    bias: tirx.Buffer | None
    holes: tirx.Buffer | None
    layout: Layout
    states: list = field(default_factory=list)

    @property
    def cell(self) -> Cell:
        """What a step does."""
        return self.kernel.r.sides[self.number].cell

    def allocate(self) -> None:
        """Allocate the state, the cell state, and what the reset gate makes of the state."""
        kernel, r = self.kernel, self.kernel.r
        self.size = r.batch * self.layout.size
        self.state = scratch(2 * self.size)
        self.memory = scratch(self.size) if r.lstm else None
        self.reset = [scratch(self.size) for _ in range(2 if self.cell.split_reset else 0)]
        shape = Shape(kernel.isa, r.batch, self.layout, kernel.workers)
        self.products: list[Product] = []
        for (_, gates), program, weights in zip(
            hidden_parts(self.cell), self.programs, self.weights, strict=True
        ):
            if r.sides[self.number].hidden == "int8":
                self.products.append(ByteProduct(shape, gates, *weights))
            elif program is None:
                self.products.append(BlockProduct(shape, gates, *weights))
            else:
                self.products.append(
                    StructuredProduct(shape, gates, program, weights, kernel.tiles)
                )

    def emit(self) -> None:
        """Emit the first state, all steps, the last state."""
        kernel, r = self.kernel, self.kernel.r
        held = [self.state, self.memory][: 1 + r.lstm]
        for buffer in self.reset:  # TVM would else shrink it to what one turn of a loop touches
            with loops(self.size) as (i,):
                T.buffer_store(buffer, T.float32(0), [i])
        for buffer, (given, _) in zip(held, self.states, strict=True):
            self._exchange(buffer, T.int64(0), given, load=True)
        for product in self.products:
            product.begin(self.state)
        with team() if kernel.workers > 1 else nullcontext():
            with loops(kernel.steps) as (t,), block("step", [(kernel.steps, t)]) as (step,):
                self._touch()
                if self._deals:
                    with T.If(step > 0), T.Then():
                        self._deal(step - 1, step % 2 * self.size)
                self._step(step)
            if self._deals:
                with T.If(kernel.steps > 0), T.Then():
                    self._deal(kernel.steps - 1, kernel.steps % 2 * self.size)
        for buffer, (_, result) in zip(held, self.states, strict=True):
            place = kernel.steps % 2 * self.size if buffer is self.state else T.int64(0)
            self._exchange(buffer, place, result, load=False)

    @property
    def _deals(self) -> bool:
        """Whether the state, not the update of its units, is what y is written from.

        Units of different groups are neighbours in y: threads would write to the same lines.
        """
        kernel = self.kernel
        return kernel.workers > 1 and self.layout.groups > 1 and kernel.lengths is None

    def _deal(self, t: Expr, place: Expr) -> None:
        """Write the units after step ``t`` to y in their natural order."""
        kernel, layout, batch = self.kernel, self.layout, self.kernel.r.batch
        first = (kernel.steps - 1 - t if self.cell.reverse else t) * batch
        turns = share(layout.each, i64(0), wait=False)
        with turns as unit, loops(batch, layout.groups) as (row, group):
            at = place + row * layout.size + group * layout.padded
            column = self.number * kernel.r.h + unit * layout.groups + group
            T.buffer_store(kernel.y, self.state[at + unit], [first + row, column])

    def _exchange(self, buffer, place, states, *, load: bool) -> None:
        """Copy the states of this side, clearing the padding."""
        r, layout = self.kernel.r, self.layout
        if load and layout.padded > layout.each:
            with loops(self.size) as (i,):
                T.buffer_store(buffer, T.float32(0), [place + i])
        with loops(r.batch, layout.groups, layout.each) as (row, k, i):
            mine = place + row * layout.size + k * layout.padded + i
            theirs = [self.number * r.batch + row, i * layout.groups + k]
            if load:
                T.buffer_store(buffer, states[tuple(theirs)], [mine])
            else:
                T.buffer_store(states, buffer[mine], theirs)

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
        if not self.cell.split_reset:
            self.products[0].emit(self.state, now, t % 2, partial(self._update, t, now, then))
            return
        held, keep = self.reset

        def gates(row: Expr, units: Units, u: Sums) -> None:
            with self._active(t, row) as at_row:
                at, v = self._reads(at_row, row, units, now), _vectors(units)
                reset = compute.gate_step(self.cell, v, at, 0, u[0])
                T.buffer_store(held, reset * at.h(), [self._place(row, units)])
                place = self._place(row, units)
                T.buffer_store(keep, compute.gate_step(self.cell, v, at, 1, u[1]), [place])

        def candidate(row: Expr, units: Units, u: Sums) -> None:
            with self._active(t, row, units, now, then) as at_row:
                at, place = self._reads(at_row, row, units, now), self._place(row, units)
                inner = u[0] if at.bias is None else u[0] + at.bias(2)
                h = compute.gru_step(self.cell, _vectors(units), at, keep[place], inner)
                self._store(at_row, row, units, then, h)

        self.products[0].emit(self.state, now, t % 2, gates)
        self.products[1].emit(held, T.int64(0), t % 2, candidate)

    def _update(self, t: Expr, now: Expr, then: Expr, row: Expr, units: Units, u: Sums) -> None:
        """Emit the new state of a vector of units of a row."""
        with self._active(t, row, units, now, then) as at_row:
            if self.kernel.workers > 1:
                self._fetch_next(at_row, units)
            at, cell, v = self._reads(at_row, row, units, now), self.cell, _vectors(units)
            if cell.kind == "lstm":
                h, c = compute.lstm_step(cell, v, at, u)
                T.buffer_store(self.memory, c, [self._place(row, units)])
            elif cell.kind == "rnn":
                h = compute.rnn_step(cell, v, at, u[0])
            else:
                inner = u[2] if at.bias is None else u[2] + at.bias(2)
                reset = compute.gate_step(cell, v, at, 0, u[0])
                keep = compute.gate_step(cell, v, at, 1, u[1])
                h = compute.gru_step(cell, v, at, keep, reset * inner)
            self._store(at_row, row, units, then, h)

    @contextmanager
    def _active(
        self,
        t: Expr,
        row: Expr,
        units: Units | None = None,
        now: Expr | None = None,
        then: Expr | None = None,
    ) -> Iterator[Expr]:
        """Yield the row of z and y of a step; ``units`` of a row at its end keep their state."""
        kernel, batch = self.kernel, self.kernel.r.batch
        steps = kernel.steps
        if kernel.lengths is None:
            yield (steps - 1 - t if self.cell.reverse else t) * batch + row
            return
        bounded = T.min(steps, T.max(T.int64(0), T.Cast("int64", kernel.lengths[row])))
        with T.If(t < bounded):
            with T.Then():
                yield (bounded - 1 - t if self.cell.reverse else t) * batch + row
            if units is not None:
                with T.Else():
                    old = self.state[self._place(row, units, now)]
                    T.buffer_store(self.state, old, [self._place(row, units, then)])
                    self.products[0].keep(row, units, then, old)
                    self._store_y(t * batch + row, units, _vectors(units).splat(0))

    def _place(self, row: Expr, units: Units, start: Expr | int | None = 0):
        return ramp(start + row * self.layout.size + units.place, units.lanes)

    def _reads(self, at_row: Expr, row: Expr, units: Units, now: Expr) -> Reads:
        """Return where a vector of units finds what it reads."""
        h, lanes = self.kernel.r.h, units.lanes

        def z(gate: int) -> Expr:
            first = gate * h + units.column
            if units.count == lanes:
                return self.z[at_row, ramp(first, lanes)]
            (held,) = registers(lanes, 1)
            T.buffer_store(held, _vectors(units).splat(0), [ramp(0, lanes)])
            for i in range(units.count):
                T.buffer_store(held, self.z[at_row, first + i], [i])
            return held[ramp(0, lanes)]

        def vector(buffer: tirx.Buffer | None) -> Callable[[int], Expr] | None:
            if buffer is None:
                return None
            return lambda k: buffer[ramp(k * self.layout.size + units.place, lanes)]

        place = self._place(row, units)
        return Reads(
            z=z,
            h=lambda: self.state[self._place(row, units, now)],
            c=lambda: self.memory[place],
            bias=vector(self.bias),
            peephole=vector(self.holes),
        )

    def _fetch_next(self, at_row: Expr, units: Units) -> None:
        """Fetch what a vector of units reads in the next step: another thread may have written it.

        The rows of a step are too short for the CPU to see a stream in them.
        """
        batch, rows = self.kernel.r.batch, self.z.shape[0]
        row = (
            T.max(i64(0), at_row - batch) if self.cell.reverse else T.min(rows - 1, at_row + batch)
        )
        for gate in range(self.cell.gates):
            fetch(self.z[row, gate * self.kernel.r.h + units.column], near=True)

    def _store(self, at_row: Expr, row: Expr, units: Units, then: Expr, h: Expr) -> None:
        T.buffer_store(self.state, h, [self._place(row, units, then)])
        self.products[0].keep(row, units, then, h)
        if not self._deals:
            self._store_y(at_row, units, h)

    def _store_y(self, at_row: Expr, units: Units, h: Expr) -> None:
        y, lanes = self.kernel.y, units.lanes
        first = self.number * self.kernel.r.h + units.natural
        if units.count == lanes and units.stride == 1:
            T.buffer_store(y, h, [at_row, ramp(first, lanes)])
            return
        (held,) = registers(lanes, 1)
        T.buffer_store(held, h, [ramp(0, lanes)])
        for i in range(units.count):
            T.buffer_store(y, held[i], [at_row, first + i * units.stride])


def _vectors(units: Units) -> Vectors:
    """Return how expressions of a vector of units are written."""
    return Vectors(units.lanes, lambda value: _kept(value, units.lanes))


def _kept(value: Expr, lanes: int) -> Expr:
    """Hold a vector in a register, so that two uses of it compute it once."""
    (held,) = registers(lanes, 1)
    T.buffer_store(held, value, [ramp(0, lanes)])
    return held[ramp(0, lanes)]


def _whole(buffer: tirx.Buffer):
    return buffer[tuple(slice(0, extent) for extent in buffer.shape)]
