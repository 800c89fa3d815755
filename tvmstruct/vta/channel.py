"""The read channel that fetch and all loads share, one analytic step for each burst.

Requests are served in the order in which they are admitted, one beat per cycle and without a gap;
the latency of the memory is paid when a request finds the queue empty.  So the time of the last
beat of a request is known when it is admitted, and nothing is simulated cycle by cycle.
"""

from __future__ import annotations

from bisect import bisect_right
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

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
        self.waiting: dict[int, _Wish] = {}
        self.served: deque[int] = deque(maxlen=dram.outstanding)  # last beats, newest last
        self.free = 0
        self.next_admission = 0
        self.busy = 0

    def ask(self, client: int, bursts: Sequence[int]) -> None:
        """Let ``client`` wait for the admission of all its ``bursts``, one after the other."""
        self.waiting[client] = _Wish(list(accumulate(bursts, initial=0)))

    def admit(self, now: int, until: int) -> tuple[int | None, int]:
        """Admit one request at ``now``, or none; many if one client waits and all is quiet.

        Nothing else happens before ``until``.  Returns the client whose last request was
        admitted, or None, and the time of that request's last beat; where nothing could be
        admitted, the time to ask again instead.
        """
        outstanding, served = self.dram.outstanding, self.served
        oldest = served[0] if len(served) == outstanding else 0
        if oldest > now or now < self.next_admission:
            return None, max(self.next_admission, oldest)
        client = min(self.waiting)
        wish = self.waiting[client]
        begin = self.free if self.free > now else now + self.dram.latency
        count = self._quiet(wish, begin, until) if len(self.waiting) == 1 else 1
        first = wish.sums[wish.next]
        ends = [begin + end - first for end in wish.sums[wish.next + 1 : wish.next + 1 + count]]
        # The k-th of these is admitted when the request ``outstanding`` before it is done.
        window = [*served, *ends]
        gate = len(window) - 1 - outstanding
        self.next_admission = 1 + max(now + count - 1, window[gate] if gate >= 0 else 0)
        served.extend(ends)
        self.free = ends[-1]
        self.busy += self.free - begin
        wish.next += count
        if wish.next < len(wish.sums) - 1:
            return None, self.next_admission
        del self.waiting[client]
        return client, self.free

    def _quiet(self, wish: _Wish, begin: int, until: int) -> int:
        """Return how many requests, at least one, are over before ``until``.

        With one client there is no gap between them: the queue never runs empty, for a request is
        admitted long before those ahead of it are served.
        """
        last = bisect_right(wish.sums, until - begin + wish.sums[wish.next]) - 1
        return max(1, last - wish.next)


@dataclass(slots=True)
class _Wish:
    """Running sums of the beats of a client's requests, and which request is next."""

    sums: list[int]
    next: int = 0
