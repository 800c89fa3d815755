"""Functional simulator: what a program makes of the DRAM image, bit for bit.

It follows VTA's own functional simulator (STORE cuts the accumulator when it runs) and, when
strict, refuses programs on which hardware would differ; see ``portable``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field

import numpy as np
from tvm_ffi import from_dlpack

from tvmstruct.arrays import aligned_empty
from tvmstruct.errors import VtaConfigError, VtaRunError
from tvmstruct.vta.accesses import Accesses, accesses_of, tiles
from tvmstruct.vta.config import DEFAULT, Config, Memory
from tvmstruct.vta.dram import Dram, decode_words, pack, unpack
from tvmstruct.vta.isa import (
    Alu,
    AluOp,
    Finish,
    Gemm,
    Instruction,
    Load,
    Store,
    VectorGemm,
    decode_stream,
)
from tvmstruct.vta.kernels import element_dtype, kernels
from tvmstruct.vta.portable import Level, register_shift_limit, verify
from tvmstruct.vta.queues import Token, described, order
from tvmstruct.vta.scratchpads import ScratchpadState
from tvmstruct.vta.vector_gemm import vector_gemm

TILE_OP_LIMIT = 1 << 28


@dataclass
class Counters:
    """What the reference simulator counts: data bytes without pads, tile operations."""

    inp_load_nbytes: int = 0
    wgt_load_nbytes: int = 0
    acc_load_nbytes: int = 0
    uop_load_nbytes: int = 0
    out_store_nbytes: int = 0
    gemm_counter: int = 0
    alu_counter: int = 0

    def to_dict(self) -> dict[str, int]:
        """Return name and value of every counter."""
        return asdict(self)


@dataclass(frozen=True)
class Run:
    """One launch: the image after it, and its counters."""

    dram: np.ndarray
    counters: Counters
    order: tuple[int, ...] = field(repr=False)


class Machine:
    """A VTA whose scratchpads survive from one launch to the next, as on hardware.

    At power-up every scratchpad holds zeros, which is our choice: hardware holds anything, so
    a strict launch refuses to read a tile that neither it nor an earlier one wrote.
    """

    def __init__(self, config: Config = DEFAULT) -> None:
        if config.log_acc_width != 5:
            raise VtaConfigError(
                f"simulator: accumulators of {config.width(Memory.ACC)} bits; want 32"
            )
        self.config = config
        ci, co, batch = config.block_in, config.block_out, config.batch
        self.uops = _zeros((config.depth(Memory.UOP), 3), "int32")
        self.inp = _zeros((config.depth(Memory.INP), batch, ci), element_dtype(config, Memory.INP))
        # [in][out]: the kernel's vectors run over outputs
        self.wgt = _zeros((config.depth(Memory.WGT), ci, co), element_dtype(config, Memory.WGT))
        self.acc = _zeros((config.depth(Memory.ACC), batch, co), "int32")
        self.state = ScratchpadState(self.uops)
        self.tokens: dict[Token, int] = {}
        flat = self.acc.reshape(len(self.acc), -1)
        self._tensors = {
            name: from_dlpack(array)
            for name, array in (
                ("uops", self.uops),
                ("inp", self.inp),
                ("wgt", self.wgt),
                ("acc", self.acc),
                ("flat", flat),
            )
        }

    def launch(
        self,
        program: bytes | Sequence[Instruction],
        dram: bytes | np.ndarray,
        base: int,
        *,
        strict: bool = True,
        level: Level = Level.RTL,
        limit: int = TILE_OP_LIMIT,
    ) -> Run:
        """Run a program on the image ``dram``, which starts at the physical address ``base``.

        The image given is not changed.  ``strict`` refuses what simulator and hardware treat
        differently at ``level``; ``limit`` bounds the tile operations of the whole program.
        Raises VtaRunError with the rule that is broken, or VtaEncodingError.
        """
        if isinstance(program, bytes | bytearray | memoryview):
            program = decode_stream(bytes(program), self.config, ignore_unused=not strict)
        image = _image(dram)
        if (work := sum(_work(i) for i in program)) > limit:
            largest = max(range(len(program)), key=lambda n: _work(program[n]))
            raise VtaRunError(
                "limit",
                f"the program has {work} tile operations, over {limit}; "
                f"the largest is {described(largest, program[largest])}",
                largest,
            )
        memory = Dram(image, base)
        found = order(program, self.tokens)
        if strict:
            verify(program, image, base, self.config, level, state=self.state, found=found)
        launch = Launch(self, program, memory, level if strict else None)
        for index in found.sequence:
            launch.run(index)
        self.tokens = dict(found.left)
        return Run(image, launch.counters, found.sequence)


class Launch:
    """One program on a machine, instruction by instruction."""

    def __init__(
        self,
        machine: Machine,
        program: Sequence[Instruction],
        memory: Dram,
        level: Level | None,
    ) -> None:
        self.machine, self.program, self.memory, self.level = machine, program, memory, level
        self.config, self.counters = machine.config, Counters()

    def run(self, index: int) -> None:
        """Run one instruction."""
        instruction = self.program[index]
        touched = accesses_of(index, instruction, self.machine.uops, self.config)
        if isinstance(instruction, Load):
            self.load(index, instruction, touched)
        elif isinstance(instruction, Store):
            self.store(index, instruction, touched)
        elif isinstance(instruction, Finish) or not instruction.tile_ops:
            pass
        elif isinstance(instruction, Gemm):
            self.gemm(instruction, touched)
        else:
            self.alu(index, instruction, touched)
        self.machine.state.apply(instruction, touched)

    def load(self, index: int, i: Load, touched: Accesses) -> None:
        """Copy rows into a scratchpad, zeros around them."""
        if i.memory is Memory.OUT:
            raise VtaRunError(
                "memory", f"{described(index, i)}: nothing can be loaded into out", index
            )
        if i.is_nop:
            return
        shape = self.config.tile_shape(i.memory)
        block = np.zeros((i.rows, i.row_tiles, *shape), self._dtype(i.memory))
        if touched.dram is not None:
            rows = self.memory.rows(index, i, touched.dram)
            inside = block[i.y_pad_0 : i.y_pad_0 + i.y_size, i.x_pad_0 : i.x_pad_0 + i.x_size]
            inside[...] = unpack(rows, i.memory, self.config)
            self._count(i.memory, i.y_size * i.x_size)
        place = slice(i.sram_base, i.sram_base + i.rows * i.row_tiles)
        flat = block.reshape(-1, *shape)
        machine = self.machine
        if i.memory is Memory.UOP:
            machine.uops[place] = decode_words(flat[:, 0], self.config)
        elif i.memory is Memory.WGT:
            machine.wgt[place] = flat.transpose(0, 2, 1)
        elif i.memory is Memory.INP:
            machine.inp[place] = flat
        else:
            machine.acc[place] = flat

    def store(self, index: int, i: Store, touched: Accesses) -> None:
        """Copy the low bits of accumulators to rows."""
        if i.memory is not Memory.OUT and not i.is_nop:
            raise VtaRunError("memory", f"{described(index, i)}: only out can be stored", index)
        if touched.dram is None:
            return
        rows = self.memory.rows(index, i, touched.dram)
        block = self.machine.acc[i.sram_base : i.sram_base + i.y_size * i.x_size]
        data = pack(block.reshape(i.y_size, -1), Memory.OUT, self.config)
        if touched.dram.pitch < touched.dram.size:  # rows overlap: the last one wins
            for row, values in zip(rows, data, strict=True):
                row[...] = values
        else:
            rows[...] = data
        self.counters.out_store_nbytes += i.y_size * i.x_size * self.config.tile_bytes(Memory.OUT)

    def gemm(self, i: Gemm, touched: Accesses) -> None:
        """Multiply, or reset accumulators."""
        machine = self.machine
        if i.reset:
            machine.acc[tiles(touched.writes[Memory.ACC])] = 0
            return
        self.counters.gemm_counter += i.tile_ops
        if isinstance(i, VectorGemm):
            vector_gemm(i, machine.uops, machine.acc, machine.inp, machine.wgt)
            return
        t = machine._tensors
        kernels(self.config).gemm(
            t["acc"], t["inp"], t["wgt"], t["uops"], i.uop_bgn, i.uop_end - i.uop_bgn,
            i.iter_out, i.iter_in, i.dst_factor_out, i.dst_factor_in, i.src_factor_out,
            i.src_factor_in, i.wgt_factor_out, i.wgt_factor_in,
        )  # fmt: skip

    def alu(self, index: int, i: Alu, touched: Accesses) -> None:
        """Apply a vector operation."""
        if self.level is not None and i.alu_opcode is AluOp.SHR and not i.use_imm:
            self.check_amounts(index, i, touched)
        t = self.machine._tensors
        kernels(self.config).alu[i.alu_opcode](
            t["flat"], t["uops"], i.uop_bgn, i.uop_end - i.uop_bgn, i.iter_out, i.iter_in,
            i.dst_factor_out, i.dst_factor_in, i.src_factor_out, i.src_factor_in,
            int(i.use_imm), i.imm,
        )  # fmt: skip
        self.counters.alu_counter += i.tile_ops

    def check_amounts(self, index: int, i: Alu, touched: Accesses) -> None:
        """Refuse amounts of a register shift that hardware reads otherwise."""
        limit = register_shift_limit(self.level or Level.RTL)
        amounts = self.machine.acc[tiles(touched.reads[Memory.ACC] & ~touched.writes[Memory.ACC])]
        if amounts.size and (amounts.min() < 0 or amounts.max() > limit):
            raise VtaRunError(
                "shift-register",
                f"{described(index, i)} shifts by {amounts.min()} to {amounts.max()}; "
                f"simulator and hardware agree on 0 to {limit}",
                index,
            )

    def _dtype(self, memory: Memory) -> str:
        return "uint32" if memory is Memory.UOP else element_dtype(self.config, memory)

    def _count(self, memory: Memory, count: int) -> None:
        name = "acc" if memory is Memory.ACC8 else memory.name.lower()
        name = f"{name}_load_nbytes"
        size = count * self.config.sram_tile_bytes(memory)
        setattr(self.counters, name, getattr(self.counters, name) + size)


def simulate(
    program: bytes | Sequence[Instruction],
    dram: bytes | np.ndarray,
    base: int,
    config: Config = DEFAULT,
    *,
    strict: bool = True,
    level: Level = Level.RTL,
    limit: int = TILE_OP_LIMIT,
) -> Run:
    """Launch one program on a machine just powered up; see ``Machine.launch``."""
    return Machine(config).launch(program, dram, base, strict=strict, level=level, limit=limit)


def _work(instruction: Instruction) -> int:
    return instruction.tile_ops if isinstance(instruction, Gemm | Alu) else 0


def _image(dram: bytes | np.ndarray) -> np.ndarray:
    if isinstance(dram, np.ndarray):
        return np.ascontiguousarray(dram).view(np.uint8).reshape(-1).copy()
    return np.frombuffer(dram, np.uint8).copy()


def _zeros(shape: tuple[int, ...], dtype: str) -> np.ndarray:
    array = aligned_empty(shape, dtype)
    array.fill(0)
    return array
