"""The driver: records what a kernel asks of VTA as one instruction stream.

Kernels call it in program order, as if VTA did one thing after the other: load and store of tiles
in up to three dimensions, GEMM and ALU loops. The driver cuts transfers into 2-D instructions,
keeps micro-ops that are used again on chip, and ties the units together with tokens wherever one
needs what another did (`hazards`). Where data lies on chip is the business of `scratchpad`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import product

import numpy as np

from tvmstruct.errors import VtaEncodingError, VtaError
from tvmstruct.ops import Array
from tvmstruct.vta import stream
from tvmstruct.vta.config import Config, Memory
from tvmstruct.vta.hazards import MOST_PENDING, Access, Hazards
from tvmstruct.vta.instructions import AluOp, Finish, Unit, nop
from tvmstruct.vta.isa import encode_stream
from tvmstruct.vta.launch import Region
from tvmstruct.vta.scratchpad import Buffer, Scratchpad
from tvmstruct.vta.stream import POP, PUSH, Entry, Loop, Transfer2d
from tvmstruct.vta.uop_cache import UopCache

PAGE = 4096
BASE = 0x1000  # virtual addresses of the reference simulator start here
MOST = (1 << 16) - 1  # of a size or stride of a transfer, in tiles
WRITTEN = "dram"


@dataclass(eq=False)
class Dram:
    """A region of memory that kernels name by its number."""

    name: str
    memory: Memory
    address: int
    size: int
    constant: bool


@dataclass(eq=False)
class Driver:
    """Records one launch for a VTA of ``config``."""

    config: Config
    drams: list[Dram] = field(default_factory=list)
    buffers: list[Buffer] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._entries: list[Entry] = []
        self._units: tuple[list[Entry], ...] = tuple([] for _ in Unit)
        self._hazards = Hazards()
        self._end = BASE
        self._pads = {
            memory: Scratchpad(memory.name.lower(), self.config.depth(memory))
            for memory in (Memory.INP, Memory.WGT, Memory.ACC)
        }
        for memory, pad in self._pads.items():
            self._hazards.add_memory(memory, pad.depth)
        self._uops = UopCache(self.config)

    # Memory

    def dram(self, name: str, memory: Memory, tiles: int, *, constant: bool = False) -> int:
        """Set memory for ``tiles`` tiles aside; returns its number.

        Only regions that are not ``constant`` may be stored to.
        """
        size = tiles * self.config.tile_bytes(memory)
        self.drams.append(Dram(name, memory, self._end, size, constant))
        self._end += -(-size // PAGE) * PAGE
        if not constant:
            granules = -(-size // self.config.tile_bytes(Memory.OUT))
            self._hazards.add_memory((WRITTEN, len(self.drams) - 1), granules)
        return len(self.drams) - 1

    def buffer(self, memory: Memory, size: int, versions: int = 1) -> int:
        """Set ``versions`` times ``size`` tiles on chip aside; returns the number of the buffer.

        Raises VtaMemoryError where they do not fit.
        """
        self.buffers.append(self._pads[memory].allocate(size, versions))
        return len(self.buffers) - 1

    def release(self) -> None:
        """Take all buffers back, for the next kernel of the same launch."""
        self.buffers.clear()
        for pad in self._pads.values():
            pad.release()

    # Instructions

    def load(
        self, memory: Memory, sram: int, dram: int, base: int, dims: Sequence[tuple[int, int]]
    ) -> None:
        """Load tiles ``base + sum_i index_i * stride_i`` of a region, dense on chip from ``sram``.

        ``dims`` are (extent, stride in tiles of ``memory``), outermost first.
        """
        unit = Unit.COMPUTE if memory in (Memory.ACC, Memory.ACC8) else Unit.LOAD
        start = self._tile(memory, dram)
        held = Memory.ACC if memory is Memory.ACC8 else memory
        for offset, rows, columns, stride in cut(dims):
            at = slice(sram, sram + rows * columns)
            sram = at.stop
            accesses = (
                Access(held, at, True),
                *self._touched(memory, dram, base + offset, rows, columns, stride, False),
            )
            move = Transfer2d(at.start, start + base + offset, rows, columns, stride)
            self._issue(unit, move.load(memory), accesses)

    def store(self, sram: int, dram: int, base: int, dims: Sequence[tuple[int, int]]) -> None:
        """Store dense accumulator tiles from ``sram`` on, low bits only, to tiles of a region."""
        start = self._tile(Memory.OUT, dram)
        for offset, rows, columns, stride in cut(dims):
            at = slice(sram, sram + rows * columns)
            sram = at.stop
            accesses = (
                Access(Memory.ACC, at, False),
                *self._touched(Memory.OUT, dram, base + offset, rows, columns, stride, True),
            )
            move = Transfer2d(at.start, start + base + offset, rows, columns, stride)
            self._issue(Unit.STORE, move.store(), accesses)

    def gemm(self, base: tuple[int, int, int], steps: Sequence[Loop], reset: bool = False) -> None:
        """Run ``acc[d] += inp[s] wgt[w]^T`` (or ``acc[d] = 0``) over a loop nest from ``base``.

        ``steps`` are the dimensions, outermost first. Those that do not move ``d`` belong outside
        the others, so that sums are long ready when they are read again.
        """
        loops, uops = _split(base, steps)
        dst, src, wgt = (index.reshape(-1) for index in _indices(base, steps))
        accesses = [Access(Memory.ACC, dst, True)]
        if not reset:
            accesses += [Access(Memory.INP, src, False), Access(Memory.WGT, wgt, False)]
        bounds = self._resident(uops)
        self._issue(Unit.COMPUTE, stream.gemm(bounds, loops, reset), tuple(accesses))

    def alu(
        self, op: AluOp, base: tuple[int, int], steps: Sequence[Loop], imm: int | None = None
    ) -> None:
        """Run ``acc[d] = op(acc[d], acc[s])``, or with an immediate in the place of ``acc[s]``."""
        if imm is not None:  # hardware reads acc[s] as the first operand then
            steps = [Loop(step.extent, step.dst, step.dst) for step in steps]
            base = (base[0], base[0])
        loops, uops = _split((*base, 0), steps)
        dst, src, _ = (index.reshape(-1) for index in _indices((*base, 0), steps))
        accesses = (Access(Memory.ACC, dst, True), Access(Memory.ACC, src, False))
        bounds = self._resident(uops)
        self._issue(Unit.COMPUTE, stream.alu(op, bounds, loops, imm), accesses)

    def finish(self) -> tuple[bytes, tuple[Region, ...], int]:
        """End the stream; returns it, the regions of memory, and the bytes of memory from BASE.

        Raises VtaError where a token counter of the hardware would overflow.
        """
        entry = Entry(nop(Unit.COMPUTE))
        for unit in (Unit.LOAD, Unit.STORE):
            if self._hazards.count(unit) > self._hazards.knows(Unit.COMPUTE, unit):
                self._wait(Unit.COMPUTE, entry, unit, self._hazards.count(unit))
        if entry.flags:
            self._append(Unit.COMPUTE, entry, ())
        self._append(Unit.COMPUTE, Entry(Finish()), ())
        for (source, unit), most in self._hazards.pending().items():
            if most > MOST_PENDING:
                raise VtaError(
                    f"VTA stream: up to {most} tokens wait between {source.name} and {unit.name}, "
                    f"whose counter holds {MOST_PENDING}; take fewer, larger tiles"
                )
        words = self._uops.words()
        number = self.dram("uop", Memory.UOP, max(len(words), 1), constant=True)
        entries = self._uops.place(self._entries, self._tile(Memory.UOP, number))
        data = {number: words.tobytes()} if len(words) else {}
        regions = tuple(
            Region(d.name, d.memory, d.address, d.size, data.get(i))
            for i, d in enumerate(self.drams)
        )
        insn = encode_stream((entry.finished() for entry in entries), self.config)
        return insn, regions, self._end - BASE

    # Parts

    def _tile(self, memory: Memory, dram: int) -> int:
        return self.drams[dram].address // self.config.tile_bytes(memory)

    def _touched(
        self,
        memory: Memory,
        dram: int,
        base: int,
        rows: int,
        columns: int,
        stride: int,
        writes: bool,
    ) -> tuple[Access, ...]:
        """Return the access to a region that stores may change."""
        if self.drams[dram].constant:
            return ()
        granules = self.config.tile_bytes(memory) // self.config.tile_bytes(Memory.OUT)
        tiles = base + stride * np.arange(rows)[:, None] + np.arange(columns)
        index = (tiles[..., None] * granules + np.arange(granules)).reshape(-1)
        if index[-1] * self.config.tile_bytes(Memory.OUT) >= self.drams[dram].size:
            raise VtaError(f"VTA transfer beyond the end of memory {self.drams[dram].name!r}")
        return (Access((WRITTEN, dram), index, writes),)

    def _resident(self, uops: tuple[tuple[int, int, int], ...]) -> tuple[int, int]:
        """Return where micro-ops are on chip; a load of them comes first where they were not."""
        bounds, load = self._uops.request(uops)
        if load is not None:
            self._append(Unit.COMPUTE, load, ())
        return bounds

    def _issue(self, unit: Unit, entry: Entry, accesses: tuple[Access, ...]) -> None:
        wanted = self._hazards.wanted(unit, accesses)
        for other in [other for other in wanted if (other, unit) not in POP]:
            # Load and store meet only through compute.
            through = self._relay(other, wanted.pop(other))
            wanted[Unit.COMPUTE] = max(wanted.get(Unit.COMPUTE, 0), through)
        for other, count in self._hazards.overdue(unit).items():
            wanted[other] = max(wanted.get(other, 0), count)
        for other, count in wanted.items():
            self._wait(unit, entry, other, count)
        self._append(unit, entry, accesses)

    def _relay(self, other: Unit, count: int) -> int:
        """Return the instruction of compute that the first ``count`` of another unit precede."""
        if self._hazards.knows(Unit.COMPUTE, other) < count:
            between = Entry(nop(Unit.COMPUTE))
            self._wait(Unit.COMPUTE, between, other, count)
            self._append(Unit.COMPUTE, between, ())
        return self._hazards.first_to_know(other, count)

    def _wait(self, unit: Unit, entry: Entry, other: Unit, count: int) -> None:
        """Make ``entry``, the next of ``unit``, wait for the first ``count`` of another unit."""
        if count <= self._hazards.knows(unit, other):
            return
        source, push, pop = self._units[other][count - 1], PUSH[other, unit], POP[other, unit]
        assert push not in source.flags, "a token pushed twice"
        assert pop not in entry.flags, "a token popped twice"
        source.flags.add(push)
        entry.flags.add(pop)
        self._hazards.wait(unit, other, count)

    def _append(self, unit: Unit, entry: Entry, accesses: tuple[Access, ...]) -> None:
        self._entries.append(entry)
        self._units[unit].append(entry)
        self._hazards.issue(unit, accesses)


def cut(dims: Sequence[tuple[int, int]]) -> Iterator[tuple[int, int, int, int]]:
    """Cut a transfer of (extent, stride) into 2-D ones: yield (offset, rows, columns, stride)."""
    merged: list[tuple[int, int]] = []
    for extent, stride in dims:
        if extent == 1:
            continue
        if merged and merged[-1][1] == extent * stride:
            merged[-1] = (merged[-1][0] * extent, stride)
        else:
            merged.append((extent, stride))
    inner = merged.pop() if merged and merged[-1][1] == 1 else (1, 1)
    outer = merged.pop() if merged and merged[-1][1] <= MOST else (1, inner[0])
    stride = outer[1] if outer[0] > 1 else min(inner[0], MOST)
    if max(inner[0], outer[0]) > MOST:
        raise VtaEncodingError(
            f"VTA transfer of {outer[0]} x {inner[0]} tiles; want at most {MOST} of each"
        )
    for places in product(*(range(extent) for extent, _ in merged)):
        offset = sum(p * s for p, (_, s) in zip(places, merged, strict=True))
        yield offset, outer[0], inner[0], stride


def _indices(base: tuple[int, int, int], steps: Sequence[Loop]) -> tuple[Array, Array, Array]:
    """Return the three operands' tiles over a whole loop nest."""
    grids = np.indices([step.extent for step in steps]) if steps else np.zeros((0,), np.int64)
    found = [
        start + sum(grid * step[i + 1] for grid, step in zip(grids, steps, strict=True))
        for i, start in enumerate(base)
    ]
    return tuple(np.asarray(index) for index in found)  # pyright: ignore[reportReturnType]


def _split(
    base: tuple[int, int, int], steps: Sequence[Loop]
) -> tuple[list[Loop], tuple[tuple[int, int, int], ...]]:
    """Cut a loop nest into the two hardware loops and the micro-ops of what is left."""
    merged: list[Loop] = []
    for step in steps:
        if step.extent == 1:
            continue
        last = merged[-1] if merged else None
        if last is not None and all(o == step.extent * i for o, i in zip(last[1:], step[1:])):  # noqa: B905
            merged[-1] = Loop(last.extent * step.extent, *step[1:])
        else:
            merged.append(step)
    loops = merged[:1]
    rest = merged[1:]
    if rest:
        longest = max(rest, key=lambda step: step.extent)
        rest.remove(longest)
        loops.append(longest)
    places = [index.reshape(-1).tolist() for index in _indices(base, rest)]
    return loops, tuple(zip(*places, strict=True))
