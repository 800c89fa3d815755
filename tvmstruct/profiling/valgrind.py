"""Requests of a program to the valgrind that it runs under, from Python.

Valgrind takes a fixed run of rotations, which does nothing on a CPU, for a request whose
arguments lie where RAX points; its answer replaces RDX (Valgrind manual, "The Client Request
mechanism"). Callgrind's requests switch on its simulation for the part that counts: all else runs
ten times faster.
"""

from __future__ import annotations

import ctypes
import mmap

RUNNING = 0x1001
CALLGRIND = ord("C") << 24 | ord("T") << 16
ZERO, START, STOP = CALLGRIND + 1, CALLGRIND + 4, CALLGRIND + 5
CODE = bytes.fromhex(
    "4889fa"  # mov rdx, rdi: the answer where nobody listens
    "4889f0"  # mov rax, rsi: the arguments
    "48c1c703 48c1c70d 48c1c73d 48c1c733"  # rol rdi by 3, 13, 61 and 51: by 128
    "4887db"  # xchg rbx, rbx
    "4889d0 c3"  # mov rax, rdx; ret
)


class Valgrind:
    """The requests, by the few instructions that make one."""

    def __init__(self) -> None:
        self._memory = mmap.mmap(
            -1, len(CODE), prot=mmap.PROT_READ | mmap.PROT_WRITE | mmap.PROT_EXEC
        )
        self._memory.write(CODE)
        start = ctypes.addressof(ctypes.c_char.from_buffer(self._memory))
        kind = ctypes.CFUNCTYPE(ctypes.c_uint64, ctypes.c_uint64, ctypes.POINTER(ctypes.c_uint64))
        self._call = kind(start)

    def request(self, number: int, default: int = 0) -> int:
        """Return valgrind's answer, ``default`` where the program runs on a CPU."""
        return self._call(default, (ctypes.c_uint64 * 6)(number))

    @property
    def running(self) -> bool:
        """Whether valgrind runs the program."""
        return self.request(RUNNING) > 0

    def start(self) -> None:
        """Start to simulate, with empty caches."""
        self.request(START)

    def zero(self) -> None:
        """Forget what was counted; the caches stay as they are."""
        self.request(ZERO)

    def stop(self) -> None:
        """Stop to simulate."""
        self.request(STOP)
