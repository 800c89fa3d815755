"""Work that is handed out piece by piece to whichever thread is idle.

Where pieces take different times, fixed shares leave threads waiting for the slowest (NLP-Fast,
section III-C: 42 to 66% of the time busy with fixed shares, 91% with a queue). A counter that
every thread advances is the whole queue.
"""

from __future__ import annotations

from collections.abc import Callable

from tvm.ir import Expr
from tvm.script.ir_builder import tirx as T

from tvmstruct.schedules.builder import loops

NEXT = "tvmstruct_next_piece"
LLVM = f"""
define linkonce_odr i32 @{NEXT}(ptr %counter) alwaysinline nounwind {{
  %piece = atomicrmw add ptr %counter, i32 1 monotonic
  ret i32 %piece
}}
"""


def hand_out(pieces: Expr, threads: int, emit: Callable[[Expr], None]) -> None:
    """Emit ``emit(piece)`` for every piece below ``pieces``, each by the next idle thread."""
    with T.attr(T.int64(0), "pragma_import_llvm", LLVM):
        counter = T.alloc_buffer((1,), "int32", scope="global")
        T.buffer_store(counter, T.int32(0), [0])
        with loops(threads, kind=T.parallel):
            piece = T.alloc_buffer((1,), "int32", scope="global")
            T.buffer_store(piece, _next(counter), [0])
            with T.While(T.cast(piece[0], "int64") < pieces):
                emit(T.cast(piece[0], "int64"))
                T.buffer_store(piece, _next(counter), [0])


def _next(counter) -> Expr:
    return T.call_extern("int32", NEXT, T.address_of(counter[0]))
