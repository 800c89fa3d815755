"""Programs as text and back."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.vta.golden_programs import golden_programs
from tests.vta.strategies import instructions
from tvmstruct.errors import VtaAssemblyError
from tvmstruct.vta import isa
from tvmstruct.vta.assembly import assemble, disassemble, format_instruction
from tvmstruct.vta.isa import Alu, AluOp, Deps, Finish, Gemm, Load, Memory, Store

TEXT = """
# load, multiply, store
load.inp   sram=3 dram=0x4000 rows=2x16 stride=17 pad=1,2,3,4 pop=next push=next
LOAD.UOP   dram=64 rows=1x4   # a comment

gemm       uop=0:4 iter=8x2 dst=4,1 src=5,2 wgt=0,1 pop=prev,next
gemm.reset iter=1x16 dst=0,1
alu.max    dst=0,1 src=0,1 imm=-3
alu.add    iter=0x16
store.out  rows=1x16 stride=16 pop=prev push=prev
finish     pop=next
"""
PROGRAM = [
    Load(
        memory=Memory.INP, sram_base=3, dram_base=0x4000, y_size=2, x_size=16, x_stride=17,
        y_pad_0=1, y_pad_1=2, x_pad_0=3, x_pad_1=4, deps=Deps(pop_next=True, push_next=True),
    ),
    Load(memory=Memory.UOP, dram_base=64, y_size=1, x_size=4),
    Gemm(
        uop_end=4, iter_out=8, iter_in=2, dst_factor_out=4, dst_factor_in=1, src_factor_out=5,
        src_factor_in=2, wgt_factor_in=1, deps=Deps(pop_prev=True, pop_next=True),
    ),
    Gemm(reset=True, iter_in=16, dst_factor_in=1),
    Alu(alu_opcode=AluOp.MAX, dst_factor_in=1, src_factor_in=1, use_imm=True, imm=-3),
    Alu(alu_opcode=AluOp.ADD, iter_out=0, iter_in=16),
    Store(y_size=1, x_size=16, x_stride=16, deps=Deps(pop_prev=True, push_prev=True)),
    Finish(deps=Deps(pop_next=True)),
]  # fmt: skip


def test_text_by_hand() -> None:
    assert assemble(TEXT) == PROGRAM


@pytest.mark.parametrize("golden", golden_programs(), ids=lambda g: g.name)
def test_reference_programs_round_trip(golden) -> None:
    program = isa.decode_stream(golden.insn)
    assert isa.encode_stream(assemble(disassemble(program))) == golden.insn


@given(st.lists(instructions(), max_size=4))
def test_round_trip(program) -> None:
    text = disassemble(program)
    assert assemble(text) == program
    assert text.count("\n") == len(program)


def test_what_has_its_default_is_left_out() -> None:
    assert format_instruction(Gemm()) == "gemm"
    assert format_instruction(Load(memory=Memory.WGT, dram_base=255)) == "load.wgt   dram=0xff"
    unused = Alu(alu_opcode=AluOp.SHR, imm=7)
    assert format_instruction(unused) == "alu.shr    unused_imm=7"


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("jump 3", "unknown mnemonic 'jump'; known are load.uop"),
        ("load.inp 3", "'3' is no operand; want key=value"),
        ("load.inp dram=", "'dram=' is no operand"),
        ("load.inp uop=0:1", "unknown operand 'uop'; known are sram, dram, rows"),
        ("gemm imm=3", "unknown operand 'imm'"),
        ("load.inp sram=1 sram=2", "sram is given twice"),
        ("load.inp pad=1,2,3", "pad=1,2,3: want y_pad_0 , y_pad_1"),
        ("load.inp rows=16", "rows=16: want y_size x x_size"),
        ("load.inp sram=0x10", "sram=0x10: want sram_base, decimal integers"),
        ("load.inp dram=0xzz", "dram=0xzz: want an integer or 0x and hex digits"),
        ("load.inp dram=\u0661", "want an integer"),
        ("load.inp pop=left", "pop=left: want prev, next or prev,next"),
        ("load.inp pop=prev,prev", "want prev, next or prev,next"),
        ("alu.add imm=1 unused_imm=1", "imm and unused_imm are the same field"),
        ("load.inp sram=65536", "sram_base is 65536, want 0 to 65535"),
        ("gemm dst=-1,0", "dst_factor_out is -1, want 0 to 2047"),
    ],
)
def test_refused_lines(line: str, message: str) -> None:
    with pytest.raises(VtaAssemblyError, match=f"line 3: .*{message}"):
        assemble(f"# first\nfinish\n{line}\n")
