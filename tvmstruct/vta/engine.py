"""Event-driven execution of timed jobs: fetch, queues, tokens, the read channel, three units.

A job is what an instruction means for time.  The engine knows no encodings; ``timing.py`` makes
jobs of instructions.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from heapq import heappop, heappush
from typing import NamedTuple

from tvmstruct.errors import VtaRunError
from tvmstruct.vta.channel import FETCH, Dram, ReadChannel

LOAD, COMPUTE, STORE = range(3)
UNITS = ("load", "compute", "store")

L2G, G2L, G2S, S2G = range(4)
TOKENS = ("l2g", "g2l", "g2s", "s2g")
POPS = ((None, G2L), (L2G, S2G), (G2S, None))  # by unit: what pop_prev and pop_next take
PUSHES = ((None, L2G), (G2L, G2S), (S2G, None))
WAITERS = (COMPUTE, LOAD, STORE, COMPUTE)  # by token: the unit that pops it
MOST_TOKENS = 255  # a counter saturates: a further push is lost

CHUNK, QUEUE = 128, 512  # instructions
INSTRUCTION_BYTES = 16
ASK_FETCH, DECODE_FETCH = 2, 3  # cycles before the request, and from its last beat to dispatch

FAR = 1 << 62  # cycles

ARRIVE, FINISH, ASK, ADMIT, BEAT, FETCHED = range(6)


class Job(NamedTuple):
    """An instruction as the engine sees it.

    ``cycles`` is the occupancy of the unit with free memory.  A job that reads names its
    ``client``, its ``bursts`` (beats of each request), the cycles ``ask`` before the first request
    and ``slack``: cycles of waiting for memory in which pads are written, off its end.
    """

    unit: int
    pops: tuple[int, ...]
    pushes: tuple[int, ...]
    cycles: int
    last: bool = False
    client: int = -1
    bursts: Sequence[int] = ()
    ask: int = 0
    slack: int = 0


@dataclass(slots=True)
class Span:
    """When an instruction was queued, started and ended, and what it waited for.

    ``blocker`` is the instruction that pushed the token or held the unit, -1 for none;
    ``memory`` counts the cycles between start and end lost to others on the read channel.
    """

    queued: int
    start: int = -1
    end: int = -1
    reason: str = "fetch"
    blocker: int = -1
    memory: int = 0


class Engine:
    """Runs jobs from launch, time 0, to the end of the one that finishes."""

    def __init__(self, jobs: Sequence[Job], dram: Dram, base: int = 0) -> None:
        self.jobs, self.base = jobs, base
        self.channel = ReadChannel(dram)
        self.spans: list[Span] = []
        self.queues: tuple[deque[int], ...] = tuple(deque() for _ in UNITS)
        self.running = [False] * len(UNITS)
        self.free_at = [0] * len(UNITS)
        self.previous = [-1] * len(UNITS)
        self.tokens: tuple[deque[tuple[int, int]], ...] = tuple(deque() for _ in TOKENS)
        self.events: list[tuple[int, int, int]] = []
        self.arrived = self.fetched = 0  # instructions dispatched, and read
        self.stalled = False  # dispatch waits for a place in a queue
        self.asked: dict[int, int] = {}  # client -> its instruction, or -1 for fetch
        self.admitting = False
        self.finished = -1
        self.lost = 0  # tokens pushed to a full counter

    def run(self) -> int:
        """Return the cycles from launch to finish; VtaRunError where that never comes."""
        self._fetch(0)
        handlers = (
            self._arrive,
            self._finish,
            self._ask,
            self._admit,
            self._beat,
            self._fetched,
        )
        events = self.events
        while events:
            now, kind, what = heappop(events)
            handlers[kind](now, what)
        if self.finished < 0:
            raise self._deadlock()
        return self.finished

    def _fetch(self, now: int) -> None:
        if self.fetched < len(self.jobs):
            heappush(self.events, (now + ASK_FETCH, ASK, -1))

    def _ask(self, now: int, index: int) -> None:
        if index < 0:
            count = min(CHUNK, len(self.jobs) - self.fetched) * INSTRUCTION_BYTES
            address = self.base + self.fetched * INSTRUCTION_BYTES
            client, bursts = FETCH, self.channel.dram.bursts(address, count)
        else:
            client, bursts = self.jobs[index].client, self.jobs[index].bursts
        self.channel.ask(client, bursts)
        self.asked[client] = index
        if not self.admitting:
            self._admit(now, 0)

    def _admit(self, now: int, _: int) -> None:
        """Admit requests until one must wait or something else happens first."""
        channel, events = self.channel, self.events
        while channel.waiting:
            client, then = channel.admit(now, events[0][0] if events else FAR)
            if client is not None:
                index = self.asked.pop(client)
                heappush(events, (then, BEAT if index >= 0 else FETCHED, index))
                then = channel.next_admission
            if channel.waiting and events and events[0][0] <= then:
                self.admitting = True
                heappush(events, (then, ADMIT, 0))
                return
            now = then
        self.admitting = False

    def _beat(self, now: int, index: int) -> None:
        """Let the unit end once the last beat of its load is there."""
        job, span = self.jobs[index], self.spans[index]
        dram = self.channel.dram
        free = span.start + job.ask + dram.latency + sum(job.bursts)
        late = now - free
        span.memory = max(0, late - job.slack)
        end = span.start + job.cycles + span.memory
        heappush(self.events, (end, FINISH, index))

    def _fetched(self, now: int, _: int) -> None:
        self.fetched = min(len(self.jobs), self.fetched + CHUNK)
        heappush(self.events, (now + DECODE_FETCH, ARRIVE, 0))

    def _arrive(self, now: int, _: int) -> None:
        """Dispatch the next instruction, one per cycle, into the queue of its unit."""
        index = self.arrived
        unit = self.jobs[index].unit
        if len(self.queues[unit]) >= QUEUE:
            self.stalled = True
            return
        self.queues[unit].append(index)
        self.spans.append(Span(now))
        self.arrived += 1
        if self.arrived < self.fetched:
            heappush(self.events, (now + 1, ARRIVE, 0))
        else:
            self._fetch(now + 1)
        self._start(unit, now)

    def _start(self, unit: int, now: int) -> None:
        """Start the head of the queue of ``unit`` if every token that it pops is there."""
        queue = self.queues[unit]
        if self.running[unit] or not queue:
            return
        index = queue[0]
        job = self.jobs[index]
        if not all(self.tokens[token] for token in job.pops):
            return
        span = self.spans[index]
        span.start = now
        latest = span.queued
        if self.free_at[unit] > latest:
            latest = self.free_at[unit]
            span.reason, span.blocker = "queue", self.previous[unit]
        for token in job.pops:
            pushed, by = self.tokens[token].popleft()
            if pushed > latest:
                latest = pushed
                span.reason, span.blocker = TOKENS[token], by
        self.running[unit] = True
        if job.bursts:
            heappush(self.events, (now + job.ask, ASK, index))
        else:
            heappush(self.events, (now + job.cycles, FINISH, index))

    def _finish(self, now: int, index: int) -> None:
        job = self.jobs[index]
        unit = job.unit
        self.spans[index].end = now
        self.queues[unit].popleft()
        self.running[unit], self.free_at[unit], self.previous[unit] = False, now, index
        if job.last and self.finished < 0:
            self.finished = now
        for token in job.pushes:
            if len(self.tokens[token]) < MOST_TOKENS:
                self.tokens[token].append((now, index))
            else:
                self.lost += 1
        if self.stalled and unit == self.jobs[self.arrived].unit:
            self.stalled = False
            heappush(self.events, (now + 1, ARRIVE, 0))
        self._start(unit, now)
        for token in job.pushes:
            self._start(WAITERS[token], now)

    def _deadlock(self) -> VtaRunError:
        """Return an error that says which instructions wait for which tokens."""
        heads = [
            f"{UNITS[unit]} unit: instruction {queue[0]} waits for "
            + " and ".join(TOKENS[t] for t in self.jobs[queue[0]].pops if not self.tokens[t])
            + f" ({len(queue)} queued)"
            for unit, queue in enumerate(self.queues)
            if queue
        ]
        counts = ", ".join(f"{n} {len(t)}" for n, t in zip(TOKENS, self.tokens, strict=True))
        where = "; ".join(heads) or "no instruction is FINISH"
        lost = f"; {self.lost} pushed over {MOST_TOKENS} and lost" if self.lost else ""
        first = min((queue[0] for queue in self.queues if queue), default=None)
        message = f"the program never finishes: {where}; tokens left: {counts}{lost}"
        return VtaRunError("deadlock", message, first)
