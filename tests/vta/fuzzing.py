"""Random and mutated instruction streams, and one that runs them."""

import random
from dataclasses import fields, replace

from tests.vta.golden_programs import Golden, golden_programs
from tvmstruct.errors import VtaError
from tvmstruct.vta import isa
from tvmstruct.vta.isa import Deps
from tvmstruct.vta.simulator import Machine, Run

LIMIT = 100_000


def stream(rng: random.Random) -> tuple[Golden, bytes]:
    """Return a reference program, whose image to use, and a stream like it or quite random."""
    golden = rng.choice(golden_programs())
    kind = rng.randrange(8)
    if kind == 0:
        return golden, rng.randbytes(rng.choice([0, 3, 16, 64, 333, 1600]))
    if kind == 1:
        return golden, _random_program(rng)
    data = bytearray(golden.insn)
    if kind <= 4:
        for _ in range(rng.choice([1, 1, 2, 5, 30])):
            data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
        return golden, bytes(data)
    program = isa.decode_stream(golden.insn)
    for _ in range(rng.choice([1, 1, 2, 4])):
        program = _mutate(program, rng)
    return golden, isa.encode_stream(program)


def _mutate(program: list, rng: random.Random) -> list:
    at, other = rng.randrange(len(program)), rng.randrange(len(program))
    kind = rng.randrange(6)
    program = list(program)
    if kind == 0 and len(program) > 1:
        del program[at]
    elif kind == 1:
        program.insert(other, program[at])
    elif kind == 2:
        program[at], program[other] = program[other], program[at]
    elif kind == 3:
        program[at] = replace(program[at], deps=_deps(rng))
    else:
        program[at] = _change_field(program[at], rng)
    return program


def _change_field(instruction, rng: random.Random):
    names = [f.name for f in fields(instruction) if f.name not in ("deps", "memory")]
    if not names:
        return instruction
    name = rng.choice(names)
    field = next(f for f in isa.layout(_opcode(instruction)) if f.name == name)
    old = int(getattr(instruction, name))
    edges = [field.smallest, field.largest, 0, 1, old + 1, old - 1, old * 2]
    value = max(field.smallest, min(field.largest, rng.choice(edges)))
    if name == "alu_opcode":
        value = isa.AluOp(value % len(isa.AluOp))
    return replace(instruction, **{name: bool(value) if field.width == 1 else value})


def _opcode(instruction):
    return isa.Opcode[type(instruction).__name__.upper()]


def _deps(rng: random.Random) -> Deps:
    return Deps(*(rng.random() < 0.3 for _ in range(4)))


def _random_program(rng: random.Random) -> bytes:
    """Return instructions whose opcodes are valid, with small numbers more often than large."""
    parts = []
    for _ in range(rng.randrange(1, 40)):
        opcode = rng.choice(list(isa.Opcode))
        bits = int(opcode)
        for field in isa.layout(opcode)[1:]:
            width = rng.randrange(min(field.width, 6) + 1) if rng.random() < 0.9 else field.width
            limit = {"memory": 6, "alu_opcode": 5}.get(field.name, 1 << width)
            chance = 0.1 if field.name in isa.DEPS else 1
            bits |= (rng.randrange(limit) if rng.random() < chance else 0) << field.low
        parts.append(bits.to_bytes(16, "little"))
    return b"".join([*parts, isa.encode(isa.Finish())])


def run(golden: Golden, data: bytes, dram: bytes, *, strict: bool) -> Run | VtaError:
    """Return what came of a stream: anything but a result or a named error is raised."""
    try:
        return Machine().launch(data, dram, golden.base, strict=strict, limit=LIMIT)
    except VtaError as error:
        return error
