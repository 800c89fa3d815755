"""Threads that stay together through many short parallel loops: a team.

A parallel loop by itself wakes the threads and waits for them, which takes about a microsecond.
Inside a team a loop only ends with a barrier. Everything between its loops is executed by every
thread, so whatever is to happen once belongs into `alone`.

TVM's own barrier asks the system to run another thread at every look at the others, which costs
more than the wait. Ours is a counter that every member advances and then watches. It lies in
memory of the call, so kernels may run beside each other. How many members the launch really
started is counted first, with TVM's barrier behind it; the lambda's arguments are out of reach.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

from tvm.ir import Expr
from tvm.script.ir_builder import tirx as T

from tvmstruct.schedules.builder import loops

LOOKS = 2000  # tens of microseconds: who waits longer may be in the way of the others
LINE = 16  # int64 in two cache lines, which prefetchers fetch together
JOIN, MEET = "tvmstruct_join_team", "tvmstruct_meet_team"
LLVM = f"""
declare void @llvm.x86.sse2.pause()
declare i32 @sched_yield()

define linkonce_odr i64 @{JOIN}(ptr %members) alwaysinline nounwind {{
  %before = atomicrmw add ptr %members, i64 1 acq_rel, align 8
  ret i64 %before
}}

define linkonce_odr void @{MEET}(ptr %arrivals, i64 %members) alwaysinline nounwind {{
entry:
  %before = atomicrmw add ptr %arrivals, i64 1 acq_rel, align 8
  %round = udiv i64 %before, %members
  %next = add i64 %round, 1
  %goal = mul i64 %next, %members
  br label %look
look:
  %looks = phi i64 [ 0, %entry ], [ %more, %pause ], [ %looks, %yield ]
  %arrived = load atomic i64, ptr %arrivals acquire, align 8
  %there = icmp uge i64 %arrived, %goal
  br i1 %there, label %done, label %wait
wait:
  %patient = icmp ult i64 %looks, {LOOKS}
  br i1 %patient, label %pause, label %yield
pause:
  %more = add i64 %looks, 1
  call void @llvm.x86.sse2.pause()
  br label %look
yield:
  %ignored = call i32 @sched_yield()
  br label %look
done:
  ret void
}}
"""


class _Team:
    """The counters of a team, each alone in its cache lines wherever the buffer begins."""

    def __init__(self) -> None:
        counters = T.alloc_buffer((4 * LINE,), "int64", scope="global")
        for place in range(4 * LINE):
            T.buffer_store(counters, T.int64(0), [place])
        self.members, self.arrivals = counters[LINE], counters[2 * LINE]

    def join(self) -> None:
        """Count this member, and wait until all are counted."""
        with T.attr(T.int64(0), "pragma_parallel_barrier_when_finish", T.int32(1)):
            T.evaluate(T.call_extern("int64", JOIN, T.address_of(self.members)))

    def meet(self) -> None:
        """Wait until every member is here."""
        T.evaluate(T.call_extern("void", MEET, T.address_of(self.arrivals), self.members))


_team: ContextVar[_Team] = ContextVar("team")  # that statements are being written for


@contextmanager
def team() -> Iterator[None]:
    """Start all threads on the statements inside, which have a parallel loop."""
    members = _Team()
    with (
        T.attr(T.int64(0), "pragma_parallel_launch_point", T.int32(1)),
        T.attr(T.int64(0), "pragma_import_llvm", LLVM),
    ):
        members.join()
        outer = _team.set(members)
        yield
        _team.reset(outer)


@contextmanager
def barrier() -> Iterator[None]:
    """Let all threads of the team wait for each other after the loop inside."""
    yield
    _team.get().meet()


@contextmanager
def alone() -> Iterator[None]:
    """Let one thread of a team execute the statements inside, the others wait."""
    with barrier(), T.parallel(T.int64(0), T.int64(2)) as turn:  # one turn would be no loop
        with T.If(turn == 0), T.Then():
            yield


@contextmanager
def share(count: int, odd: Expr, *, wait: bool = True) -> Iterator[Expr]:
    """Loop over this member's share of ``count`` turns, the same in every loop; ``odd`` reverses.

    Then wait for the others, unless told not to.
    """
    members = _team.get().members
    with T.parallel(T.int64(0), members) as member:  # a turn for each
        first = T.truncdiv(member * count, members)
        last = T.truncdiv((member + 1) * count, members)
        with loops(last - first) as (i,):
            yield first + either_way(i, last - first, odd)
    if wait:
        _team.get().meet()


def either_way(i: Expr, count: Expr | int, odd: Expr) -> Expr:
    """Return ``i``, or ``count - 1 - i`` where ``odd`` is 1 and not 0."""
    return odd * (count - 1) + i * (1 - 2 * odd)
