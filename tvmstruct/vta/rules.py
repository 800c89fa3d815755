"""Rules for one instruction: where simulator, register-transfer model and HLS would differ.

A rule looks at a ``Step`` and says what is wrong, or returns None.  ``Level.RTL`` rules hold
for the functional simulator and the Chisel design; ``Level.HLS`` adds what only the HLS design
(or the OpenCL one) needs.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from enum import IntEnum
from functools import lru_cache

import numpy as np

from tvmstruct.vta.accesses import CACHED, Accesses, accesses_of, repeat, tile_set, tiles, words_of
from tvmstruct.vta.config import Config, Memory
from tvmstruct.vta.isa import Alu, AluOp, Gemm, Instruction, Load, Store
from tvmstruct.vta.scratchpads import ScratchpadState

RTL_UOP_DEPTH = 2048  # of the Chisel design, whose JSON says 8192
SHOWN = 4


class Level(IntEnum):
    """Which designs must agree: simulator and RTL, or HLS too."""

    RTL = 1
    HLS = 2


@dataclass(frozen=True)
class Step:
    """An instruction, what it touches, and the micro-ops (n, 3) that it runs."""

    instruction: Instruction
    touched: Accesses
    words: np.ndarray


@dataclass(frozen=True)
class Rule:
    """A name, the level from which it holds, why, and the check."""

    name: str
    level: Level
    reason: str
    check: Callable[[Step], str | None]


@dataclass(frozen=True)
class StateRule:
    """A rule about what an instruction touches and what ran before it."""

    name: str
    reason: str
    check: Callable[[Accesses, ScratchpadState], str | None]


def _zero_count(step: Step) -> str | None:
    i = step.instruction
    if isinstance(i, Gemm | Alu) and not i.tile_ops:
        return f"iter is {i.iter_out} x {i.iter_in}, uops {i.uop_bgn} to {i.uop_end}"
    if isinstance(i, Load | Store) and i.x_size and not i.y_size:
        return f"y_size is 0 with x_size {i.x_size}"
    return None


def _memory(step: Step) -> str | None:
    i = step.instruction
    if isinstance(i, Store) and i.memory is not Memory.OUT:
        return f"it stores {i.memory.name.lower()}; only out can be stored"
    if isinstance(i, Load) and i.memory is Memory.OUT:
        return "nothing can be loaded into out"
    return None


def _store_pads(step: Step) -> str | None:
    i = step.instruction
    if isinstance(i, Store) and any((i.y_pad_0, i.y_pad_1, i.x_pad_0, i.x_pad_1)):
        return f"pads are {i.y_pad_0}, {i.y_pad_1}, {i.x_pad_0}, {i.x_pad_1}; must be 0"
    return None


def _acc8(step: Step) -> str | None:
    i = step.instruction
    bad = isinstance(i, Load) and i.memory is Memory.ACC8
    return "load int8 into acc (memory id 5)" if bad else None


def _mul(step: Step) -> str | None:
    i = step.instruction
    return "MUL is used" if isinstance(i, Alu) and i.alu_opcode is AluOp.MUL else None


def _immediate_source(step: Step) -> str | None:
    i = step.instruction
    if not isinstance(i, Alu) or not i.use_imm or not i.tile_ops:
        return None
    words = step.words
    different = np.flatnonzero(words[:, 0] != words[:, 1])
    if len(different):
        u = int(different[0])
        return f"uop {i.uop_bgn + u} has dst {words[u, 0]} and src {words[u, 1]}"
    for name, count in (("out", i.iter_out), ("in", i.iter_in)):
        dst, src = (getattr(i, f"{end}_factor_{name}") for end in ("dst", "src"))
        if count > 1 and dst != src:
            return f"dst_factor_{name} is {dst} and src_factor_{name} {src}"
    return None


def _alu_distance(step: Step) -> str | None:
    i = step.instruction
    if not isinstance(i, Alu) or not i.tile_ops:
        return None
    words, d_out, d_in = step.words, i.dst_factor_out, i.dst_factor_in
    dst, src = words[:, 0].astype(np.int64), words[:, 1].astype(np.int64)
    s_out, s_in = i.src_factor_out, i.src_factor_in
    if i.use_imm:
        src, s_out, s_in = dst, d_out, d_in
    outer, inner = (i.iter_out, s_out - d_out), (i.iter_in, s_in - d_in)
    wrap_in = (i.iter_in - 1, inner[1])
    wrap_out = (i.iter_out - 1, outer[1])
    # what the later operation reads less what the earlier wrote, at the loops' start
    last = dst[-1:]
    between = last + (i.iter_in - 1) * d_in
    if (
        _meets(src[1:] - dst[:-1], outer, inner)
        or _meets(src[:1] + s_in - last, outer, wrap_in)
        or _meets(src[:1] + s_out - between, wrap_out, (1, 0))
    ):
        return "an operation reads the tile that the one before it wrote"
    return None


def _meets(start: np.ndarray, outer: tuple[int, int], inner: tuple[int, int]) -> bool:
    """Return whether start + y * step_y + x * step_x is 0 for some y < count_y, x < count_x."""
    (rows, row_step), (columns, column_step) = outer, inner
    if not len(start) or rows < 1 or columns < 1:
        return False
    # a step of 0 makes its loop irrelevant; others are short, for indices are below the depth
    y = np.arange(rows if row_step else 1, dtype=np.int64) * row_step
    x = np.arange(columns if column_step else 1, dtype=np.int64) * column_step
    return bool(np.isin(-np.unique(start), (y[:, None] + x).ravel()).any())


def _gemm_distance(step: Step) -> str | None:
    i = step.instruction
    if not isinstance(i, Gemm) or i.reset or not i.tile_ops:
        return None
    dst = step.words[:, 0]
    for distance in (1, 2):
        same = np.flatnonzero(dst[distance:] == dst[:-distance])
        if len(same):
            u = i.uop_bgn + int(same[0])
            return f"uops {u} and {u + distance} have dst {dst[same[0]]}; want 3 apart"
    return None


def _shift_range(step: Step) -> str | None:
    i = step.instruction
    if not isinstance(i, Alu) or i.alu_opcode is not AluOp.SHR or not i.use_imm:
        return None
    return None if -16 <= i.imm <= 15 else f"imm is {i.imm}, want -16 to 15"


def _register_shift(step: Step) -> str | None:
    i = step.instruction
    if not isinstance(i, Alu) or i.alu_opcode is not AluOp.SHR or i.use_imm or not i.tile_ops:
        return None
    if i.imm < 0:
        return f"bit 15 of the unused imm ({i.imm}) makes RTL shift left"
    changed = step.touched.writes[Memory.ACC] & _sources(step, i)
    return f"it changes its own amounts, acc {shown(changed)}" if changed else None


def _sources(step: Step, i: Alu) -> int:
    inner = repeat(tile_set(step.words[:, 1]), i.iter_in, i.src_factor_in)
    return repeat(inner, i.iter_out, i.src_factor_out)


def _uop_depth(step: Step) -> str | None:
    used = step.touched.reads.get(Memory.UOP, 0) | step.touched.writes.get(Memory.UOP, 0)
    last = used.bit_length() - 1
    return f"it uses uop {last}, and RTL has {RTL_UOP_DEPTH}" if last >= RTL_UOP_DEPTH else None


def _alu_uop(step: Step) -> str | None:
    i = step.instruction
    if not isinstance(i, Alu) or not i.tile_ops:
        return None
    bad = np.flatnonzero(step.words[:, 2])
    return f"uop {i.uop_bgn + int(bad[0])} has a wgt index" if len(bad) else None


def _weight_pads(step: Step) -> str | None:
    i = step.instruction
    if not isinstance(i, Load) or i.memory is not Memory.WGT or i.is_nop:
        return None
    return "weights are padded" if _padded(i) else None


def _uop_rows(step: Step) -> str | None:
    i = step.instruction
    if not isinstance(i, Load) or i.memory is not Memory.UOP or i.is_nop:
        return None
    return f"{i.y_size} rows, or pads" if i.y_size != 1 or _padded(i) else None


def _padded(i: Load) -> bool:
    return any((i.y_pad_0, i.y_pad_1, i.x_pad_0, i.x_pad_1))


def _unwritten(touched: Accesses, state: ScratchpadState) -> str | None:
    """Say which tiles are read that nobody wrote: power-up contents are undefined."""
    found = state.unwritten(touched)
    return f"{found[0].name.lower()} {shown(found[1])} was never written" if found else None


def _stale(touched: Accesses, state: ScratchpadState) -> str | None:
    """Say which outputs are stored that are not what hardware's OUT memory holds."""
    old = touched.reads.get(Memory.OUT, 0) & ~state.fresh
    return f"out {shown(old)} was last written by LOAD or a GEMM reset" if old else None


def shown(members: int) -> str:
    """Return ``tiles 3, 4, 5, 6 and 7 more``."""
    found = tiles(members)
    more = f" and {len(found) - SHOWN} more" if len(found) > SHOWN else ""
    return f"tile{'s' * (len(found) > 1)} {', '.join(map(str, found[:SHOWN]))}{more}"


RULES = (
    Rule("zero-count", Level.RTL, "RTL takes 0 for 16384, or hangs", _zero_count),
    Rule("memory", Level.RTL, "the simulator refuses other memories", _memory),
    Rule("store-pads", Level.RTL, "the simulator refuses them", _store_pads),
    Rule("acc8", Level.RTL, "RTL and HLS have no such load", _acc8),
    Rule("mul", Level.RTL, "RTL and HLS have no multiply in the ALU", _mul),
    Rule("immediate-source", Level.RTL, "RTL reads src where others read dst", _immediate_source),
    Rule("alu-distance", Level.RTL, "RTL does not forward between operations", _alu_distance),
    Rule("shift-range", Level.HLS, "HLS reads 5 signed bits", _shift_range),
    Rule("shift-register", Level.RTL, "RTL shifts right by 5 bits of the element", _register_shift),
    Rule("uop-depth", Level.RTL, "RTL wraps indices", _uop_depth),
    Rule("alu-uop-wgt", Level.RTL, "RTL merges the wgt index into src", _alu_uop),
    Rule("gemm-distance", Level.HLS, "HLS's pipeline has no bypass", _gemm_distance),
    Rule("weight-pads", Level.HLS, "HLS ignores them", _weight_pads),
    Rule("uop-rows", Level.HLS, "HLS copies one row without pads", _uop_rows),
)
# These depend on what ran before; they hold on every level.
STATE_RULES = (
    StateRule("unwritten", "power-up contents are undefined", _unwritten),
    StateRule("stale-out", "hardware stores what OUT held before", _stale),
)


@lru_cache(maxsize=CACHED)
def broken(
    level: Level, instruction: Instruction, words: bytes, config: Config
) -> tuple[tuple[str, str], ...]:
    """Return name and message of each of ``RULES`` that an instruction breaks."""
    uops = np.zeros((config.depth(Memory.UOP), 3), np.int32)
    words_of(instruction, uops)[...] = np.frombuffer(words, np.int32).reshape(-1, 3)
    step = Step(instruction, accesses_of(0, instruction, uops, config), words_of(instruction, uops))
    rules = (rule for rule in RULES if rule.level <= level)
    found = ((rule, rule.check(step)) for rule in rules)
    return tuple((rule.name, f"{wrong}; {rule.reason}") for rule, wrong in found if wrong)
