"""Three units with queues, and the tokens between them: in which order a program can run.

Fetch hands instructions in order to the queue of their unit, 512 deep, and waits while that is
full.  The head of a queue starts when all tokens that it pops are there, and pushes its own when
it is done.  Each token queue has one unit that pushes and one that pops, so the n-th pop always
takes the n-th push, whatever the timing: ``order`` finds one possible order and those pairs.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum

from tvmstruct.errors import VtaRunError
from tvmstruct.vta.assembly import format_instruction
from tvmstruct.vta.isa import Finish, Instruction, Unit, unit_of

QUEUE_DEPTH = 512
TOKEN_LIMIT = 255
INITIAL = -1  # the source of a token that an earlier launch left


class Token(StrEnum):
    """A token queue, by the units that push and pop."""

    L2G = "l2g"
    G2L = "g2l"
    G2S = "g2s"
    S2G = "s2g"


# What a unit's bits mean: (pop_prev, pop_next, push_prev, push_next), None where illegal.
MEANING: dict[Unit, tuple[Token | None, Token | None, Token | None, Token | None]] = {
    Unit.LOAD: (None, Token.G2L, None, Token.L2G),
    Unit.COMPUTE: (Token.L2G, Token.S2G, Token.G2L, Token.G2S),
    Unit.STORE: (Token.G2S, None, Token.S2G, None),
}
BITS = ("pop_prev", "pop_next", "push_prev", "push_next")


@dataclass(frozen=True, eq=False)  # compared by identity: programs are long
class Order:
    """One order in which a program can run, and who waits for whom.

    ``sources[i]`` holds, for each token that instruction i pops, the instruction that pushed
    it (``INITIAL`` for one that was there before); ``left`` counts tokens that nobody popped.
    """

    sequence: tuple[int, ...]
    units: tuple[Unit, ...]
    sources: tuple[tuple[int, ...], ...]
    left: Mapping[Token, int]


def pops(instruction: Instruction, unit: Unit) -> list[Token]:
    """Return the token queues that an instruction pops."""
    d, meaning = instruction.deps, MEANING[unit]
    return [t for bit, t in zip((d.pop_prev, d.pop_next), meaning[:2], strict=True) if bit and t]


def pushes(instruction: Instruction, unit: Unit) -> list[Token]:
    """Return the token queues that an instruction pushes."""
    d, meaning = instruction.deps, MEANING[unit]
    return [t for bit, t in zip((d.push_prev, d.push_next), meaning[2:], strict=True) if bit and t]


def order(program: Sequence[Instruction], tokens: Mapping[Token, int] | None = None) -> Order:
    """Return an order in which ``program`` can run: that of the stream where tokens allow.

    ``tokens`` are those that earlier launches left.  Raises VtaRunError with the rule
    ``token-bits``, ``deadlock``, ``token-overflow``, ``finish-missing`` or ``finish-last``.
    """
    units = tuple(unit_of(instruction) for instruction in program)
    for index, (instruction, unit) in enumerate(zip(program, units, strict=True)):
        _check_bits(index, instruction, unit)
    if not any(isinstance(instruction, Finish) for instruction in program):
        raise VtaRunError("finish-missing", f"none of {len(program)} instructions is FINISH")
    return _Run(program, units, tokens or {}).run()


def _check_bits(index: int, instruction: Instruction, unit: Unit) -> None:
    for name, token in zip(BITS, MEANING[unit], strict=True):
        if getattr(instruction.deps, name) and token is None:
            raise VtaRunError(
                "token-bits",
                f"{described(index, instruction)} has {name}, but the {unit.name.lower()} unit "
                "has no neighbour on that side",
                index,
            )


def described(index: int, instruction: Instruction) -> str:
    """Return an instruction's index and text, for messages."""
    return f"instruction {index} ({format_instruction(instruction)})"


class _Run:
    """The state of fetch, queues and tokens."""

    def __init__(
        self,
        program: Sequence[Instruction],
        units: tuple[Unit, ...],
        tokens: Mapping[Token, int],
    ) -> None:
        self.program, self.units, self.fetched = program, units, 0
        self.tokens = {t: deque([INITIAL] * tokens.get(t, 0)) for t in Token}
        self.queues: dict[Unit, deque[int]] = {unit: deque() for unit in Unit}
        self.sequence: list[int] = []
        self.sources: list[tuple[int, ...]] = [()] * len(program)

    def run(self) -> Order:
        """Run until FINISH; everything else must be done by then."""
        while True:
            self.fetch()
            index = self.ready()
            if index is None:
                raise VtaRunError("deadlock", self.stuck(), self.oldest())
            self.step(index)
            if isinstance(self.program[index], Finish):
                break
        if len(self.sequence) < len(self.program):
            done = described(index, self.program[index])
            first = min(set(range(len(self.program))) - set(self.sequence))
            raise VtaRunError(
                "finish-last",
                f"{done} runs before {described(first, self.program[first])}; "
                "FINISH must be the last to run",
                index,
            )
        left = {token: len(queue) for token, queue in self.tokens.items()}
        return Order(tuple(self.sequence), self.units, tuple(self.sources), left)

    def fetch(self) -> None:
        """Dispatch until the stream ends or a queue is full."""
        while self.fetched < len(self.program):
            queue = self.queues[self.units[self.fetched]]
            if len(queue) >= QUEUE_DEPTH:
                return
            queue.append(self.fetched)
            self.fetched += 1

    def ready(self) -> int | None:
        """Return the earliest head whose tokens are there."""
        heads = sorted(queue[0] for queue in self.queues.values() if queue)
        for index in heads:
            if all(self.tokens[t] for t in pops(self.program[index], self.units[index])):
                return index
        return None

    def step(self, index: int) -> None:
        """Run one instruction: pop, then push."""
        instruction, unit = self.program[index], self.units[index]
        self.queues[unit].popleft()
        self.sources[index] = tuple(self.tokens[t].popleft() for t in pops(instruction, unit))
        for token in pushes(instruction, unit):
            if len(self.tokens[token]) >= TOKEN_LIMIT:
                raise VtaRunError(
                    "token-overflow",
                    f"{described(index, instruction)} pushes token {TOKEN_LIMIT + 1} onto {token}; "
                    f"counters saturate at {TOKEN_LIMIT}",
                    index,
                )
            self.tokens[token].append(index)
        self.sequence.append(index)

    def oldest(self) -> int | None:
        """Return the earliest instruction that waits."""
        return min((queue[0] for queue in self.queues.values() if queue), default=None)

    def stuck(self) -> str:
        """Return what every unit waits for."""
        lines: list[str] = []
        for unit, queue in self.queues.items():
            if not queue:
                lines.append(f"{unit.name.lower()} unit: queue empty")
                continue
            head = self.program[queue[0]]
            missing = [t for t in pops(head, unit) if not self.tokens[t]]
            lines.append(
                f"{unit.name.lower()} unit: {described(queue[0], head)} waits for "
                f"{' and '.join(missing)}, {len(queue)} queued"
            )
        counts = ", ".join(f"{token} {len(queue)}" for token, queue in self.tokens.items())
        lines.append(f"tokens: {counts}")
        if rest := len(self.program) - self.fetched:
            lines.append(f"fetch: {rest} instructions not dispatched")
        return "\n  ".join(["no unit can go on", *lines])
