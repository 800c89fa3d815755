"""How long a unit is taken by an instruction: the measured rules, as jobs for the engine.

With free memory, n tile operations and B beats: GEMM n + 7, ALU with an immediate n + 7, with two
registers 2n + 7, loads 23 + B + E (micro-ops one less), stores 3 for each out tile of 16 bytes and
for each burst, NOP and FINISH 2.  E is what pads cost: they are written while no beat arrives, for
which about 20 cycles of latency leave room.
"""

from __future__ import annotations

from collections.abc import Iterable
from itertools import chain
from math import gcd

from tvmstruct.errors import VtaRunError
from tvmstruct.vta.channel import ACC, INP, UOP, WGT, Dram
from tvmstruct.vta.config import LOOP_BITS, Config, Memory
from tvmstruct.vta.engine import POPS, PUSHES, Job
from tvmstruct.vta.instructions import (
    Alu,
    Deps,
    Finish,
    Gemm,
    Instruction,
    Load,
    Store,
    Transfer,
    VectorGemm,
    unit_of,
)

TOKEN_ONLY = 2  # NOP and FINISH
PIPELINE = 7  # of the matrix unit and the ALU
SCALE_STAGE = 1  # of the proposed vector unit before the matrix unit
ASK, LOAD_TAIL = 4, 3  # from the start to the first request, from the last beat to the end
UOP_TAIL = 2
PADS_IN_LATENCY = 20
STORE_TILE, STORE_BURST, STORE_END = 1, 3, 1  # beside the beats of a tile
FREE_ROWS, TAGS, TAG_STALL = 10, 16, 18  # micro-op rows of one beat, see `_tag_stall`

CLIENT = {Memory.UOP: UOP, Memory.INP: INP, Memory.WGT: WGT, Memory.ACC: ACC, Memory.ACC8: ACC}


def jobs(stream: Iterable[Instruction], config: Config, dram: Dram) -> list[Job]:
    """Return the job of every instruction; VtaRunError names one that no hardware can run."""
    found: list[Job] = []
    for index, instruction in enumerate(stream):
        if isinstance(instruction, Transfer) and not instruction.is_nop:
            _check(index, instruction, config)
        found.append(job(instruction, config, dram))
    return found


def _check(index: int, transfer: Transfer, config: Config) -> None:
    """Refuse a transfer that hangs hardware, is larger than its scratchpad or loads outputs."""
    if isinstance(transfer, Load) and transfer.memory is Memory.OUT:
        raise VtaRunError(
            "load-memory", f"instruction {index}: nothing can be loaded into out", index
        )
    if not transfer.y_size:
        raise VtaRunError(
            "rows",
            f"instruction {index}: y_size is 0 but x_size {transfer.x_size}: hardware waits for "
            "rows without end; take x_size 0 for a NOP",
            index,
        )
    tiles, depth = transfer.rows * transfer.row_tiles, config.depth(transfer.memory)
    if tiles > depth:
        raise VtaRunError(
            "size",
            f"instruction {index}: {tiles} tiles, but the {transfer.memory.name.lower()} buffer "
            f"holds {depth}",
            index,
        )


def job(instruction: Instruction, config: Config, dram: Dram) -> Job:
    """Return what an instruction means for time."""
    unit = int(unit_of(instruction))
    pops, pushes = _tokens(unit, instruction.deps)
    if isinstance(instruction, Finish):
        return Job(unit, pops, pushes, TOKEN_ONLY, last=True)
    if isinstance(instruction, Gemm | Alu):
        return Job(unit, pops, pushes, _arithmetic(instruction))
    if instruction.is_nop:
        return Job(unit, pops, pushes, TOKEN_ONLY)
    if isinstance(instruction, Store):
        return Job(unit, pops, pushes, _store(instruction, config, dram))
    bursts, ask, cycles, slack = _load(instruction, config, dram)
    client = CLIENT[instruction.memory]
    return Job(unit, pops, pushes, cycles, client=client, bursts=bursts, ask=ask, slack=slack)


def _tokens(unit: int, deps: Deps) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Return the tokens popped and pushed; flags that point nowhere count for nothing."""
    pops = zip((deps.pop_prev, deps.pop_next), POPS[unit], strict=True)
    pushes = zip((deps.push_prev, deps.push_next), PUSHES[unit], strict=True)
    return (
        tuple(token for wanted, token in pops if wanted and token is not None),
        tuple(token for wanted, token in pushes if wanted and token is not None),
    )


def tile_operations(instruction: Gemm | Alu) -> int:
    """Return the tile operations that hardware runs: a count of 0 wraps to 2^14."""
    wrap = 1 << LOOP_BITS
    uops = (instruction.uop_end - instruction.uop_bgn) % wrap or wrap
    return (instruction.iter_out or wrap) * (instruction.iter_in or wrap) * uops


def _arithmetic(instruction: Gemm | Alu) -> int:
    count = tile_operations(instruction)
    if isinstance(instruction, Alu) and not instruction.use_imm:
        return 2 * count + PIPELINE  # one read port of the accumulators
    return count + PIPELINE + SCALE_STAGE * isinstance(instruction, VectorGemm)


def _bursts(transfer: Transfer, config: Config, dram: Dram) -> list[int]:
    """Return the beats of all bursts, row by row; rows repeat once they lie alike in a block."""
    tile = config.tile_bytes(transfer.memory)
    start, pitch = transfer.dram_base * tile, transfer.x_stride * tile
    count, rows = transfer.x_size * tile, transfer.y_size
    block = dram.burst_beats * dram.bus_bytes
    period = min(rows, block // gcd(pitch, block))
    each = [dram.bursts(start + row * pitch, count) for row in range(period)]
    times, rest = divmod(rows, period)
    return times * list(chain(*each)) + list(chain(*each[:rest]))


def _store(store: Store, config: Config, dram: Dram) -> int:
    """Return the cycles of a store: writes have no latency, one burst is under way at a time."""
    bursts = len(_bursts(store, config, dram))
    tile = -(-config.tile_bytes(Memory.OUT) // dram.bus_bytes) + STORE_TILE
    return tile * store.x_size * store.y_size + STORE_BURST * bursts + STORE_END


def _load(load: Load, config: Config, dram: Dram) -> tuple[list[int], int, int, int]:
    """Return bursts, cycles before the first, occupancy with free memory, slack of pads."""
    bursts = _bursts(load, config, dram)
    pads = load.rows * load.row_tiles - load.y_size * load.x_size
    if pads and not (load.x_pad_0 or load.x_pad_1) and load.y_pad_1:
        pads += load.y_size
    extra = max(load.y_pad_0, pads - PADS_IN_LATENCY) if pads else 0
    tail = LOAD_TAIL
    if load.memory is Memory.UOP:
        tail = UOP_TAIL + _tag_stall(bursts)
    cycles = ASK + dram.latency + sum(bursts) + tail + extra
    return bursts, ASK, cycles, extra - load.y_pad_0 if pads else 0


def _tag_stall(bursts: list[int]) -> int:
    """Return what many micro-op rows of one beat lose.

    Measured: none up to about ten rows, 18 cycles for 16; carried on for each further 16.
    """
    if max(bursts) > 1:
        return 0
    return TAG_STALL * max(0, -(-(len(bursts) - FREE_ROWS) // TAGS))
