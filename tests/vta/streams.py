"""Instruction streams that several tests run."""

import json
from functools import cache
from pathlib import Path

from tvmstruct.vta.isa import Deps, Finish, Gemm, Load, Memory, decode_stream

GOLDEN = Path(__file__).parent / "golden"
INDEX = json.loads((GOLDEN / "index.json").read_text())


@cache
def golden(name):
    """Return the instructions of a reference program."""
    return decode_stream((GOLDEN / f"{name}.insn.bin").read_bytes())


def load_and_multiply(steps, buffers):
    """Return ``steps`` times 16 inp tiles, 4 wgt tiles and a GEMM of 256 tile operations."""
    stream = [Load(memory=Memory.UOP, y_size=1, x_size=16, x_stride=16)]
    for i in range(steps):
        waits = Deps(pop_next=i >= buffers)
        inp = Load(memory=Memory.INP, dram_base=16 * i, y_size=1, x_size=16, deps=waits)
        ready = Deps(push_next=True)
        wgt = Load(memory=Memory.WGT, dram_base=256 + 4 * i, y_size=1, x_size=4, deps=ready)
        free = Deps(pop_prev=True, push_prev=i < steps - buffers)
        stream += [inp, wgt, Gemm(uop_end=16, iter_out=16, deps=free)]
    return [*stream, Finish()]
