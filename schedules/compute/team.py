"""Threads that stay together through many short parallel loops: a team.

A parallel loop by itself wakes the threads and waits for them, which takes about a microsecond.
Inside a team a loop only ends with a barrier. Everything between its loops is executed by every
thread, so whatever is to happen once belongs into `alone`.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from tvm.script.ir_builder import tirx as T


@contextmanager
def team() -> Iterator[None]:
    """Start all threads on the statements inside."""
    with T.attr(T.int64(0), "pragma_parallel_launch_point", T.int32(1)):
        yield


@contextmanager
def barrier() -> Iterator[None]:
    """Let all threads of the team wait for each other after the loop inside."""
    with T.attr(T.int64(0), "pragma_parallel_barrier_when_finish", T.int32(1)):
        yield


@contextmanager
def alone() -> Iterator[None]:
    """Let one thread of a team execute the statements inside, the others wait."""
    with barrier(), T.parallel(T.int64(0), T.int64(2)) as turn:  # one turn would be no loop
        with T.If(turn == 0), T.Then():
            yield
