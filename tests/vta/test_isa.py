"""Bits of instructions and micro-ops, against the tables of the instruction set."""

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.vta.golden_programs import golden_programs
from tests.vta.strategies import instructions
from tvmstruct.errors import VtaEncodingError
from tvmstruct.vta import isa
from tvmstruct.vta.config import DEFAULT, Memory
from tvmstruct.vta.isa import Alu, AluOp, Deps, Finish, Gemm, Load, Opcode, Unit, Uop

NARROW = replace(DEFAULT, log_uop_buff_size=9, log_acc_buff_size=10, log_wgt_buff_size=10)


@pytest.mark.parametrize("golden", golden_programs(), ids=lambda g: g.name)
def test_reference_programs_keep_every_bit(golden) -> None:
    assert isa.encode_stream(isa.decode_stream(golden.insn)) == golden.insn


def test_load_by_hand() -> None:
    load = Load(
        memory=Memory.ACC8, sram_base=0x1234, dram_base=0xDEADBEEF, y_size=2, x_size=3,
        x_stride=4, y_pad_0=5, y_pad_1=6, x_pad_0=7, x_pad_1=8,
        deps=Deps(pop_prev=True, push_next=True),
    )  # fmt: skip
    bits = 0 | 1 << 3 | 1 << 6 | 5 << 7 | 0x1234 << 10 | 0xDEADBEEF << 26
    bits |= 2 << 64 | 3 << 80 | 4 << 96 | 5 << 112 | 6 << 116 | 7 << 120 | 8 << 124
    assert isa.encode(load) == bits.to_bytes(16, "little")


def test_gemm_and_alu_by_hand() -> None:
    loops = {"reset": True, "uop_bgn": 3, "uop_end": 8192, "iter_out": 5, "iter_in": 16383}
    word0 = 2 | 1 << 7 | 3 << 8 | 8192 << 21 | 5 << 35 | 16383 << 49
    factors = {"dst_factor_out": 1, "dst_factor_in": 2, "src_factor_out": 3, "src_factor_in": 4}
    word1 = 1 | 2 << 11 | 3 << 22 | 4 << 33
    gemm = Gemm(**loops, **factors, wgt_factor_out=5, wgt_factor_in=1023)
    bits = word0 | (word1 | 5 << 44 | 1023 << 54) << 64
    assert isa.encode(gemm) == bits.to_bytes(16, "little")
    alu = Alu(**loops, **factors, alu_opcode=AluOp.MUL, use_imm=True, imm=-2)
    bits = (word0 ^ 2 ^ 4) | (word1 | 4 << 44 | 1 << 47 | 0xFFFE << 48) << 64
    assert isa.encode(alu) == bits.to_bytes(16, "little")


def test_fields_fill_word_0_where_it_has_room() -> None:
    # 8 + 7 + 8 + 14 + 14 = 51 bits, so a factor of 4 bits follows at once (C bit-fields)
    low = {f.name: f.low for f in isa.layout(Opcode.GEMM, NARROW)}
    assert NARROW.log_depth(Memory.ACC) == 4
    assert (low["iter_in"], low["dst_factor_out"], low["dst_factor_in"]) == (37, 51, 55)
    assert low["src_factor_out"] == 64
    assert (low["wgt_factor_out"], low["wgt_factor_in"]) == (86, 88)


def test_uop_by_hand() -> None:
    word = (2047 | 1 << 11 | 1023 << 22).to_bytes(4, "little")
    assert isa.encode_uops([Uop(2047, 1, 1023)]) == word
    assert isa.decode_uops(word) == [Uop(2047, 1, 1023)]


@pytest.mark.parametrize("config", [DEFAULT, NARROW], ids=lambda c: c.name)
@given(data=st.data())
def test_every_instruction_reads_back(config, data) -> None:
    instruction = data.draw(instructions(config))
    assert isa.decode(isa.encode(instruction, config), config) == instruction


@given(st.binary(min_size=16, max_size=16))
def test_any_bits_read_back_or_are_refused(bits: bytes) -> None:
    try:
        instruction = isa.decode(bits)
    except VtaEncodingError:
        return
    assert isa.encode(instruction) == bits


@given(st.lists(st.builds(Uop, *[st.integers(0, n - 1) for n in (2048, 2048, 1024)])))
def test_uops_read_back(uops) -> None:
    assert isa.decode_uops(isa.encode_uops(uops)) == uops


@pytest.mark.parametrize(
    ("instruction", "message"),
    [
        (Load(memory=Memory.INP, sram_base=65536), "LOAD: sram_base is 65536, want 0 to 65535"),
        (Load(memory=Memory.INP, x_pad_0=16), "x_pad_0 is 16, want 0 to 15"),
        (Load(memory=Memory.INP, dram_base=-1), "dram_base is -1"),
        (Load(memory=7), "memory is 7; known are 0 uop, 1 wgt"),
        (Gemm(uop_end=16384), "uop_end is 16384, want 0 to 16383"),
        (Gemm(iter_in=16384), "iter_in is 16384"),
        (Gemm(wgt_factor_in=1024), "wgt_factor_in is 1024, want 0 to 1023"),
        (Gemm(reset=2), "reset is 2, want False or True"),
        (Gemm(iter_in=1.0), "iter_in is 1.0, want an integer"),
        (Alu(alu_opcode=AluOp.ADD, imm=32768), "imm is 32768, want -32768 to 32767"),
        (Alu(alu_opcode=5), "alu_opcode is 5; known are 0 min"),
        (Finish(deps=Deps(pop_prev=2)), "pop_prev is 2, want False or True"),
        (Uop(), "Uop is no instruction"),
    ],
)
def test_refused_values(instruction, message: str) -> None:
    with pytest.raises(VtaEncodingError, match=f"instruction 1: .*{message}"):
        isa.encode_stream([Finish(), instruction])


def test_factors_of_a_memory_of_one_tile() -> None:
    one = replace(DEFAULT, log_wgt_buff_size=8)
    gemm = Gemm(iter_in=3, dst_factor_in=1)
    assert isa.decode(isa.encode(gemm, one), one) == gemm
    with pytest.raises(VtaEncodingError, match="wgt_factor_in is 1, want 0 to 0"):
        isa.encode(Gemm(wgt_factor_in=1), one)


@pytest.mark.parametrize(
    ("bits", "message"),
    [
        (6, "opcode is 6; known are 0 LOAD"),
        (6 << 7, "LOAD: memory is 6"),
        (1 << 63, "LOAD: bit 63 is set but belongs to no field of 1x16_i8w8a32"),
        (3 | 1 << 7, "FINISH: bit 7 is set"),
        (4 | 7 << 108, "ALU: alu_opcode is 7"),
    ],
)
def test_refused_bits(bits: int, message: str) -> None:
    with pytest.raises(VtaEncodingError, match=f"instruction 1: {message}"):
        isa.decode_stream(bytes([3] + [0] * 15) + bits.to_bytes(16, "little"))


def test_unused_bits_can_be_ignored_as_in_hardware() -> None:
    bits = (1 << 63 | 2 << 7).to_bytes(16, "little")
    assert isa.decode(bits, ignore_unused=True) == Load(memory=Memory.INP)


def test_lengths() -> None:
    with pytest.raises(VtaEncodingError, match="17 leaves 1"):
        isa.decode_stream(bytes(17))
    with pytest.raises(VtaEncodingError, match="4 bytes each; 5"):
        isa.decode_uops(bytes(5))
    with pytest.raises(VtaEncodingError, match="has 16 bytes, not 3"):
        isa.decode(bytes(3))


def test_uop_refused() -> None:
    with pytest.raises(VtaEncodingError, match="uop 1: wgt is 1024, want 0 to 1023"):
        isa.encode_uops([Uop(), Uop(wgt=1024)])
    narrow = replace(DEFAULT, log_wgt_buff_size=17)
    with pytest.raises(VtaEncodingError, match="uop 0: 0x80000000 has bits over 31 of 32 set"):
        isa.decode_uops((1 << 31).to_bytes(4, "little"), narrow)


def test_units() -> None:
    for unit in Unit:
        assert isa.unit_of(isa.nop(unit)) is unit
        assert isa.nop(unit).is_nop
    compute = [Load(memory=m) for m in (Memory.UOP, Memory.ACC, Memory.ACC8)]
    assert {isa.unit_of(i) for i in (*compute, Gemm(), Finish())} == {Unit.COMPUTE}
    assert isa.unit_of(Load(memory=Memory.WGT)) is Unit.LOAD
