"""Layers in a row for one or a few rows, as one kernel: a team of threads goes through all of them.

A layer of its own wakes the threads, which takes as long as a structured layer with one row
computes. Inside a team a stage only ends with a barrier, and a thread reads the same part of the
weights in each call, which so stays in its own cache.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass

from tvm import tirx
from tvm.script.ir_builder import tirx as T

from tvmstruct.schedules.builder import argument, block, i64, loops, prim_func
from tvmstruct.schedules.compute.chain import RowNest, StagedRows
from tvmstruct.schedules.compute.dense import Epilogue
from tvmstruct.schedules.compute.layer_norm import RowNorm
from tvmstruct.schedules.compute.product_tile import Tile
from tvmstruct.schedules.compute.team import team
from tvmstruct.stages import Program


@dataclass(frozen=True)
class Member:
    """A layer of a sequence; numbers of values count the inputs first, then earlier members.

    ``constants`` are the numbers of its weights, [bias], [gamma, beta] among those of the kernel.
    """

    program: Program
    epilogue: Epilogue
    x: int
    residual: int | None
    constants: tuple[int, ...]

    @property
    def key(self) -> tuple[object, ...]:
        """Everything that the code depends on."""
        return (self.program.key, self.epilogue, self.x, self.residual, self.constants)

    def types(self) -> list[tuple[int, str]]:
        """Return size and dtype of each of its constants."""
        program, n, e = self.program, self.program.n_out, self.epilogue
        found = [
            (program.words(i) * program.parts, program.type(i)) for i in range(len(program.weights))
        ]
        return found + [(n, "float32")] * (e.bias + 2 * (e.norm is not None))


def sequence(
    members: Sequence[Member],
    inputs: Sequence[int],
    rows: int,
    nest: RowNest,
    lanes: int,
) -> tuple[tirx.PrimFunc, list[Tile]]:
    """Return the definition and the tiles that its product blocks name.

    Arguments are the inputs of ``inputs`` features, the constants, and y of the last member.
    """
    tiles: dict[Tile, int] = {}

    def body() -> None:
        m = i64(rows)
        values = [argument(f"x{i}", (m, i64(n))) for i, n in enumerate(inputs)]
        types: dict[int, tuple[int, str]] = {}
        for member in members:
            types |= dict(zip(member.constants, member.types(), strict=True))
        held = [argument(f"c{c}", (i64(types[c][0]),), types[c][1]) for c in sorted(types)]
        y = argument("y", (m, i64(members[-1].program.n_out)))
        with T.sblock("root"):  # by hand: a single product would be taken for it
            T.reads()
            T.writes()
            for member in members[:-1]:
                n = i64(member.program.n_out)
                values.append(T.sblock_alloc_buffer((m, n), "float32"))
            values.append(y)
            height = rows // nest.workers if nest.threads == "rows" else rows
            staged = [
                _staged(member, nest, lanes, tiles, values, held, height) for member in members
            ]
            rooms = [s.allocate() for s in staged]
            with _threads(nest) as number:
                for i, (s, member) in enumerate(zip(staged, members, strict=True)):
                    y, first = values[len(inputs) + i], number * height
                    s.emit(values[member.x], y, rooms[i], first)

    return prim_func(body), list(tiles)


@contextmanager
def _threads(nest: RowNest) -> Iterator[object]:
    """Start the threads, and yield which share of the rows is at hand."""
    if nest.threads == "rows":
        with loops(nest.workers, kind=T.parallel) as (t,):
            with block("share", [(nest.workers, t)]) as (share,):
                T.reads()
                T.writes()
                yield share
    else:
        with team() if nest.threads == "team" else nullcontext():
            yield i64(0)


def _staged(
    member: Member, nest: RowNest, lanes: int, tiles: dict, values: list, held: list, rows: int
) -> StagedRows:
    """Return the stages of a member on its arguments."""
    n, e = member.program.n_out, member.epilogue
    constants = [held[c] for c in member.constants]
    count = len(member.program.weights)
    weights, more = constants[:count], constants[count:]
    bias = more.pop(0) if e.bias else None
    norm = None if e.norm is None else RowNorm(lanes, n, e.norm, *more)
    residual = None if member.residual is None else values[member.residual]
    return StagedRows(member.program, nest, e, lanes, tiles, rows, weights, bias, residual, norm)
