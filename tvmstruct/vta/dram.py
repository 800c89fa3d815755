"""The memory image that a program loads from and stores to, and how tiles lie in it."""

from __future__ import annotations

import numpy as np

from tvmstruct.errors import VtaRunError
from tvmstruct.vta.accesses import ADDRESS_LIMIT, Rows
from tvmstruct.vta.config import PAGE_BYTES, Config, Memory
from tvmstruct.vta.isa import Instruction
from tvmstruct.vta.queues import described


class Dram:
    """Bytes from the physical address ``base`` on; ``data`` (bytes,) uint8 is changed in place."""

    def __init__(self, data: np.ndarray, base: int) -> None:
        if base < PAGE_BYTES or base % PAGE_BYTES:
            raise VtaRunError(
                "dram-base",
                f"the image lies at {base:#x}; want a multiple of a page, {PAGE_BYTES} bytes, "
                "and not page 0",
            )
        if base + len(data) > ADDRESS_LIMIT:
            raise VtaRunError(
                "dram-base", f"the image ends at {base + len(data):#x}; addresses have 32 bits"
            )
        self.data, self.base = data, base

    def rows(self, index: int, instruction: Instruction, rows: Rows) -> np.ndarray:
        """Return a view (count, size) of rows of bytes, or raise ``dram-range``."""
        end = self.base + len(self.data)
        if rows.start < self.base or rows.end > end:
            raise VtaRunError(
                "dram-range",
                f"{described(index, instruction)} touches {rows.start:#x} to {rows.end:#x}; "
                f"the image has {self.base:#x} to {end:#x}",
                index,
            )
        return np.lib.stride_tricks.as_strided(
            self.data[rows.start - self.base :], (rows.count, rows.size), (rows.pitch, 1)
        )


def unpack(rows: np.ndarray, memory: Memory, config: Config) -> np.ndarray:
    """Return tiles (rows, tiles, *tile shape) of signed elements from bytes (rows, bytes)."""
    width, shape = config.width(memory), (len(rows), -1, *config.tile_shape(memory))
    if width >= 8:
        dtype = "<u4" if memory is Memory.UOP else f"<i{width // 8}"
        return np.ascontiguousarray(rows).view(dtype).reshape(shape)
    bits = np.unpackbits(np.ascontiguousarray(rows), axis=1, bitorder="little")
    weights = 1 << np.arange(width, dtype=np.int16)
    weights[-1] *= -1  # two's complement; one bit is 0 or -1
    return (bits.reshape(-1, width) @ weights).astype(np.int8).reshape(shape)


def pack(values: np.ndarray, memory: Memory, config: Config) -> np.ndarray:
    """Return bytes (rows, bytes) of tiles (rows, tiles, ...): the low bits of every element."""
    width, rows = config.width(memory), len(values)
    if width >= 8:
        return (
            np.ascontiguousarray(values.astype(f"<i{width // 8}")).view(np.uint8).reshape(rows, -1)
        )
    bits = (values.reshape(rows, -1, 1) >> np.arange(width)) & 1
    return np.packbits(bits.astype(np.uint8).reshape(rows, -1), axis=1, bitorder="little")


def decode_words(words: np.ndarray, config: Config) -> np.ndarray:
    """Return micro-ops (n, 3) of dst, src, wgt from words (n,); other bits are ignored."""
    columns: list[np.ndarray] = []
    low = 0
    for width in config.uop_fields:
        columns.append((words >> np.uint32(low)) & np.uint32((1 << width) - 1))
        low += width
    return np.stack(columns, axis=1).astype(np.int32)
