"""Products of tiles on VTA: every step tensorised, run once on the CPU to record the stream."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import lru_cache

import tvm
from tvm.s_tir import Schedule

from tvmstruct.schedules.compute.tile_matmul import Matmul
from tvmstruct.schedules.compute.tile_step import STEP
from tvmstruct.schedules.vta.intrinsics import tile_step
from tvmstruct.schedules.vta.recording import Argument, record
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


@lru_cache(maxsize=256)
def _compiled(definition: Matmul) -> Callable:
    func = schedule_tile_matmul(definition).with_attr("tirx.is_scheduled", True)
    mod = tvm.IRModule({"main": func.with_attr("global_symbol", "main")})
    return tvm.compile(mod, target=tvm.target.Target({"kind": "llvm"}))["main"]


def record_tile_matmul(
    definition: Matmul, driver: Driver, arguments: Mapping[str, Argument]
) -> None:
    """Record the kernel; ``arguments`` say where each argument lies."""
    func = _compiled(definition)
    # Memory that only looks like the arguments: the recorded kernel touches none of it.
    stand_ins = [tvm.runtime.empty(b.shape, b.dtype) for b in definition.args.values()]
    with record(definition, driver, arguments):
        func(*stand_ins)
