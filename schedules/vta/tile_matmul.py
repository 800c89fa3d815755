"""Products of tiles on VTA: every step tensorised, run once on the CPU to record the stream."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import cache

import numpy as np
import tvm
from tvm.s_tir import Schedule

from tvmstruct.arrays import aligned_empty
from tvmstruct.schedules.compute.tile_matmul import STEP, Matmul
from tvmstruct.schedules.vta.intrinsics import tile_step
from tvmstruct.schedules.vta.recording import record
from tvmstruct.vta.driver import Driver


def schedule_tile_matmul(definition: Matmul) -> tvm.tirx.PrimFunc:
    """Return the definition with an intrinsic in the place of every step."""
    sch = Schedule(definition.func)
    for block in sch.get_child_blocks(sch.get_sblock("root")):
        number = int(sch.get(block).annotations[STEP])
        step = definition.steps[number]
        extents = (*(extent for _, extent in step.tiles), *step.elements)
        inner = sum(extent > 1 for extent in extents)
        sch.tensorize(sch.get_loops(block)[-inner], tile_step(step, number))
    return sch.mod["main"]


@cache
def _compiled(definition: Matmul) -> Callable:
    func = schedule_tile_matmul(definition).with_attr("tirx.is_scheduled", True)
    mod = tvm.IRModule({"main": func.with_attr("global_symbol", "main")})
    return tvm.compile(mod, target=tvm.target.Target({"kind": "llvm"}))["main"]


def record_tile_matmul(definition: Matmul, driver: Driver, arguments: Mapping[str, int]) -> None:
    """Record the kernel with ``arguments``, numbers of the driver's regions by name."""
    func = _compiled(definition)
    stand_ins = [_stand_in(buffer) for buffer in definition.args.values()]
    with record(definition, driver, arguments):
        func(*stand_ins)


def _stand_in(buffer: tvm.tirx.Buffer) -> tvm.runtime.Tensor:
    """Return a tensor that looks like an argument; the recorded kernel touches none of it."""
    memory = aligned_empty((64,), np.uint8)
    size = np.dtype(str(buffer.dtype)).itemsize
    strides = [int(s) * size for s in buffer.strides] or None
    shape = [int(s) for s in buffer.shape]
    base = memory.view(str(buffer.dtype))
    if strides is None:
        strides = [size * int(np.prod(shape[i + 1 :])) for i in range(len(shape))]
    return tvm.runtime.from_dlpack(np.lib.stride_tricks.as_strided(base, shape, strides))
