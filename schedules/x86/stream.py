"""Stores that go to memory past the caches: for results that are larger than these anyway.

An ordinary store first reads the line that it overwrites, and pushes another out of the cache.
"""

from __future__ import annotations

from tvm import tirx
from tvm.ir import Expr
from tvm.script.ir_builder import tirx as T

LANES = (16, 8, 4)
LLVM = "\n".join(
    f"""
define linkonce_odr i32 @tvmstruct_stream{n}(ptr %p, <{n} x float> %v) alwaysinline nounwind {{
  store <{n} x float> %v, ptr %p, align {4 * n}, !nontemporal !{{i32 1}}
  ret i32 0
}}"""
    for n in LANES
)


def imported():
    """Open the scope in which `store` is known."""
    return T.attr(T.int64(0), "pragma_import_llvm", LLVM)


def store(buffer: tirx.Buffer, value: Expr, index: list, lanes: int) -> None:
    """Store a vector, whose place is a multiple of its size; `fence` must follow."""
    place = T.address_of(buffer[tuple(index)])
    T.evaluate(T.call_extern("int32", f"tvmstruct_stream{lanes}", place, value))


def fence() -> None:
    """Make all stores of this thread visible before any that follows."""
    name = T.llvm_lookup_intrinsic_id("llvm.x86.sse.sfence")
    T.evaluate(T.call_llvm_intrin(name, dtype="void"))
