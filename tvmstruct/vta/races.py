"""Races: two units that touch the same tiles or bytes with no token between them.

Every instruction gets a vector clock: how many instructions of each unit are surely complete
when it starts.  Units run in order, so that is the join of the clocks of the instruction before
it in its unit and of those whose tokens it pops.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import lru_cache
from typing import NamedTuple

from tvmstruct.vta.accesses import Accesses
from tvmstruct.vta.config import Config, Memory
from tvmstruct.vta.isa import Finish, Instruction, Unit
from tvmstruct.vta.queues import (
    INITIAL,
    MEANING,
    TOKEN_LIMIT,
    Order,
    Token,
    described,
    pops,
    pushes,
)
from tvmstruct.vta.rules import shown
from tvmstruct.vta.windows import Footprint, Window, footprint

# Comparisons of what may overlap in DRAM, a few microseconds each.
PAIRS = 200_000
Clock = tuple[int, int, int]
NEVER: Clock = (0, 0, 0)


class Finding(NamedTuple):
    """A rule, the instructions that break it, and how."""

    rule: str
    instructions: tuple[int, ...]
    message: str


@lru_cache(maxsize=1)
def clocks(found: Order) -> list[Clock]:
    """Return for each instruction the instructions of every unit complete before it starts."""
    result: list[Clock] = [NEVER] * len(found.units)
    place = positions(found)
    before: dict[Unit, int] = {}
    for index in found.sequence:
        unit = found.units[index]
        sources = [s for s in found.sources[index] if s != INITIAL]
        if unit in before:
            sources.append(before[unit])
        clock = list(NEVER)
        for source in sources:
            seen = result[source]
            clock = [max(a, b) for a, b in zip(clock, seen, strict=True)]
            own = found.units[source]
            clock[own] = max(clock[own], place[source] + 1)
        result[index] = (clock[0], clock[1], clock[2])
        before[unit] = index
    return result


def positions(found: Order) -> list[int]:
    """Return for each instruction how many of its unit come before it."""
    counts, place = [0, 0, 0], [0] * len(found.units)
    for index in found.sequence:
        place[index] = counts[found.units[index]]
        counts[found.units[index]] += 1
    return place


def find_races(
    program: Sequence[Instruction], found: Order, touched: Sequence[Accesses], config: Config
) -> Iterator[Finding]:
    """Yield pairs of instructions that may run at the same time on what one of them writes."""
    clock = clocks(found)
    done: dict[Unit, list[int]] = {unit: [] for unit in Unit}
    prints: dict[Unit, list[Footprint]] = {unit: [] for unit in Unit}
    windows = {(unit, other): Window(prints[other]) for unit in Unit for other in Unit}
    budget = PAIRS
    for index in found.sequence:
        unit, mine = found.units[index], footprint(touched[index], config)
        for other in Unit:
            start = clock[index][other]
            if other is unit or not windows[unit, other].joined(start).may_conflict(mine):
                continue
            rivals = done[other][start:]
            budget -= len(rivals)
            if budget < 0:
                yield _too_many(index, program, len(rivals))
                return
            yield from _pairs(index, rivals, program, touched)
        done[unit].append(index)
        prints[unit].append(mine)


def _pairs(
    index: int,
    rivals: Sequence[int],
    program: Sequence[Instruction],
    touched: Sequence[Accesses],
) -> Iterator[Finding]:
    for rival in rivals:
        if what := _conflict(touched[rival], touched[index]):
            message = (
                f"{described(rival, program[rival])} and {described(index, program[index])} may "
                f"run at the same time, and both touch {what}; no token orders them"
            )
            yield Finding("race", (rival, index), message)


def _too_many(index: int, program: Sequence[Instruction], rivals: int) -> Finding:
    message = (
        f"{described(index, program[index])} may run at the same time as {rivals} others near it "
        "in DRAM, too many to compare; order them by tokens"
    )
    return Finding("race", (index,), message)


def _conflict(a: Accesses, b: Accesses) -> str | None:
    for first, second in ((a, b), (b, a)):
        for memory, written in first.writes.items():
            names = (Memory.ACC, Memory.OUT) if memory is Memory.ACC else (memory,)
            theirs = second.writes.get(memory, 0)
            for name in names:
                theirs |= second.reads.get(name, 0)
            if both := written & theirs:
                return f"{memory.name.lower()} {shown(both)}"
    stored = Memory.OUT in a.reads or Memory.OUT in b.reads
    if stored and a.dram and b.dram and a.dram.overlaps(b.dram):
        start = max(a.dram.start, b.dram.start)
        return f"DRAM from {start:#x}"
    return None


def find_token_faults(program: Sequence[Instruction], found: Order) -> Iterator[Finding]:
    """Yield leftover tokens, and pushes that may come too early for counters of 8 bits."""
    clock = clocks(found)
    consumer = {t: unit for unit, meaning in MEANING.items() for t in meaning[:2] if t}
    pushed = dict.fromkeys(Token, 0)
    popped: dict[Token, list[int]] = {token: [0] for token in Token}
    for unit in Unit:  # popped[t][n]: pops by the first n instructions of the consumer
        for index in (i for i in found.sequence if found.units[i] == unit):
            taken = pops(program[index], unit)
            for token in (t for t in Token if consumer[t] is unit):
                popped[token].append(popped[token][-1] + (token in taken))
    for index in found.sequence:
        for token in pushes(program[index], found.units[index]):
            pushed[token] += 1
            ahead = pushed[token] - popped[token][clock[index][consumer[token]]]
            if ahead > TOKEN_LIMIT:
                message = (
                    f"{described(index, program[index])} may push token {ahead} onto {token} "
                    f"before any is popped; counters hold {TOKEN_LIMIT}"
                )
                yield Finding("token-overflow", (index,), message)
    for token, count in found.left.items():
        if count:
            yield Finding(
                "token-leftover",
                (),
                f"{count} tokens are left on {token}; they would start the next launch too early",
            )


def find_early_finish(program: Sequence[Instruction], found: Order) -> Iterator[Finding]:
    """Yield a FINISH that may run before an instruction of another unit is done."""
    last = found.sequence[-1]
    if not isinstance(program[last], Finish):
        return
    clock = clocks(found)[last]
    for unit in Unit:
        members = [i for i in found.sequence if found.units[i] == unit]
        if unit is not found.units[last] and clock[unit] < len(members):
            open_one = members[clock[unit]]
            yield Finding(
                "finish-last",
                (last, open_one),
                f"{described(last, program[last])} may run before "
                f"{described(open_one, program[open_one])} is done; pop its token first",
            )
