"""Recording a scheduled kernel: its intrinsics call here, and here the driver is called.

A kernel is a `Matmul` whose steps were tensorised; running it on the CPU moves no data but calls
``tvmstruct.vta.record.*`` once for each block of tiles, in program order, with the number of the
step and, for each operand, the offset and the strides of its tiles in elements.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field

import numpy as np
import tvm_ffi

from tvmstruct.schedules.compute.tile_matmul import Matmul
from tvmstruct.schedules.compute.tile_step import Step
from tvmstruct.schedules.vta.intrinsics import RECORD
from tvmstruct.vta.config import Memory
from tvmstruct.vta.driver import Driver
from tvmstruct.vta.instructions import AluOp
from tvmstruct.vta.scratchpad import Buffer
from tvmstruct.vta.stream import Loop

MEMORIES = {"x": Memory.INP, "w": Memory.WGT}


@dataclass(frozen=True)
class Argument:
    """Where an argument lies: region, first tile, and steps between tiles along its dimensions.

    Without ``strides`` the tiles are dense.
    """

    region: int
    first: int = 0
    strides: tuple[int, ...] | None = None

    def place(self, extents: Sequence[int], offset: int) -> int:
        """Return the tile of the region that tile ``offset`` of a dense argument is."""
        if self.strides is None:
            return self.first + offset
        index = np.unravel_index(offset, tuple(extents))
        return self.first + sum(int(i) * s for i, s in zip(index, self.strides, strict=True))


@dataclass(eq=False)
class Recorder:
    """Turns the calls of one kernel into instructions."""

    kernel: Matmul
    driver: Driver
    arguments: Mapping[str, Argument]
    buffers: dict[str, Buffer] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Lay the local buffers out on chip."""
        self.driver.release()
        for name, (tiles, places) in self.kernel.local().items():
            memory = Memory.ACC if self.kernel.widens else MEMORIES.get(name, Memory.ACC)
            number = self.driver.buffer(memory, tiles, places)
            self.buffers[name] = self.driver.buffers[number]

    def call(self, number: int, values: Sequence[int]) -> None:
        """Record step ``number``; ``values`` are offset and strides of each operand."""
        step = self.kernel.steps[number]
        rest = list(values)
        operands: dict[str, tuple[int, list[int]]] = {}
        for role, (dims, _) in step.operands.items():
            area = 1
            for i in step.inside(role):
                area *= step.elements[i]
            offset, *strides = (int(v) // area for v in rest[: 1 + len(dims)])
            operands[role] = offset, strides
            del rest[: 1 + len(dims)]
        getattr(self, f"_{step.kind}")(step, self.kernel.roles[number], operands)

    def _load(self, step: Step, roles: Mapping[str, str], operands: dict) -> None:
        buffer = self.buffers[roles["to"]]
        base, dims = self._in_dram(step, roles["from"], *operands["from"])
        if buffer.fill((roles["from"], base, *dims)):
            memory = Memory.ACC8 if step.widen else MEMORIES.get(roles["to"], Memory.ACC)
            region = self.arguments[roles["from"]].region
            self.driver.load(memory, buffer.base, region, base, dims)

    def _store(self, step: Step, roles: Mapping[str, str], operands: dict) -> None:
        base, dims = self._in_dram(step, roles["to"], *operands["to"])
        buffer = self.buffers[roles["from"]]
        self.driver.store(buffer.base, self.arguments[roles["to"]].region, base, dims)

    def _in_dram(
        self, step: Step, name: str, offset: int, strides: Sequence[int]
    ) -> tuple[int, list[tuple[int, int]]]:
        """Return the first tile and (extent, stride) of what a step moves from or to DRAM."""
        argument = self.arguments[name]
        s = self.kernel.shape
        extents = (s.n, s.g, s.k if name == "x" else s.m)
        strides = strides if argument.strides is None else argument.strides
        dims = [(extent, stride) for (_, extent), stride in zip(step.tiles, strides, strict=True)]
        return argument.place(extents, offset), dims

    def _zero(self, step: Step, roles: Mapping[str, str], operands: dict) -> None:
        """Zero sums; the first time all places at once, which has to be done anyway."""
        buffer = self.buffers[roles["to"]]
        if buffer.take_spare():
            return
        fresh = buffer.fresh
        buffer.fill(None)
        if fresh:
            self.driver.gemm(
                (buffer.start, 0, 0), [Loop(buffer.size * buffer.versions, 1, 0)], True
            )
            buffer.spare()
        else:
            tiles = 1
            for _, extent in step.tiles:
                tiles *= extent
            self.driver.gemm((buffer.base, 0, 0), [Loop(tiles, 1, 0)], True)

    def _gemm(self, step: Step, roles: Mapping[str, str], operands: dict) -> None:
        base = [self.buffers[roles[r]].base + operands[r][0] for r in ("sums", "x", "w")]
        moves = {r: dict(zip(step.operands[r][0], operands[r][1], strict=True)) for r in operands}
        steps = [
            Loop(extent, *(moves[r].get(dim, 0) for r in ("sums", "x", "w")))
            for dim, extent in step.tiles
        ]
        self.driver.gemm((base[0], base[1], base[2]), steps)

    def _alu(self, step: Step, roles: Mapping[str, str], operands: dict) -> None:
        op = AluOp[step.name.split("_")[0].upper()]
        offset, strides = operands["to"]
        base = self.buffers[roles["to"]].base + offset
        targets = dict(zip(step.operands["to"][0], strides, strict=True))
        moves: dict[str, int] = {}
        source = 0
        if step.operand:
            at, other = operands["operand"]
            source = self.buffers[roles["operand"]].base + at
            moves = dict(zip(step.operands["operand"][0], other, strict=True))
        steps = [Loop(extent, targets.get(dim, 0), moves.get(dim, 0)) for dim, extent in step.tiles]
        imm = None if step.operand else step.immediate
        self.buffers[roles["to"]].change()
        self.driver.alu(op, (base, source), steps, imm)


_CURRENT: ContextVar[Recorder] = ContextVar("tvmstruct.vta.recorder")


@contextmanager
def record(kernel: Matmul, driver: Driver, arguments: Mapping[str, Argument]) -> Iterator[None]:
    """Send what a kernel's intrinsics call to ``driver``."""
    token = _CURRENT.set(Recorder(kernel, driver, arguments))
    try:
        yield
    finally:
        _CURRENT.reset(token)


def _register(kind: str) -> Callable:
    def call(number: int, *values: int) -> None:
        _CURRENT.get().call(number, values)

    return tvm_ffi.register_global_func(RECORD + kind, call, override=True)


for _kind in ("load", "store", "zero", "gemm", "alu"):
    _register(_kind)
