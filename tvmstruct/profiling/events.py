"""Hardware events of this thread and its workers, through Linux's perf_event_open(2).

Counters are inherited by threads that start later, so they are opened on the thread that is to
run the model, before TVM starts that thread's workers. What a worker does while it waits for
work counts too. Only what runs in user mode counts, which needs the least permission.
"""

from __future__ import annotations

import ctypes
import errno
import os
import platform
import struct
from collections.abc import Sequence
from pathlib import Path
from typing import Self

from tvmstruct.errors import InputError, ProfilingError

PARANOID = Path("/proc/sys/kernel/perf_event_paranoid")
PERF_EVENT_OPEN = 298  # number of the system call on x86-64
ATTRIBUTES = struct.Struct("<IIQQQQQIIQ")  # struct perf_event_attr in its first version: 64 bytes
TIMES = 0b11  # read_format: the time enabled and the time running too
FLAGS = 1 << 1 | 1 << 5 | 1 << 6  # inherit, exclude_kernel, exclude_hv
HARDWARE, SOFTWARE, CACHE = 0, 1, 3
MISS, WRITE = 1 << 16, 1 << 8

KNOWN = {
    "cycles": (HARDWARE, 0),
    "instructions": (HARDWARE, 1),
    "cache-references": (HARDWARE, 2),
    "cache-misses": (HARDWARE, 3),
    "branches": (HARDWARE, 4),
    "branch-misses": (HARDWARE, 5),
    "stalled-cycles-frontend": (HARDWARE, 7),
    "stalled-cycles-backend": (HARDWARE, 8),
    "ref-cycles": (HARDWARE, 9),
    "L1-dcache-loads": (CACHE, 0),
    "L1-dcache-load-misses": (CACHE, 0 | MISS),
    "L1-dcache-stores": (CACHE, 0 | WRITE),
    "L1-icache-load-misses": (CACHE, 1 | MISS),
    "LLC-loads": (CACHE, 2),
    "LLC-load-misses": (CACHE, 2 | MISS),
    "LLC-stores": (CACHE, 2 | WRITE),
    "LLC-store-misses": (CACHE, 2 | WRITE | MISS),
    "dTLB-loads": (CACHE, 3),
    "dTLB-load-misses": (CACHE, 3 | MISS),
    "dTLB-store-misses": (CACHE, 3 | WRITE | MISS),
    "iTLB-load-misses": (CACHE, 4 | MISS),
    "task-clock": (SOFTWARE, 1),  # nanoseconds
    "page-faults": (SOFTWARE, 2),
}
"""Events by the name that ``perf list`` gives them: (type, config) of perf_event_attr."""

CACHESTAT = ("cache-misses", "instructions", "cycles")
"""What mode "cachestat" counts: misses of the last cache level, and what to relate them to."""

MODES = ("default", "cachestat", "custom")


def events_of(mode: str, events: Sequence[str] = ()) -> tuple[str, ...]:
    """Return the events that a mode counts; ``InputError`` for an unknown mode or event."""
    if mode not in MODES:
        raise InputError(f"mode={mode!r} is unknown; known: {', '.join(MODES)}")
    if mode == "custom" and not events:
        raise InputError(f"mode 'custom' needs events; known: {', '.join(KNOWN)}")
    if events and mode != "custom":
        raise InputError(f"events are for mode 'custom'; mode {mode!r} counts its own")
    for event in events:
        if event not in KNOWN:
            raise InputError(f"unknown event {event!r}; known: {', '.join(KNOWN)}")
    return CACHESTAT if mode == "cachestat" else tuple(dict.fromkeys(events))


class Counters:
    """Open counters of the calling thread and the threads that it starts from now on."""

    def __init__(self, events: Sequence[str]) -> None:
        self.events = tuple(events)
        self._files: list[int] = []
        self.shared = False  # whether counters took turns on the hardware
        try:
            for event in events:
                self._files.append(_open(event))
        except ProfilingError:
            self.close()
            raise

    def __enter__(self) -> Self:
        """Return the counters, open."""
        return self

    def __exit__(self, *error: object) -> None:
        """Close them."""
        self.close()

    def close(self) -> None:
        """Close the counters."""
        while self._files:
            os.close(self._files.pop())

    def __call__(self) -> list[float]:
        """Return each count so far, scaled up where the counter had to share the hardware."""
        return [self._value(file) for file in self._files]

    def _value(self, file: int) -> float:
        count, enabled, running = struct.unpack("<QQQ", os.read(file, 24))
        if running == enabled:
            return float(count)
        self.shared = True
        return count * enabled / running if running else 0.0


def _open(event: str) -> int:
    """Return the file of a counter of the calling thread, on any CPU."""
    if platform.system() != "Linux" or platform.machine() != "x86_64":
        raise ProfilingError(_refusal(event, errno.ENOSYS))
    kind, config = KNOWN[event]
    attributes = ATTRIBUTES.pack(kind, ATTRIBUTES.size, config, 0, 0, TIMES, FLAGS, 0, 0, 0)
    libc = ctypes.CDLL(None, use_errno=True)
    file = libc.syscall(PERF_EVENT_OPEN, attributes, 0, -1, -1, 0)
    if file < 0:
        raise ProfilingError(_refusal(event, ctypes.get_errno()))
    return file


def _refusal(event: str, code: int) -> str:
    """Return why the kernel counts no such event, and what to do."""
    level = _paranoid()
    if code in (errno.EACCES, errno.EPERM):
        why = (
            f"kernel.perf_event_paranoid is {level}, or a sandbox forbids it: run "
            "'sysctl kernel.perf_event_paranoid=2' as root"
        )
    elif code in (errno.ENOENT, errno.EOPNOTSUPP):
        why = (
            f"this CPU, or the virtual machine around it, offers no such counter "
            f"(kernel.perf_event_paranoid is {level}, which is not the reason): choose other "
            "events, or let the host pass its performance counters through"
        )
    else:
        why = f"this kernel has no perf events (kernel.perf_event_paranoid is {level})"
    return (
        f"cannot count {event}: {os.strerror(code)}; {why}. Without counters, --cachegrind "
        "simulates the caches"
    )


def _paranoid() -> str:
    try:
        return PARANOID.read_text().strip()
    except OSError:
        return "not set"
