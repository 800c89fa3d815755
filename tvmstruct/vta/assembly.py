"""VTA programs as text, both ways: one instruction a line, ``#`` starts a comment.

::

    load.inp   sram=0 dram=0x4000 rows=2x16 stride=16 pad=1,0,1,1 pop=next push=next
    gemm       uop=0:4 iter=8x4 dst=4,1 src=4,1 wgt=0,1 pop=prev
    gemm.reset uop=0:1 iter=1x16 dst=0,1
    alu.max    uop=0:1 iter=1x16 dst=0,1 src=0,1 imm=0
    alu.add    uop=4:5 iter=1x16 dst=0,1 src=0,1        # adds acc[src]: there is no imm
    store.out  sram=0 dram=0x8000 rows=1x16 stride=16 pop=prev push=prev
    finish     pop=next

``rows`` is y_size x x_size, ``pad`` top, bottom, left, right; ``iter`` is outer x inner, a pair
of factors outer, inner; only ``dram`` may be hexadecimal.  What is left out has the default of
its class in ``instructions``.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import MISSING, fields
from typing import Any, NamedTuple

from tvmstruct.errors import VtaAssemblyError, VtaEncodingError
from tvmstruct.vta.config import DEFAULT, Config
from tvmstruct.vta.isa import (
    Alu,
    AluOp,
    Deps,
    Finish,
    Gemm,
    Instruction,
    Load,
    Memory,
    Store,
    VectorGemm,
    check,
)

NUMBER = re.compile(r"-?[0-9]{1,12}", re.ASCII)
ADDRESS = re.compile(r"0x[0-9a-f]{1,16}|[0-9]{1,12}", re.ASCII)
SIDES = ("prev", "next")


class Key(NamedTuple):
    """An operand: the instruction fields that it holds, and what stands between them."""

    fields: tuple[str, ...]
    separator: str = ","
    hexadecimal: bool = False


_TRANSFER = {
    "sram": Key(("sram_base",)),
    "dram": Key(("dram_base",), hexadecimal=True),
    "rows": Key(("y_size", "x_size"), "x"),
    "stride": Key(("x_stride",)),
    "pad": Key(("y_pad_0", "y_pad_1", "x_pad_0", "x_pad_1")),
}
_LOOPS = {
    "uop": Key(("uop_bgn", "uop_end"), ":"),
    "iter": Key(("iter_out", "iter_in"), "x"),
    "dst": Key(("dst_factor_out", "dst_factor_in")),
    "src": Key(("src_factor_out", "src_factor_in")),
}
KEYS: dict[type[Any], dict[str, Key]] = {
    Load: _TRANSFER,
    Store: _TRANSFER,
    Gemm: {**_LOOPS, "wgt": Key(("wgt_factor_out", "wgt_factor_in"))},
    VectorGemm: {**_LOOPS, "vec": Key(("vec_base",))},
    Alu: {**_LOOPS, "imm": Key(("imm",)), "unused_imm": Key(("imm",))},
    Finish: {},
}
# A mnemonic gives a class and the fields that its suffix fixes.
MNEMONICS: dict[str, tuple[type[Any], dict[str, Any]]] = {
    **{f"load.{m.name.lower()}": (Load, {"memory": m}) for m in Memory},
    **{f"store.{m.name.lower()}": (Store, {"memory": m}) for m in Memory},
    "gemm": (Gemm, {"reset": False}),
    "gemm.reset": (Gemm, {"reset": True}),
    "vgemm": (VectorGemm, {"reset": False}),
    "vgemm.reset": (VectorGemm, {"reset": True}),
    **{f"alu.{o.name.lower()}": (Alu, {"alu_opcode": o, "reset": False}) for o in AluOp},
    **{f"alu.{o.name.lower()}.reset": (Alu, {"alu_opcode": o, "reset": True}) for o in AluOp},
    "finish": (Finish, {}),
}
_DEFAULTS = {
    kind: {f.name: f.default for f in fields(kind) if f.default is not MISSING} for kind in KEYS
}


def assemble(text: str, config: Config = DEFAULT) -> list[Instruction]:
    """Return the instructions of ``text``; VtaAssemblyError has the line's number."""
    instructions: list[Instruction] = []
    for number, line in enumerate(text.splitlines(), 1):
        words = line.partition("#")[0].split()
        if not words:
            continue
        try:
            instruction = _parse(words)
            check(instruction, config)
        except (VtaAssemblyError, VtaEncodingError) as error:
            raise VtaAssemblyError(f"line {number}: {error}") from error
        instructions.append(instruction)
    return instructions


def disassemble(instructions: Iterable[Instruction]) -> str:
    """Return text that ``assemble`` turns into the same instructions; a comment has the index."""
    lines = [format_instruction(instruction) for instruction in instructions]
    width = min(max(map(len, lines), default=0), 70)
    return "".join(f"{line:<{width}}  # {index}\n" for index, line in enumerate(lines))


def format_instruction(instruction: Instruction) -> str:
    """Return an instruction's line, without what has its default."""
    kind = type(instruction)
    words = [f"{_mnemonic(instruction):<10}"]
    for name, key in KEYS[kind].items():
        if name in ("imm", "unused_imm"):
            words += _immediate(instruction, name)
            continue
        values = [getattr(instruction, field) for field in key.fields]
        if values != [_DEFAULTS[kind][field] for field in key.fields]:
            form = hex if key.hexadecimal else str
            words.append(f"{name}={key.separator.join(map(form, values))}")
    for verb in ("pop", "push"):
        sides = [side for side in SIDES if getattr(instruction.deps, f"{verb}_{side}")]
        if sides:
            words.append(f"{verb}={','.join(sides)}")
    return " ".join(words).rstrip()


def _mnemonic(instruction: Instruction) -> str:
    if isinstance(instruction, Load | Store):
        return f"{type(instruction).__name__.lower()}.{instruction.memory.name.lower()}"
    if isinstance(instruction, Finish):
        return "finish"
    if isinstance(instruction, Alu):
        stem = f"alu.{instruction.alu_opcode.name.lower()}"
    else:
        stem = "vgemm" if isinstance(instruction, VectorGemm) else "gemm"
    return f"{stem}.reset" if instruction.reset else stem


def _immediate(instruction: Any, name: str) -> list[str]:
    if name == "imm":
        return [f"imm={instruction.imm}"] if instruction.use_imm else []
    return [f"unused_imm={instruction.imm}"] if instruction.imm and not instruction.use_imm else []


def _parse(words: list[str]) -> Instruction:
    mnemonic = words[0].lower()
    if mnemonic not in MNEMONICS:
        raise VtaAssemblyError(f"unknown mnemonic {words[0]!r}; known are {', '.join(MNEMONICS)}")
    kind, fixed = MNEMONICS[mnemonic]
    values, seen = dict(fixed), set[str]()
    deps: dict[str, bool] = {}
    for word in words[1:]:
        name, equals, text = word.lower().partition("=")
        if not equals or not text:
            raise VtaAssemblyError(f"{mnemonic}: {word!r} is no operand; want key=value")
        if name in seen:
            raise VtaAssemblyError(f"{mnemonic}: {name} is given twice")
        seen.add(name)
        if name in ("pop", "push"):
            deps |= _sides(mnemonic, name, text)
        else:
            values |= _operand(mnemonic, kind, name, text)
    if {"imm", "unused_imm"} <= seen:
        raise VtaAssemblyError(f"{mnemonic}: imm and unused_imm are the same field; give one")
    if kind is Alu:
        values["use_imm"] = "imm" in seen
    return kind(**values, deps=Deps(**deps))


def _sides(mnemonic: str, verb: str, text: str) -> dict[str, bool]:
    sides = text.split(",")
    if not set(sides) <= set(SIDES) or len(sides) != len(set(sides)):
        raise VtaAssemblyError(f"{mnemonic}: {verb}={text}: want prev, next or prev,next")
    return {f"{verb}_{side}": True for side in sides}


def _operand(mnemonic: str, kind: type[Any], name: str, text: str) -> dict[str, int]:
    key = KEYS[kind].get(name)
    if key is None:
        known = ", ".join((*KEYS[kind], "pop", "push"))
        raise VtaAssemblyError(f"{mnemonic}: unknown operand {name!r}; known are {known}")
    if key.hexadecimal:
        return {key.fields[0]: _address(mnemonic, name, text)}
    parts = text.split(key.separator)
    if len(parts) != len(key.fields) or not all(NUMBER.fullmatch(part) for part in parts):
        form = f" {key.separator} ".join(key.fields)
        raise VtaAssemblyError(f"{mnemonic}: {name}={text}: want {form}, decimal integers")
    return dict(zip(key.fields, map(int, parts), strict=True))


def _address(mnemonic: str, name: str, text: str) -> int:
    if not ADDRESS.fullmatch(text):
        raise VtaAssemblyError(f"{mnemonic}: {name}={text}: want an integer or 0x and hex digits")
    return int(text, 16 if text.startswith("0x") else 10)
