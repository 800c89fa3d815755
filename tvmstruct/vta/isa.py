"""VTA instructions and micro-ops, to bits and back.

Fields are placed upward from bit 0 in their order; a field that would cross bit 64 starts at
bit 64 (C bit-fields in 64-bit units).  Bits without a field are written as 0; when reading,
they are refused unless ``ignore_unused``: hardware ignores them, and so they would be lost.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from enum import IntEnum
from functools import cache
from typing import Any

from tvmstruct.errors import VtaEncodingError
from tvmstruct.vta.config import DEFAULT, LOOP_BITS, UOP_BITS, Config, Memory
from tvmstruct.vta.instructions import (
    Alu,
    AluOp,
    Deps,
    Finish,
    Gemm,
    Instruction,
    Load,
    Opcode,
    Store,
    Unit,
    Uop,
    VectorGemm,
    nop,
    unit_of,
)

__all__ = [
    "INSTRUCTION_BYTES",
    "Alu",
    "AluOp",
    "Deps",
    "Field",
    "Finish",
    "Gemm",
    "Instruction",
    "Load",
    "Memory",
    "Opcode",
    "Store",
    "Unit",
    "Uop",
    "VectorGemm",
    "check",
    "decode",
    "decode_stream",
    "decode_uops",
    "encode",
    "encode_stream",
    "encode_uops",
    "layout",
    "nop",
    "unit_of",
]

INSTRUCTION_BYTES = 16
UOP_BYTES = 4
WORD = 64


@dataclass(frozen=True, slots=True)
class Field:
    """Bits ``low`` to ``low + width - 1`` of an instruction."""

    name: str
    low: int
    width: int
    signed: bool = False

    def fits(self, value: int) -> bool:
        """Return whether ``value`` can be written."""
        return self.smallest <= value <= self.largest

    @property
    def smallest(self) -> int:
        """The least value."""
        return -(1 << (self.width - 1)) if self.signed else 0

    @property
    def largest(self) -> int:
        """The greatest value."""
        return (1 << (self.width - self.signed)) - 1

    @property
    def mask(self) -> int:
        """Ones where the field lies."""
        return ((1 << self.width) - 1) << self.low


DEPS = ("pop_prev", "pop_next", "push_prev", "push_next")
_CLASS: dict[Opcode, type[Any]] = {
    Opcode.LOAD: Load,
    Opcode.STORE: Store,
    Opcode.GEMM: Gemm,
    Opcode.FINISH: Finish,
    Opcode.ALU: Alu,
    Opcode.VGEMM: VectorGemm,
}
_OPCODE = {kind: opcode for opcode, kind in _CLASS.items()}
_DEPS = tuple(Deps(*(bool(n >> i & 1) for i in range(4))) for n in range(16))
# Fields that are not plain integers, and how to make them.
_KINDS: dict[str, type[int]] = {
    "memory": Memory,
    "alu_opcode": AluOp,
    "reset": bool,
    "use_imm": bool,
}


@cache
def layout(opcode: Opcode, config: Config = DEFAULT) -> tuple[Field, ...]:
    """Return the fields of an instruction, header first."""
    fields: list[Field] = []
    low = 0
    for name, width in (("opcode", 3), *((name, 1) for name in DEPS), *_widths(opcode, config)):
        if low < WORD < low + width:
            low = WORD
        if width:  # a memory of one tile has indices of no bits
            fields.append(Field(name, low, width, signed=name == "imm"))
        low += width
    return tuple(fields)


def _widths(opcode: Opcode, config: Config) -> tuple[tuple[str, int], ...]:
    if opcode is Opcode.FINISH:
        return ()
    if opcode in (Opcode.LOAD, Opcode.STORE):
        sizes = (("y_size", 16), ("x_size", 16), ("x_stride", 16))
        pads = tuple((name, 4) for name in ("y_pad_0", "y_pad_1", "x_pad_0", "x_pad_1"))
        return (("memory", 3), ("sram_base", 16), ("dram_base", 32), *sizes, *pads)
    uop, acc = config.log_depth(Memory.UOP), config.log_depth(Memory.ACC)
    src = acc if opcode is Opcode.ALU else config.log_depth(Memory.INP)
    loops = (
        ("reset", 1),
        ("uop_bgn", uop),
        ("uop_end", uop + 1),
        ("iter_out", LOOP_BITS),
        ("iter_in", LOOP_BITS),
        ("dst_factor_out", acc),
        ("dst_factor_in", acc),
        ("src_factor_out", src),
        ("src_factor_in", src),
    )
    if opcode is Opcode.ALU:
        return (*loops, ("alu_opcode", 3), ("use_imm", 1), ("imm", 16))
    if opcode is Opcode.VGEMM:
        return (*loops, ("wgt_factor_out", 0), ("wgt_factor_in", 0), ("vec_base", src))
    wgt = config.log_depth(Memory.WGT)
    return (*loops, ("wgt_factor_out", wgt), ("wgt_factor_in", wgt))


@cache
def _names(opcode: Opcode, config: Config) -> tuple[tuple[str, Field | None], ...]:
    """Return what an instruction has beyond its header, with the field that holds it, if any."""
    fields = {f.name: f for f in layout(opcode, config)}
    return tuple((name, fields.get(name)) for name, _ in _widths(opcode, config))


@cache
def _used(opcode: Opcode, config: Config) -> int:
    return sum(field.mask for field in layout(opcode, config))


def check(instruction: Instruction, config: Config = DEFAULT) -> None:
    """Raise VtaEncodingError for the first value that its field cannot hold."""
    opcode = _opcode(instruction)
    if opcode not in _known(config):
        raise VtaEncodingError(
            f"{opcode.name}: {config.name} has no such instruction; it needs the extension vvma"
        )
    for name in DEPS:
        _check_flag(opcode, name, getattr(instruction.deps, name))
    for name, field in _names(opcode, config):
        _check_value(opcode, name, field, getattr(instruction, name))


@cache
def _known(config: Config) -> tuple[Opcode, ...]:
    """Return the opcodes of a design."""
    return tuple(k for k in Opcode if k is not Opcode.VGEMM or "vvma" in config.extensions)


def _opcode(instruction: Instruction) -> Opcode:
    opcode = _OPCODE.get(type(instruction))
    if opcode is None:
        raise VtaEncodingError(
            f"{type(instruction).__name__} is no instruction; want Load, Store, Gemm, Alu or Finish"
        )
    return opcode


def _check_flag(opcode: Opcode, name: str, value: object) -> None:
    if value not in (0, 1):
        raise VtaEncodingError(f"{opcode.name}: {name} is {value!r}, want False or True")


def _check_value(opcode: Opcode, name: str, field: Field | None, value: Any) -> None:
    field = field or Field(name, 0, 0)
    kind = _KINDS.get(name, int)
    if kind is bool:
        _check_flag(opcode, name, value)
    elif isinstance(value, bool) or not isinstance(value, int):
        raise VtaEncodingError(f"{opcode.name}: {name} is {value!r}, want an integer")
    _check_member(opcode, name, kind, value)
    if not field.fits(value):
        raise VtaEncodingError(
            f"{opcode.name}: {name} is {value}, want {field.smallest} to {field.largest}"
        )


def _check_member(opcode: Opcode, name: str, kind: type[int], value: int) -> None:
    if issubclass(kind, IntEnum) and value not in list(kind):
        known = ", ".join(f"{k.value} {k.name.lower()}" for k in kind)
        raise VtaEncodingError(f"{opcode.name}: {name} is {value}; known are {known}")


def encode(instruction: Instruction, config: Config = DEFAULT) -> bytes:
    """Return the 16 bytes of an instruction, little-endian."""
    check(instruction, config)
    opcode = _opcode(instruction)
    bits = int(opcode)
    for i, name in enumerate(DEPS):
        bits |= int(getattr(instruction.deps, name)) << (3 + i)
    for name, field in _names(opcode, config):
        if field:
            bits |= (int(getattr(instruction, name)) << field.low) & field.mask
    return bits.to_bytes(INSTRUCTION_BYTES, "little")


def decode(data: bytes, config: Config = DEFAULT, *, ignore_unused: bool = False) -> Instruction:
    """Return the instruction of 16 bytes; VtaEncodingError where they are none."""
    if len(data) != INSTRUCTION_BYTES:
        raise VtaEncodingError(f"an instruction has {INSTRUCTION_BYTES} bytes, not {len(data)}")
    bits = int.from_bytes(data, "little")
    if bits & 7 not in _known(config):
        known = ", ".join(f"{int(k)} {k.name}" for k in _known(config))
        raise VtaEncodingError(f"opcode is {bits & 7}; known are {known}")
    opcode = Opcode(bits & 7)
    unused = bits & ~_used(opcode, config)
    if unused and not ignore_unused:
        raise VtaEncodingError(
            f"{opcode.name}: bit {unused.bit_length() - 1} is set but belongs to no field of "
            f"{config.name}; was it made for another configuration?"
        )
    values: dict[str, Any] = {}
    for name, low, mask, half, kind in _readers(opcode, config):
        value = bits >> low & mask
        if value >= half:
            value -= mask + 1
        if kind is not int:
            _check_member(opcode, name, kind, value)
            value = kind(value)
        values[name] = value
    return _CLASS[opcode](**values, deps=_DEPS[bits >> 3 & 15])


@cache
def _readers(opcode: Opcode, config: Config) -> tuple[tuple[str, int, int, int, type[int]], ...]:
    """Return name, lowest bit, mask, first negative value and type of each field."""
    readers: list[tuple[str, int, int, int, type[int]]] = []
    for name, field in _names(opcode, config):
        low, width = (field.low, field.width) if field else (0, 0)
        half = 1 << (width - 1) if field and field.signed else 1 << width
        readers.append((name, low, (1 << width) - 1, half, _KINDS.get(name, int)))
    return tuple(readers)


def encode_stream(instructions: Iterable[Instruction], config: Config = DEFAULT) -> bytes:
    """Return the bytes of a program; errors name the instruction's index."""
    parts: list[bytes] = []
    for index, instruction in enumerate(instructions):
        try:
            parts.append(encode(instruction, config))
        except VtaEncodingError as error:
            raise VtaEncodingError(f"instruction {index}: {error}") from error
    return b"".join(parts)


def decode_stream(
    data: bytes, config: Config = DEFAULT, *, ignore_unused: bool = False
) -> list[Instruction]:
    """Return the instructions of a program; errors name the instruction's index."""
    size = INSTRUCTION_BYTES
    if len(data) % size:
        raise VtaEncodingError(
            f"a program has {size} bytes an instruction, but {len(data)} leaves {len(data) % size}"
        )
    instructions: list[Instruction] = []
    for index, start in enumerate(range(0, len(data), size)):
        try:
            part = data[start : start + size]
            instructions.append(decode(part, config, ignore_unused=ignore_unused))
        except VtaEncodingError as error:
            raise VtaEncodingError(f"instruction {index}: {error}") from error
    return instructions


def encode_uops(uops: Sequence[Uop], config: Config = DEFAULT) -> bytes:
    """Return the 4 bytes of each micro-op: dst from bit 0, then src, then wgt."""
    parts: list[bytes] = []
    for index, uop in enumerate(uops):
        word, low = 0, 0
        for name, width in zip(("dst", "src", "wgt"), config.uop_fields, strict=True):
            value, field = getattr(uop, name), Field(name, low, width)
            if isinstance(value, bool) or not isinstance(value, int) or not field.fits(value):
                raise VtaEncodingError(
                    f"uop {index}: {name} is {value!r}, want 0 to {field.largest}"
                )
            word |= value << low
            low += width
        parts.append(word.to_bytes(UOP_BYTES, "little"))
    return b"".join(parts)


def decode_uops(data: bytes, config: Config = DEFAULT, *, ignore_unused: bool = False) -> list[Uop]:
    """Return the micro-ops of ``data``; VtaEncodingError where bits belong to no field."""
    if len(data) % UOP_BYTES:
        raise VtaEncodingError(f"micro-ops have {UOP_BYTES} bytes each; {len(data)} is no multiple")
    dst, src, wgt = config.uop_fields
    uops: list[Uop] = []
    for index, start in enumerate(range(0, len(data), UOP_BYTES)):
        word = int.from_bytes(data[start : start + UOP_BYTES], "little")
        if word >> (dst + src + wgt) and not ignore_unused:
            raise VtaEncodingError(
                f"uop {index}: {word:#010x} has bits over {dst + src + wgt} of {UOP_BITS} set"
            )
        word_src = word >> dst
        uops.append(
            Uop(
                word & ((1 << dst) - 1),
                word_src & ((1 << src) - 1),
                (word_src >> src) & ((1 << wgt) - 1),
            )
        )
    return uops
