"""How much memory the intermediate results of one bucket take, as planned before it runs."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

import tvm
import tvm_ffi
from tvm import relax, s_tir, tirx
from tvm.relax.analysis import post_order_visit

from tvmstruct import compat

REGISTERS = 1024  # bytes: smaller buffers of a kernel live in registers or on the stack


@dataclass(frozen=True)
class Footprint:
    """Bytes of one bucket apart from weights, inputs and outputs.

    ``planned`` is what TVM's planner allocates for the results of kernels that others read, each
    storage used again as soon as nobody reads it. ``scratch`` is what the largest kernel
    allocates for itself, by every thread where it does so inside a parallel loop.
    """

    planned: int = 0
    scratch: int = 0

    @property
    def total(self) -> int:
        """Bytes in all."""
        return self.planned + self.scratch

    def __str__(self) -> str:
        return f"{self.planned / 1e6:.2f} MB planned, {self.scratch / 1e6:.2f} MB in kernels"


def footprint(mod: tvm.IRModule, kernels: Iterable[tirx.PrimFunc], threads: int) -> Footprint:
    """Return the footprint of a module whose memory is planned, and of the kernels it calls."""
    planned = 0

    def visit(expr: relax.Expr) -> None:
        nonlocal planned
        if compat.op_name(expr) == "relax.memory.alloc_storage":
            planned += math.prod(int(n) for n in expr.args[0].values)

    post_order_visit(mod["main"], visit)
    own = (f for f in mod.functions.values() if isinstance(f, tirx.PrimFunc))
    scratch = max((_scratch(f, threads) for f in (*own, *kernels)), default=0)
    return Footprint(planned, scratch)


def _scratch(func: tirx.PrimFunc, threads: int) -> int:
    """Return the bytes that a kernel allocates; buffers of one after the other all count."""
    shared: set[tirx.Buffer] = set()

    def see_loop(loop: tirx.For) -> None:
        if loop.kind == tirx.ForKind.PARALLEL:
            shared.update(_buffers(loop.body))

    tvm_ffi.structural_walk(func.body, [(tirx.For, see_loop)])
    found = {buffer: _bytes(buffer) for buffer in _buffers(func.body)}
    large = {buffer: size for buffer, size in found.items() if size >= REGISTERS}
    return sum(size * (threads if buffer in shared else 1) for buffer, size in large.items())


def _buffers(statement: tirx.Stmt) -> set[tirx.Buffer]:
    found: set[tirx.Buffer] = set()
    visits = [
        (tirx.AllocBuffer, lambda node: found.add(node.buffer)),
        (s_tir.SBlock, lambda node: found.update(node.alloc_buffers)),
    ]
    tvm_ffi.structural_walk(statement, visits)
    return found


def _bytes(buffer: tirx.Buffer) -> int:
    sizes = [int(n) if isinstance(n, tirx.IntImm) else 0 for n in buffer.shape]
    return math.prod(sizes) * (tvm.DataType(str(buffer.dtype)).bits // 8)
