"""Layers in a row on x86, for as few rows as a register tile holds: which pay, and their kernel."""

from __future__ import annotations

from collections.abc import Sequence

from tvm import tirx
from tvm.s_tir import Schedule

from tvmstruct.ops import Dense, Op
from tvmstruct.schedules.compute import sequence as compute
from tvmstruct.schedules.compute.chain import RowNest
from tvmstruct.schedules.compute.sequence import Member
from tvmstruct.schedules.registry import Kernel, make_kernel
from tvmstruct.schedules.vector_math import replace_math
from tvmstruct.schedules.x86.chain import schedule_chain
from tvmstruct.schedules.x86.packed_dense import HEIGHTS
from tvmstruct.targets import Isa

MACS = 1 << 21  # of a layer: with more, the cost of a kernel of its own no longer counts
OWN = 3  # rows of a thread: fewer multiply faster than a second-level cache yields weights
WAKE_MACS = 120 << 10  # that one thread computes while a second one wakes
PHASE_MACS = 8 << 10  # and while threads of a team wait for each other


def pays(isa: Isa, op: Op, precision: str, rows: int, threads: int) -> bool:
    """Return whether a layer is small enough for waking threads to matter, and can be joined."""
    if _block(rows, threads) > HEIGHTS[isa.name][0]:
        return False
    if isinstance(op, Dense):  # its packed weights serve every number of rows, and stay one copy
        return False
    return rows * op.macs <= MACS


def sequence(
    isa: Isa, members: Sequence[Member], inputs: Sequence[int], rows: int, threads: int
) -> Kernel:
    """Return the kernel: arguments are the inputs, the constants, y."""
    programs = [member.program for member in members]
    macs = sum(p.parts * product.macs for p in programs for product in p.products)
    steps = sum(p.parts * product.steps for p in programs for product in p.products)
    phases = sum(1 if p.parts > 1 else len(p.stages) for p in programs)
    nest = _nest(isa, rows, steps, phases, threads)

    def build() -> tirx.PrimFunc:
        definition, tiles = compute.sequence(members, inputs, rows, nest, isa.lanes)
        schedule = Schedule(definition)
        schedule_chain(schedule, isa, tiles)
        return replace_math(schedule.mod["main"])

    key = (isa.name, rows, nest, *(m.key for m in members))
    return make_kernel("sequence", key, build, work=macs)


def _nest(isa: Isa, rows: int, steps: int, phases: int, threads: int) -> RowNest:
    """Return how threads share the work: their own rows, parts of all stages, or not at all."""
    mode, height = "none", rows
    if _block(rows, threads) < rows and _pays(rows, steps, 0, threads):
        mode, height = "rows", rows // threads
    elif _pays(rows, steps, phases, threads):
        mode = "team"
    heights = tuple(h for h in HEIGHTS[isa.name] if h <= height)
    return RowNest(heights, height, mode, isa.registers * 3 // 4, threads)


def _pays(rows: int, steps: int, phases: int, threads: int) -> bool:
    """Return whether threads that wait for each other after each phase are faster than one."""
    saved = steps * max(2, rows) * (threads - 1) // threads  # one row waits for its weights
    return saved > WAKE_MACS + phases * PHASE_MACS


def _block(rows: int, threads: int) -> int:
    """Return the rows that pass all layers together."""
    own, rest = divmod(rows, threads)
    return own if not rest and own >= OWN else rows
