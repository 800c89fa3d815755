"""Predicted cycles against the hardware description and the figures measured on it."""

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.vta.strategies import instructions
from tests.vta.streams import INDEX, golden, load_and_multiply
from tvmstruct.errors import VtaError, VtaRunError
from tvmstruct.vta.channel import Dram
from tvmstruct.vta.config import DEFAULT, Config
from tvmstruct.vta.cycles import predict
from tvmstruct.vta.engine import MOST_TOKENS, QUEUE
from tvmstruct.vta.isa import (
    Alu,
    AluOp,
    Deps,
    Finish,
    Gemm,
    Load,
    Memory,
    Store,
    Unit,
    decode_stream,
    encode_stream,
    nop,
)

POP = Deps(pop_prev=True)
READY = Deps(push_next=True)
NO_DEPS = Deps()


def load(memory, tiles, rows=1, stride=None, deps=NO_DEPS, **fields):
    stride = tiles if stride is None else stride
    fields = {"x_size": tiles, "x_stride": stride, "deps": deps, **fields}
    return Load(memory=memory, y_size=rows, **fields)


def occupancy(*stream):
    """Return the cycles that the compute unit needs beside fetch and FINISH."""
    return predict([*stream, Finish()]).cycles - 21 - 2 * (len(stream) + 1) - 2


@pytest.mark.parametrize("entry", INDEX, ids=lambda entry: entry["name"])
def test_reference_programs_to_the_cycle(entry):
    found = predict(golden(entry["name"]))
    assert found.cycles == entry["cycles"]
    assert found.matrix_cycles == entry["counters"]["gemm_counter"]
    assert found.read_beats == entry["rtl"]["rd_beats"]


@pytest.mark.parametrize(("buffers", "measured"), [(1, 7632), (2, 4544)])
def test_load_and_multiply_loop(buffers, measured):
    assert predict(load_and_multiply(16, buffers)).cycles == pytest.approx(measured, rel=1e-3)


def test_second_buffer_hides_the_loads():
    one, two = (predict(load_and_multiply(16, buffers)) for buffers in (1, 2))
    assert one.cycles / two.cycles > 1.6
    assert one.utilisation == pytest.approx(0.54, abs=0.005)
    assert two.utilisation == pytest.approx(0.90, abs=0.005)


def test_two_units_share_the_read_channel():
    inp, acc = load(Memory.INP, 128, deps=READY), load(Memory.ACC, 32)
    alone = predict([load(Memory.INP, 128, deps=READY), Finish(deps=POP)])
    both = predict([inp, acc, Finish(deps=POP)])
    assert (alone.cycles, both.cycles) == (306, 564)
    assert both.spans[1].memory == 255  # one cycle of its wait is its later dispatch
    assert both.waits["dma"] == 255


@pytest.mark.parametrize(
    ("instruction", "cycles"),
    [
        (Gemm(iter_out=3, iter_in=5, uop_end=7), 3 * 5 * 7 + 7),
        (Gemm(iter_out=3, reset=True), 3 + 7),
        (Alu(alu_opcode=AluOp.SHR, use_imm=True, imm=3, iter_in=9), 9 + 7),
        (Alu(alu_opcode=AluOp.ADD, iter_in=9), 2 * 9 + 7),
        (Gemm(uop_end=0), 16384 + 7),  # hardware wraps a count of 0
        (load(Memory.ACC, 5), 23 + 40),
        (load(Memory.ACC8, 5), 23 + 10),
        (load(Memory.UOP, 7), 22 + 4),
        (load(Memory.UOP, 7, dram_base=1), 22 + 4),
        (load(Memory.UOP, 8, dram_base=1), 22 + 5),
        (load(Memory.ACC, 2, rows=3, stride=9), 23 + 48),
        (load(Memory.ACC, 1, x_pad_0=5, x_pad_1=6), 23 + 8),  # pads within the latency
        (load(Memory.ACC, 1, rows=2, x_pad_0=10, x_pad_1=11), 23 + 16 + 42 - 20),
        (load(Memory.ACC, 1, y_pad_0=3), 23 + 8 + 3),
        (load(Memory.ACC, 8, rows=2, y_pad_1=3), 23 + 128 + 24 + 2 - 20),
        (load(Memory.UOP, 1, rows=16, stride=2), 83 - 27),
        (nop(Unit.COMPUTE), 2),
    ],
    ids=str,
)
def test_occupancy(instruction, cycles):
    assert occupancy(instruction) == cycles


@pytest.mark.parametrize(
    ("base", "tiles", "rows", "bursts"),
    [(0, 4, 1, 1), (0, 4, 3, 3), (126, 4, 1, 2), (0, 300, 1, 3)],
)
def test_store_takes_three_cycles_a_tile_and_a_burst(base, tiles, rows, bursts):
    store = Store(
        dram_base=base, x_size=tiles, y_size=rows, x_stride=tiles, deps=Deps(push_prev=True)
    )
    stream = [store, Finish(deps=Deps(pop_next=True))]
    assert predict(stream).cycles == 21 + 4 + 3 * tiles * rows + 3 * bursts + 1 + 2


def test_fetch_reads_the_next_chunk_when_one_is_dispatched():
    """129 instructions: the last is fetched after the 128 before it went to their queues."""
    stream = [nop(Unit.COMPUTE)] * 128 + [Finish()]
    first = 21 + 2 * 128
    assert predict(stream[1:]).cycles == first + 2 * 128
    later = first + 128 + 21 + 2
    assert predict(stream).cycles == max(later, first + 2 * 128) + 2


def test_full_queue_stops_dispatch():
    """A long GEMM holds the compute unit; the instruction behind 512 others waits for a place."""
    held = Gemm(iter_out=1000, iter_in=10)
    stream = [held] + [nop(Unit.COMPUTE)] * QUEUE + [nop(Unit.STORE), Finish()]
    spans = predict(stream).spans
    assert spans[QUEUE].queued == spans[0].end + 1
    assert spans[QUEUE + 1].queued > spans[0].end


def test_wider_bus_moves_more_beats():
    stream = [load(Memory.ACC, 64), Finish()]
    narrow, wide = predict(stream), predict(stream, dram=Dram(bus_bytes=16))
    assert narrow.cycles - wide.cycles == 64 * 4 + 2  # of the load, and of fetch


def test_tiles_of_another_configuration_have_other_beats():
    config = Config(log_batch=1)
    stream = [load(Memory.ACC, 4), Finish()]
    assert predict(stream, config).cycles - predict(stream, DEFAULT).cycles == 32


def test_spans_say_what_was_waited_for():
    stream = load_and_multiply(3, 1)
    spans = predict(stream).spans
    reasons = [(span.reason, span.blocker) for span in spans]
    assert reasons[:5] == [("fetch", -1), ("fetch", -1), ("queue", 1), ("l2g", 2), ("g2l", 3)]
    assert spans[3].start == spans[2].end


@pytest.mark.parametrize(
    ("stream", "message"),
    [
        ([Finish(deps=POP)], "compute unit: instruction 0 waits for l2g"),
        ([nop(Unit.COMPUTE)], "no instruction is FINISH"),
        (
            [nop(Unit.COMPUTE, READY)] * (MOST_TOKENS + 1)
            + [nop(Unit.COMPUTE, Deps(pop_next=True)), Finish()],
            "1 pushed over 255 and lost",
        ),
    ],
)
def test_deadlock_is_an_error(stream, message):
    with pytest.raises(VtaRunError, match=message) as caught:
        predict(stream)
    assert caught.value.rule == "deadlock"


@pytest.mark.parametrize(
    ("instruction", "rule"),
    [
        (load(Memory.INP, 3, rows=0), "rows"),
        (load(Memory.INP, 65535, rows=65535), "size"),
        (load(Memory.OUT, 1), "load-memory"),
    ],
)
def test_impossible_transfers_are_refused(instruction, rule):
    with pytest.raises(VtaRunError, match="instruction 1") as caught:
        predict([nop(Unit.LOAD), instruction, Finish()])
    assert (caught.value.rule, caught.value.instruction) == (rule, 1)


@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
@given(st.lists(instructions(), max_size=30))
def test_random_streams_end_in_a_prediction_or_a_named_error(stream):
    try:
        found = predict([*stream, Finish()])
    except VtaRunError:
        return
    assert found.cycles >= 21 + 2 * min(len(stream) + 1, 128) + 2


@pytest.mark.parametrize("seed", range(40))
def test_mutated_programs_end_in_a_prediction_or_a_named_error(seed):
    rng = np.random.default_rng(seed)
    data = bytearray(encode_stream(golden(INDEX[seed % len(INDEX)]["name"])))
    for place in rng.integers(0, len(data), 3):
        data[place] ^= 1 << int(rng.integers(8))
    try:
        found = predict(decode_stream(bytes(data), ignore_unused=True))
    except VtaError:
        return
    assert found.cycles > 0
