"""Tensor intrinsics of VTA: LOAD, STORE, GEMM and ALU, each over a block of tiles.

The description is the step of `compute.tile_step` itself; the implementation calls the recorder,
which asks the driver for instructions instead of moving data. Offsets and strides go to it in
elements.
"""

from __future__ import annotations

import hashlib
from functools import cache

from tvm import tirx
from tvm.s_tir import TensorIntrin
from tvm.script.ir_builder import tirx as T

from tvmstruct.schedules.builder import argument, i64, prim_func, symbol
from tvmstruct.schedules.compute.tile_step import Step, emit_step, step_block

RECORD = "tvmstruct.vta.record."


def tile_step(step: Step, number: int) -> str:
    """Register what records ``step`` under its ``number`` in a kernel; returns its name."""
    return _register(step, number)


@cache
def _register(step: Step, number: int) -> str:
    name = f"tvmstruct.vta.{hashlib.sha256(repr((step, number)).encode()).hexdigest()[:16]}"
    TensorIntrin.register(name, _description(step), _implementation(step, number), override=True)
    return name


def _arguments(step: Step, *, strided: bool) -> dict[str, object]:
    """Declare the operands of a step, whose strides are symbols where ``strided``."""
    extents = dict(step.tiles)
    found = {}
    for role, (dims, dtype) in step.operands.items():
        inside = [step.elements[i] for i in step.inside(role)]
        shape = [*(extents.get(d, 1) for d in dims), *inside]
        layout = {}
        if strided:
            steps = [symbol(f"{role}_{d}") for d in dims]
            layout = {"strides": [*steps, i64(inside[1]), i64(1)]}
        found[role] = argument(f"{role}_tiles", shape, dtype, offset_factor=1, **layout)
    return found


def _touch(step: Step, buffers: dict[str, object]) -> None:
    """Declare the regions that the whole step reads and writes."""
    *_, target = step.operands
    updates = step.kind in ("gemm", "alu")
    # In the order in which the expression names them, as the schedule finds them.
    read = [*([target] if updates else []), *(role for role in buffers if role != target)]
    T.reads([_all(buffers[role]) for role in read])
    T.writes([_all(buffers[target])])


def _all(buffer):
    return buffer[tuple(slice(0, extent) for extent in buffer.shape)]


def _description(step: Step) -> tirx.PrimFunc:
    def body() -> None:
        buffers = _arguments(step, strided=False)

        def places(role: str, index: dict) -> list:
            return [index[d][1] for d in step.operands[role][0]]

        with T.sblock("root"):
            _touch(step, buffers)
            with step_block(step, {}) as opened:
                emit_step(step, buffers, places)(opened)

    return prim_func(body)


def _implementation(step: Step, number: int) -> tirx.PrimFunc:
    def body() -> None:
        buffers = _arguments(step, strided=True)
        with T.sblock("root"):
            _touch(step, buffers)
            values = []
            for role, (dims, _) in step.operands.items():
                buffer = buffers[role]
                values += [buffer.elem_offset, *buffer.strides[: len(dims)]]
            T.evaluate(T.call_packed(RECORD + step.kind, T.int32(number), *values))

    return prim_func(body)
