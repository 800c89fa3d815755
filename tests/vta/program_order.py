"""A VTA that runs a program from top to bottom, in numpy: what it means, without its units.

Tokens are ignored, so a program that is right here may still race on hardware; the simulator
and its checker are for that.
"""

from __future__ import annotations

import numpy as np

from tvmstruct.vta.config import Config, Memory
from tvmstruct.vta.instructions import Alu, AluOp, Finish, Gemm, Load, Store
from tvmstruct.vta.isa import decode_stream

TYPES = {Memory.UOP: "<u4", Memory.ACC: "<i4"}


class Machine:
    """Scratchpads of tiles (depth, rows, columns)."""

    def __init__(self, config: Config) -> None:
        self.config = config
        kinds = (Memory.UOP, Memory.WGT, Memory.INP, Memory.ACC)
        self.pads = {
            m: np.zeros((config.depth(m), *config.tile_shape(m)), TYPES.get(m, "i1")) for m in kinds
        }

    def run(self, insn: bytes, image: np.ndarray, base: int) -> None:
        """Run a program on ``image`` (bytes,) uint8, which lies at ``base``."""
        for instruction in decode_stream(insn, self.config):
            match instruction:
                case Load() | Store() if not instruction.is_nop:
                    self._move(instruction, image, base)
                case Gemm():
                    self._gemm(instruction)
                case Alu():
                    self._alu(instruction)
                case Finish():
                    return

    def _move(self, t: Load | Store, image: np.ndarray, base: int) -> None:
        assert not t.y_pad_0 + t.y_pad_1 + t.x_pad_0 + t.x_pad_1, "pads are not used here"
        size = self.config.tile_bytes(t.memory)
        tiles = t.dram_base + t.x_stride * np.arange(t.y_size)[:, None] + np.arange(t.x_size)
        places = (tiles * size - base).reshape(-1, 1) + np.arange(size)
        at = slice(t.sram_base, t.sram_base + t.y_size * t.x_size)
        if isinstance(t, Store):
            low = self.pads[Memory.ACC][at].astype(np.uint32).astype(np.uint8)
            image[places] = low.reshape(places.shape)
        else:
            pad = self.pads[t.memory]
            pad[at] = image[places].view(pad.dtype).reshape(pad[at].shape)

    def _indices(self, loops: Gemm | Alu, wgt: tuple[int, int] = (0, 0)) -> list[np.ndarray]:
        words = self.pads[Memory.UOP][loops.uop_bgn : loops.uop_end].reshape(-1).astype(np.int64)
        outer = np.arange(loops.iter_out)[:, None, None]
        inner = np.arange(loops.iter_in)[None, :, None]
        factors = (
            (loops.dst_factor_out, loops.dst_factor_in),
            (loops.src_factor_out, loops.src_factor_in),
            wgt,
        )
        found, low = [], 0
        for width, (out, into) in zip(self.config.uop_fields, factors, strict=True):
            field = words >> low & ((1 << width) - 1)
            found.append((field + outer * out + inner * into).reshape(-1))
            low += width
        return found

    def _gemm(self, g: Gemm) -> None:
        d, s, w = self._indices(g, (g.wgt_factor_out, g.wgt_factor_in))
        acc = self.pads[Memory.ACC]
        if g.reset:
            acc[d] = 0
            return
        x, weight = self.pads[Memory.INP][s].astype("f8"), self.pads[Memory.WGT][w].astype("f8")
        np.add.at(acc, d, (x @ weight.swapaxes(1, 2)).astype(np.int32))

    def _alu(self, a: Alu) -> None:
        d, s, _ = self._indices(a)
        acc = self.pads[Memory.ACC]
        assert len(set(d)) == len(d), "an ALU instruction that works on a tile twice"
        other = np.int32(a.imm) if a.use_imm else acc[s].copy()
        acc[d] = {
            AluOp.MIN: np.minimum,
            AluOp.MAX: np.maximum,
            AluOp.ADD: np.add,
            AluOp.SHR: np.right_shift,
        }[a.alu_opcode](acc[d], other)
