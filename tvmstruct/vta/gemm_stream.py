"""A tiled, double-buffered product as a VTA program: what the exploration times designs with.

Tiles of ``rows x inputs`` lie as [rows/batch][inputs/block], weights as [outputs/block]
[inputs/block], results as [rows/batch][outputs/block].  Inputs, weights and accumulators have two
halves each, so that loads, products and stores overlap.  Sizes are filled up to whole chunks.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

from tvmstruct.errors import VtaConfigError
from tvmstruct.vta.channel import Dram
from tvmstruct.vta.config import Config, Memory
from tvmstruct.vta.cycles import predict
from tvmstruct.vta.instructions import (
    Alu,
    AluOp,
    Deps,
    Finish,
    Gemm,
    Instruction,
    Load,
    Store,
    Uop,
)
from tvmstruct.vta.rules import RTL_UOP_DEPTH

LOAD_OVERHEAD, PIPELINE = 23, 7  # cycles of an instruction beside its work
REQUANTISE = ((AluOp.SHR, 8), (AluOp.MAX, -128), (AluOp.MIN, 127))
SIMULATED = 4  # chunks of the result, of which the later half gives the pace
LIMIT = 1 << 12  # of a tile count in one loop or row


@dataclass(frozen=True)
class Tiling:
    """A product of ``m x k`` by ``k x n`` tiles in chunks of ``tm``, ``tk`` and ``tn`` tiles."""

    m: int
    k: int
    n: int
    tm: int
    tk: int
    tn: int

    @cached_property
    def results(self) -> int:
        """Return the number of chunks of the result."""
        return -(-self.m // self.tm) * -(-self.n // self.tn)

    @cached_property
    def steps(self) -> int:
        """Return the number of chunks that are added up for one of the result."""
        return -(-self.k // self.tk)

    def estimate(self, config: Config, dram: Dram) -> float:
        """Return the cycles of the busier of compute unit and load unit, and one first load."""
        ops, outs = self.tm * self.tn * self.tk, self.tm * self.tn
        compute = self.results * (
            self.steps * (ops + PIPELINE) + (1 + len(REQUANTISE)) * (outs + PIPELINE)
        )
        beats = self.tm * self.tk * config.tile_bytes(Memory.INP)
        beats += self.tn * self.tk * config.tile_bytes(Memory.WGT)
        one = beats / dram.bus_bytes + 2 * LOAD_OVERHEAD
        return max(compute, self.results * self.steps * one) + one


def tilings(rows: int, inputs: int, outputs: int, config: Config) -> Iterator[Tiling]:
    """Yield the tilings whose two halves fit into the scratchpads of ``config``."""
    m, k, n = (
        -(-size // tile)
        for size, tile in (
            (rows, config.batch),
            (inputs, config.block_in),
            (outputs, config.block_out),
        )
    )
    halves = {memory: config.depth(memory) // 2 for memory in (Memory.INP, Memory.WGT, Memory.ACC)}
    most_uops = (min(config.depth(Memory.UOP), RTL_UOP_DEPTH) - 2) // 4
    for tk in _sizes(k):
        for tm in _sizes(m):
            if tm * tk > halves[Memory.INP]:
                break
            for tn in _sizes(n):
                if tn * tk > halves[Memory.WGT] or tn * tm > halves[Memory.ACC] or tn > most_uops:
                    break
                yield Tiling(m, k, n, tm, tk, tn)


def _sizes(total: int) -> list[int]:
    """Return chunk sizes that split ``total`` almost evenly, from 1 to all of it."""
    found, parts = {min(total, LIMIT)}, 1
    while parts < total:
        parts *= 2
        found.add(min(-(-total // parts), LIMIT))
    return sorted(found)


def best_tiling(rows: int, inputs: int, outputs: int, config: Config, dram: Dram) -> Tiling:
    """Return the tiling with the least estimate; VtaConfigError where none fits."""
    best = min(
        tilings(rows, inputs, outputs, config),
        key=lambda tiling: tiling.estimate(config, dram),
        default=None,
    )
    if best is None:
        raise VtaConfigError(f"{config.name}: no two tiles of each operand fit into its buffers")
    return best


def cycles(rows: int, inputs: int, outputs: int, config: Config, dram: Dram) -> int:
    """Return the cycles of a product with requantisation, by the cycle model.

    A long product repeats itself: the pace of the chunks of the result after the first few is
    carried on to the end.
    """
    tiling = best_tiling(rows, inputs, outputs, config, dram)
    whole = predict(program(tiling, config, SIMULATED), config, dram).cycles
    if tiling.results <= SIMULATED:
        return whole
    half = predict(program(tiling, config, SIMULATED // 2), config, dram).cycles
    pace = (whole - half) / (SIMULATED - SIMULATED // 2)
    return round(whole + (tiling.results - SIMULATED) * pace)


def uops(tiling: Tiling, config: Config) -> list[Uop]:
    """Return the micro-ops: for each half of operands and accumulators a column, then bases."""
    inp, wgt, acc = (config.depth(m) // 2 for m in (Memory.INP, Memory.WGT, Memory.ACC))
    columns = [
        Uop(dst=a * acc + u, src=h * inp, wgt=h * wgt + u * tiling.tk)
        for a in (0, 1)
        for h in (0, 1)
        for u in range(tiling.tn)
    ]
    return [*columns, *(Uop(dst=a * acc, src=a * acc) for a in (0, 1))]


def program(
    tiling: Tiling,
    config: Config,
    most: int | None = None,
    *,
    requantise: bool = True,
    bases: tuple[int, int, int, int] = (0, 0, 0, 0),
) -> list[Instruction]:
    """Return the stream for the first ``most`` chunks of the result, or for all of them.

    ``bases`` are the DRAM tile addresses of micro-ops, inputs, weights and results.
    """
    builder = _Builder(tiling, config, requantise, bases)
    results = tiling.results if most is None else min(most, tiling.results)
    return builder.build(results)


class _Builder:
    """Writes the instructions of one product; see `program`."""

    def __init__(
        self, tiling: Tiling, config: Config, requantise: bool, bases: tuple[int, int, int, int]
    ) -> None:
        self.t, self.config, self.requantise, self.bases = tiling, config, requantise, bases
        depths = (Memory.INP, Memory.WGT, Memory.ACC)
        self.inp, self.wgt, self.acc = (config.depth(m) // 2 for m in depths)
        self.stream: list[Instruction] = []
        self.step = 0

    def build(self, results: int) -> list[Instruction]:
        count = 4 * self.t.tn + 2
        self.stream = [
            Load(
                memory=Memory.UOP,
                dram_base=self.bases[0],
                y_size=1,
                x_size=count,
                x_stride=count,
            )
        ]
        steps = results * self.t.steps
        columns = -(-self.t.n // self.t.tn)
        for result in range(results):
            row, column = divmod(result, columns)
            self._reset(result)
            for k in range(self.t.steps):
                self._load(row, column, k)
                self._multiply(result, last=k == self.t.steps - 1, total=steps)
                self.step += 1
            if self.requantise:
                self._requantise(result)
            self._store(result, row, column, results)
        pops = Deps(pop_next=True)
        self.stream.append(Finish(deps=pops))
        return self.stream

    def _reset(self, result: int) -> None:
        """Zero half of the accumulators once the result before the last has left them."""
        t, base = self.t, 4 * self.t.tn + result % 2
        self.stream.append(
            Gemm(
                reset=True,
                uop_bgn=base,
                uop_end=base + 1,
                iter_out=t.tm,
                iter_in=t.tn,
                dst_factor_out=t.tn if t.tm > 1 else 0,
                dst_factor_in=1 if t.tn > 1 else 0,
                deps=Deps(pop_next=result >= 2),
            )
        )

    def _load(self, row: int, column: int, k: int) -> None:
        t, half = self.t, self.step % 2
        self.stream += [
            Load(
                memory=Memory.INP,
                sram_base=half * self.inp,
                dram_base=self.bases[1] + row * t.tm * t.k + k * t.tk,
                y_size=t.tm,
                x_size=t.tk,
                x_stride=t.k,
                deps=Deps(pop_next=self.step >= 2),
            ),
            Load(
                memory=Memory.WGT,
                sram_base=half * self.wgt,
                dram_base=self.bases[2] + column * t.tn * t.k + k * t.tk,
                y_size=t.tn,
                x_size=t.tk,
                x_stride=t.k,
                deps=Deps(push_next=True),
            ),
        ]

    def _multiply(self, result: int, *, last: bool, total: int) -> None:
        t = self.t
        base = (2 * (result % 2) + self.step % 2) * t.tn
        deps = Deps(
            pop_prev=True,
            push_prev=self.step + 2 < total,
            push_next=last and not self.requantise,
        )
        self.stream.append(
            Gemm(
                uop_bgn=base,
                uop_end=base + t.tn,
                iter_out=t.tm,
                iter_in=t.tk,
                dst_factor_out=t.tn if t.tm > 1 else 0,
                src_factor_out=t.tk if t.tm > 1 else 0,
                src_factor_in=1 if t.tk > 1 else 0,
                wgt_factor_in=1 if t.tk > 1 else 0,
                deps=deps,
            )
        )

    def _requantise(self, result: int) -> None:
        t, base = self.t, 4 * self.t.tn + result % 2
        outer, inner = t.tn if t.tm > 1 else 0, 1 if t.tn > 1 else 0
        for i, (operation, operand) in enumerate(REQUANTISE):
            self.stream.append(
                Alu(
                    alu_opcode=operation,
                    use_imm=True,
                    imm=operand,
                    uop_bgn=base,
                    uop_end=base + 1,
                    iter_out=t.tm,
                    iter_in=t.tn,
                    dst_factor_out=outer,
                    dst_factor_in=inner,
                    src_factor_out=outer,
                    src_factor_in=inner,
                    deps=Deps(push_next=i == len(REQUANTISE) - 1),
                )
            )

    def _store(self, result: int, row: int, column: int, results: int) -> None:
        t = self.t
        last = result == results - 1
        self.stream.append(
            Store(
                sram_base=result % 2 * self.acc,
                dram_base=self.bases[3] + row * t.tm * t.n + column * t.tn,
                y_size=t.tm,
                x_size=t.tn,
                x_stride=t.n,
                deps=Deps(pop_prev=True, push_prev=last or result + 2 < results),
            )
        )
