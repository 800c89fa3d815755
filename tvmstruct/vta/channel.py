"""The read channel that fetch and all loads share, one analytic step for each burst.

Requests are served in the order in which they are admitted, one beat per cycle and without a gap;
the latency of the memory is paid when a request finds the queue empty.  So the time of the last
beat of a request is known when it is admitted, and nothing is simulated cycle by cycle.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass

FETCH, UOP, INP, WGT, ACC = range(5)
"""Clients by priority, the first highest."""

CLIENTS = ("fetch", "uop", "inp", "wgt", "acc")


@dataclass(frozen=True)
class Dram:
    """What is behind the channel; the defaults are those of the measured hardware."""

    bus_bytes: int = 8
    latency: int = 16
    outstanding: int = 16
    burst_beats: int = 256

    def bursts(self, address: int, count: int) -> list[int]:
        """Return the beats of each request for ``count`` bytes at ``address``.

        A request has at most ``burst_beats`` beats and stays in an aligned block of that size
        (2 KiB).
        """
        first, last = address // self.bus_bytes, (address + count - 1) // self.bus_bytes
        limit = self.burst_beats
        if first // limit == last // limit:
            return [last - first + 1]
        head = limit - first % limit
        whole = (last + 1 - first - head) // limit
        tail = last + 1 - first - head - whole * limit
        return [head, *[limit] * whole, *([tail] if tail else [])]


class ReadChannel:
    """Admits one request per cycle, by priority of the clients that wait, and serves in order."""

    def __init__(self, dram: Dram) -> None:
        self.dram = dram
        self.waiting: dict[int, deque[int]] = {}
        self.served: deque[int] = deque()
        self.free = 0
        self.next_admission = 0
        self.busy = 0
        self.last_client = FETCH

    def ask(self, client: int, bursts: Iterable[int]) -> None:
        """Let ``client`` wait for the admission of all its ``bursts``, one after the other."""
        self.waiting[client] = deque(bursts)

    def admit(self, now: int) -> tuple[int | None, int]:
        """Admit one request at ``now``, or none.

        Returns the client whose last request was admitted, or None, and the time of that
        request's last beat; where nothing could be admitted, the time to ask again instead.
        """
        served = self.served
        while served and served[0] <= now:
            served.popleft()
        full = len(served) >= self.dram.outstanding
        if full or now < self.next_admission:
            return None, max(self.next_admission, served[0] if full else 0)
        client = min(self.waiting)
        bursts = self.waiting[client]
        beats = bursts.popleft()
        begin = self.free if self.free > now else now + self.dram.latency
        self.free = begin + beats
        self.busy += beats
        served.append(self.free)
        self.next_admission = now + 1
        if bursts:
            return None, self.next_admission
        del self.waiting[client]
        return client, self.free
