"""The machine's own limits, measured in the same run: peaks of instructions and read bandwidth.

Limits are measured around every line, at the line's working set, and the best of all counts.
"""

from __future__ import annotations

from itertools import product
from typing import Any

import numpy as np
from cases import Work
from tvm import tirx
from tvm.script.ir_builder import tirx as T

from tvmstruct.roofline import (
    LEAST_READ,
    Limit,
    fma_peak,
    make_limit,
    read_bandwidth,
    register_peak,
    whole_turns,
)
from tvmstruct.schedules.builder import argument, i64, loops, prim_func
from tvmstruct.schedules.x86 import bf16_dense
from tvmstruct.schedules.x86.amx import LEFT, RIGHT, AmxTiles
from tvmstruct.schedules.x86.intrinsics import byte_dot
from tvmstruct.schedules.x86.precisions import VNNI
from tvmstruct.targets import TargetSpec, resolve

LEVELS = {"L1": 16 << 10, "L2": 256 << 10, "L3": 8 << 20, "memory": 256 << 20}  # bytes a thread
TILE_WORDS, TILE_FLOPS = 256, 2 * 16 * 16 * 32  # of an AMX tile, and of one product of two
WIDTHS = {"f32": 4, "bf16": 2, "int8": 1}  # bytes of a weight by precision


class Roof:
    """Peaks in GFLOP/s and bandwidths in GB/s, of all threads together."""

    def __init__(self, threads: int) -> None:
        self.threads, self.spec = threads, resolve("host")
        self.skipped: list[str] = []
        self._peaks = self._find_peaks()
        self._reads: dict[int, Limit] = {}
        for limit in self._peaks.values():
            limit.measure()
        for size in LEVELS.values():
            self._read(size).measure()

    @property
    def peaks(self) -> dict[str, float]:
        """Every measured peak."""
        return {name: limit.best for name, limit in self._peaks.items()}

    @property
    def bandwidths(self) -> dict[str, float]:
        """Bandwidth of the usual levels."""
        return {level: self._read(size).best for level, size in LEVELS.items()}

    def peak(self, precision: str) -> float | None:
        """Return the best peak for products in a precision, None where the CPU has none."""
        return max((v for k, v in self.peaks.items() if k.startswith(precision)), default=None)

    def measure(self, work: Work, precision: str) -> None:
        """Measure once more what limits a line."""
        for name, limit in self._peaks.items():
            if name.startswith((precision, "f32")):
                limit.measure()
        self._read(self._working_set(work, precision)).measure()

    def bandwidth(self, work: Work, precision: str) -> float:
        """Return the bandwidth at the working set of a line."""
        return self._read(self._working_set(work, precision)).best

    def seconds(self, work: Work, precision: str) -> float | None:
        """Return the least time that peak and bandwidth allow, None without a peak."""
        peak = self.peak(precision)
        if peak is None:
            return None
        streamed = WIDTHS[precision] * work.weight_values + work.other_bytes
        compute = work.flops / peak + work.plain_flops / self.peaks["f32 FMA"]
        return max(compute, streamed / self.bandwidth(work, precision)) / 1e9

    def plain(self) -> dict[str, Any]:
        """Return everything as data for JSON."""
        return {"gflops": self.peaks, "gbps": self.bandwidths, "skipped": self.skipped}

    def _working_set(self, work: Work, precision: str) -> int:
        """Return the bytes of a thread, in whole turns of the loop that reads them."""
        size = work.working_set
        if size is None:
            size = WIDTHS[precision] * work.resident + work.other_bytes
        size /= self.threads
        return whole_turns(self.spec, size)

    def _read(self, size: int) -> Limit:
        if size not in self._reads:
            self._reads[size] = read_bandwidth(self.spec, self.threads, size)
        return self._reads[size]

    def _find_peaks(self) -> dict[str, Limit]:
        found = {"f32 FMA": fma_peak(self.spec, self.threads)}
        if bf16_dense.DOT in self.spec.features:
            found["bf16 dot"] = _dot_peak(self.spec, self.threads)
        else:
            self.skipped.append(f"bf16 dot: the CPU has no {bf16_dense.DOT}")
        if VNNI.get(self.spec.isa.name) in self.spec.features:
            found["int8 dot"] = _byte_peak(self.spec, self.threads)
        else:
            self.skipped.append("int8 dot: the CPU has no VNNI")
        if "amx-bf16" in self.spec.features:
            found["bf16 AMX from L2"] = _amx_peak(self.spec, self.threads)
        else:
            self.skipped.append("bf16 AMX: the CPU has no amx-bf16")
        return found


def _dot_peak(spec: TargetSpec, threads: int) -> Limit:
    a = np.full((threads, spec.isa.lanes), 0x3C003C00, np.int32)  # pairs of 2**-7
    return register_peak(spec, a, 2, bf16_dense.LLVM, _dot)


def _dot(total, left, right):
    return T.call_pure_extern("float32x16", "tvmstruct_bf16_dot", total, left, right)


def _byte_peak(spec: TargetSpec, threads: int) -> Limit:
    a, lanes = np.full((threads, spec.isa.lanes), 0x01010101, np.int32), spec.isa.lanes

    def dot(total, left, right):
        sums = byte_dot(T.reinterpret(f"int32x{lanes}", total), left, right, lanes)
        return T.reinterpret(f"float32x{lanes}", sums)

    return register_peak(spec, a, 4, "", dot)


def amx_loop(threads: int, steps: int, repeat: int) -> tirx.PrimFunc:
    """Return a loop that loads two tiles of x and two of w a step and multiplies all pairs."""
    tiles, size = AmxTiles("tdpbf16ps"), 4 * TILE_WORDS

    def body() -> None:
        a = argument("a", (i64(threads * steps * size),), "int32")
        out = argument("out", (i64(threads * size),))
        with loops(threads, kind=T.parallel) as (t,):
            tiles.begin()
            for total in range(4):
                tiles.zero(total)
            with loops(repeat, steps) as (_, p):
                for i, tile in enumerate((*LEFT, *RIGHT)):
                    tiles.load(tile, a, (t * steps + p) * size + i * TILE_WORDS, 16)
                for i, j in product(range(2), range(2)):
                    tiles.dot(2 * i + j, LEFT[i], RIGHT[j])
            for total in range(4):
                tiles.store(total, out, t * size + total * TILE_WORDS, 16)
            tiles.end()

    return prim_func(body)


def _amx_peak(spec: TargetSpec, threads: int) -> Limit:
    steps = LEVELS["L2"] // (4 * 4 * TILE_WORDS)
    repeat = LEAST_READ // LEVELS["L2"]
    a = np.zeros(threads * steps * 4 * TILE_WORDS, np.int32)
    out = np.zeros(threads * 4 * TILE_WORDS, np.float32)
    flops = 4.0 * TILE_FLOPS * threads * steps * repeat
    return make_limit(spec, amx_loop(threads, steps, repeat), flops, a, out)
