"""VGEMM: the unit that the VVMA paper proposes, in encoding, simulator and cycle model."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings

from tests.vta.strategies import instructions
from tvmstruct.errors import VtaConfigError, VtaEncodingError, VtaRunError
from tvmstruct.vta import gemm_stream
from tvmstruct.vta.assembly import assemble, disassemble
from tvmstruct.vta.config import DEFAULT, Config, Memory
from tvmstruct.vta.cycles import STANDARD, predict
from tvmstruct.vta.isa import (
    Deps,
    Finish,
    Gemm,
    Instruction,
    Load,
    VectorGemm,
    decode,
    encode,
    encode_stream,
)
from tvmstruct.vta.simulator import Machine
from tvmstruct.vta.timeline import describe

VVMA = replace(DEFAULT, extensions=frozenset({"vvma"}))
WIDE = replace(VVMA, log_batch=1, log_block=3, log_inp_buff_size=12, log_wgt_buff_size=14)
BASE = 0x1000


def launch(machine, *program):
    stream = [*program, Finish()]
    return machine.launch(encode_stream(stream, machine.config), bytes(64), BASE, strict=False)


@pytest.mark.parametrize("config", [VVMA, WIDE], ids=["1x16", "2x8"])
@pytest.mark.parametrize(("outputs", "inputs"), [(3, 5), (1, 7), (6, 1)])
def test_vvma_is_dense_algebra(config, outputs, inputs, rng):
    """W_ij = M diag(v_ij), one instruction for all blocks, against the dense integer matrix."""
    k, batch = config.block_in, config.batch
    m = rng.integers(-128, 128, (k, k))
    v = rng.integers(-128, 128, (outputs, inputs, k))
    x = rng.integers(-128, 128, (batch, inputs, k))
    dense = np.block([[m * v[i, j] for j in range(inputs)] for i in range(outputs)])
    machine = Machine(config)
    place, at = 11, 40  # of the inputs and of the vectors
    machine.inp[place : place + inputs] = x.transpose(1, 0, 2)
    vectors = v.reshape(-1, 1, k).repeat(batch, 1)
    machine.inp[at : at + len(vectors)] = vectors
    machine.wgt[2] = m.T
    machine.uops[:inputs] = [(5, place + j, 2) for j in range(inputs)]
    run = launch(
        machine,
        VectorGemm(uop_end=inputs, iter_in=outputs, dst_factor_in=1, vec_base=at),
    )
    want = x.reshape(batch, -1) @ dense.T
    got = machine.acc[5 : 5 + outputs].transpose(1, 0, 2).reshape(batch, -1)
    np.testing.assert_array_equal(got, want)
    assert run.counters.gemm_counter == outputs * inputs


def test_outer_loop_takes_the_same_vectors_again(rng):
    """Rows of a batch, two tiles each, with the same two vectors; sums wrap at 32 bits."""
    machine = Machine(VVMA)
    machine.inp[:9] = rng.integers(-128, 128, (9, 1, 16))
    machine.wgt[:2] = rng.integers(-128, 128, (2, 16, 16))
    machine.acc[:4] = rng.integers(-(2**31), 2**31, (4, 1, 16))
    machine.acc[0] = 2**31 - 1
    machine.uops[:2] = [(0, 0, 0), (0, 1, 1)]
    want = machine.acc[:4].astype(np.int64)
    for row in range(3):
        for u in range(2):
            scaled = machine.inp[2 * row + u].astype(np.int64) * machine.inp[7 + u]
            want[row] += scaled @ machine.wgt[u].astype(np.int64)
    gemm = VectorGemm(uop_end=2, iter_out=3, dst_factor_out=1, src_factor_out=2, vec_base=7)
    launch(machine, gemm)
    np.testing.assert_array_equal(machine.acc[:4], want.astype(np.int32))


def test_reset_zeroes_accumulators(rng):
    machine = Machine(VVMA)
    machine.acc[:3] = 7
    launch(machine, VectorGemm(reset=True, iter_in=2, dst_factor_in=1))
    assert (machine.acc[:2] == 0).all()
    assert (machine.acc[2] == 7).all()


@settings(max_examples=30, deadline=None)
@given(instructions(VVMA))
def test_round_trips(instruction: Instruction):
    assert decode(encode(instruction, VVMA), VVMA) == instruction
    assert assemble(disassemble([instruction]), VVMA) == [instruction]


def test_stock_designs_have_no_such_opcode():
    gemm = VectorGemm(vec_base=3)
    with pytest.raises(VtaEncodingError, match="needs the extension vvma"):
        encode(gemm, DEFAULT)
    data = encode(gemm, VVMA)
    with pytest.raises(VtaEncodingError, match="opcode is 5"):
        decode(data, DEFAULT)


def test_weights_have_no_factors():
    with pytest.raises(VtaEncodingError, match="wgt_factor_in is 1, want 0 to 0"):
        encode(VectorGemm(wgt_factor_in=1), VVMA)


def test_vectors_beyond_the_input_buffer_are_refused():
    gemm = VectorGemm(iter_in=9, vec_base=VVMA.depth(Memory.INP) - 8)
    with pytest.raises(VtaRunError, match="reaches vector 2048 in inp; there are 2048"):
        launch(Machine(VVMA), gemm)


def test_extension_must_fit_the_instruction_word():
    sizes = {"log_inp_buff_size": 19, "log_wgt_buff_size": 14}
    Config(**sizes)
    with pytest.raises(VtaConfigError, match="word 1 of VGEMM"):
        Config(**sizes, extensions=frozenset({"vvma"}))


@pytest.mark.parametrize("vectors", [1, 2])
def test_strict_launch_knows_which_vectors_are_read(vectors):
    """Two tiles were loaded: vector 1 is one of them, vector 2 is what power-up left there."""
    at = {memory: BASE // VVMA.tile_bytes(memory) for memory in Memory}
    stream = [
        Load(memory=Memory.UOP, dram_base=at[Memory.UOP], y_size=1, x_size=1, x_stride=1),
        Gemm(reset=True),
        Load(memory=Memory.INP, dram_base=at[Memory.INP], y_size=1, x_size=2, x_stride=2),
        Load(
            memory=Memory.WGT,
            dram_base=at[Memory.WGT],
            y_size=1,
            x_size=1,
            x_stride=1,
            deps=Deps(push_next=True),
        ),
        VectorGemm(iter_in=vectors, vec_base=1, deps=Deps(pop_prev=True)),
        Finish(),
    ]
    machine = Machine(VVMA)
    if vectors == 1:
        assert machine.launch(stream, bytes(4096), BASE).counters.gemm_counter == 1
        return
    with pytest.raises(VtaRunError, match="inp tile 2 was never written"):
        machine.launch(stream, bytes(4096), BASE)


def test_one_vector_a_cycle_and_one_more_stage():
    stream = [VectorGemm(uop_end=4, iter_in=50), Finish()]
    plain = [Gemm(uop_end=4, iter_in=50), Finish()]
    assert predict(stream, VVMA).cycles == predict(plain, VVMA).cycles + 1
    assert describe(stream[0]) == "VGEMM 200"


def test_vvma_needs_a_sixth_of_the_cycles_of_dense():
    """1024 x 1024, k = 16, batch 1: M once, 4096 vectors through two halves of the buffer."""
    blocks, chunk, half = 64, 8, 1024
    stream: list[Instruction] = [
        Load(memory=Memory.UOP, y_size=1, x_size=blocks, x_stride=blocks),
        Load(memory=Memory.INP, y_size=1, x_size=blocks, x_stride=blocks),
        Load(memory=Memory.WGT, dram_base=64, y_size=1, x_size=1, x_stride=1),
    ]
    for i in range(blocks // chunk):
        count = chunk * blocks
        load = Load(
            memory=Memory.INP,
            sram_base=i % 2 * half + blocks,
            dram_base=4096 + i * count,
            y_size=1,
            x_size=count,
            x_stride=count,
            deps=Deps(pop_next=i >= 2, push_next=True),
        )
        multiply = VectorGemm(
            uop_end=blocks,
            iter_in=chunk,
            dst_factor_in=1,
            vec_base=i % 2 * half + blocks,
            deps=Deps(pop_prev=True, push_prev=i + 2 < blocks // chunk),
        )
        stream += [load, multiply]
    stream.append(Finish())
    found = predict(stream, VVMA)
    assert found.matrix_cycles == blocks**2
    dense = gemm_stream.cycles(1, 1024, 1024, DEFAULT, STANDARD)
    assert dense / found.cycles > 6
