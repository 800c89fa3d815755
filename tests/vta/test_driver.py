"""The driver: transfers, tokens, micro-ops and scratchpads, without any kernel."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tvmstruct.errors import VtaEncodingError, VtaError, VtaMemoryError
from tvmstruct.vta.config import DEFAULT, Config, Memory
from tvmstruct.vta.cycles import predict
from tvmstruct.vta.driver import BASE, Driver, cut
from tvmstruct.vta.instructions import AluOp, Finish, Gemm, Load, Store, Unit, unit_of
from tvmstruct.vta.isa import decode_stream
from tvmstruct.vta.portable import Level, check
from tvmstruct.vta.scratchpad import Buffer
from tvmstruct.vta.simulator import simulate
from tvmstruct.vta.stream import Loop


def finished(driver: Driver):
    """Return the instructions, the regions by name and an image with the micro-ops in place."""
    insn, regions, size = driver.finish()
    image = np.zeros(size, np.uint8)
    for region in regions:
        if region.data is not None:
            start = region.address - BASE
            image[start : start + region.size] = np.frombuffer(region.data, np.uint8)
    return insn, {region.name: region for region in regions}, image


def proven(insn: bytes, image: np.ndarray, config: Config = DEFAULT):
    assert not check(insn, image, BASE, config, Level.HLS)
    return decode_stream(insn, config)


@given(
    st.lists(st.tuples(st.integers(1, 5), st.integers(1, 40)), min_size=1, max_size=4),
    st.booleans(),
)
def test_transfers_are_cut_into_rows(dims, contiguous):
    if contiguous:
        dims = [*dims[:-1], (dims[-1][0], 1)]
    want = [
        sum(i * stride for i, (_, stride) in zip(index, dims, strict=True))
        for index in itertools.product(*(range(extent) for extent, _ in dims))
    ]
    found = [
        offset + row * stride + column
        for offset, rows, columns, stride in cut(dims)
        for row in range(rows)
        for column in range(columns)
    ]
    assert found == want


def test_even_transfers_are_one_instruction():
    assert list(cut([(4, 12), (3, 4), (4, 1)])) == [(0, 1, 48, 48)]
    assert list(cut([(4, 100), (12, 1)])) == [(0, 4, 12, 100)]
    assert len(list(cut([(2, 1000), (4, 100), (12, 1)]))) == 2
    assert [(n, m) for _, n, m, _ in cut([(3, 70000), (2, 1)])] == [(1, 2)] * 3
    with pytest.raises(VtaEncodingError, match="want at most 65535 of each"):
        list(cut([(70000, 1)]))


def pipeline(steps: int, versions: int, config: Config = DEFAULT) -> Driver:
    """Record ``y[i] = x[i] @ w^T`` for one tile after another."""
    driver = Driver(config)
    x, w, y = (
        driver.dram("x", Memory.INP, steps),
        driver.dram("w", Memory.WGT, 1, constant=True),
        driver.dram("y", Memory.OUT, steps),
    )
    inp, wgt, acc = (
        driver.buffers[driver.buffer(memory, 1, places)]
        for memory, places in (
            (Memory.INP, versions),
            (Memory.WGT, 1),
            (Memory.ACC, versions),
        )
    )
    driver.load(Memory.WGT, wgt.base, w, 0, [(1, 1)])
    for i in range(steps):
        inp.fill(i)
        acc.fill(None)
        driver.load(Memory.INP, inp.base, x, i, [(1, 1)])
        driver.gemm((acc.base, 0, 0), [], reset=True)
        driver.gemm((acc.base, inp.base, wgt.base), [])
        driver.store(acc.base, y, i, [(1, 1)])
    return driver


@pytest.mark.parametrize("versions", [1, 2, 3])
def test_tokens_keep_units_apart(versions):
    insn, regions, image = finished(pipeline(7, versions))
    rng = np.random.default_rng(versions)
    x, w = (rng.integers(-9, 9, shape).astype(np.int8) for shape in ((7, 16), (16, 16)))
    for name, array in (("x", x), ("w", w)):
        start = regions[name].address - BASE
        image[start : start + array.size] = array.reshape(-1).view(np.uint8)
    stream = proven(insn, image)
    after = simulate(insn, image, BASE).dram
    start = regions["y"].address - BASE
    found = after[start : start + 7 * 16].view(np.int8).reshape(7, 16)
    np.testing.assert_array_equal(found, (x.astype(np.int32) @ w.T).astype(np.int8))
    # The first loads into each version wait for nothing.
    loads = [i for i in stream if unit_of(i) is Unit.LOAD]
    assert [i.deps.pop_next for i in loads] == [False] * (1 + versions) + [True] * (7 - versions)


def test_what_a_store_wrote_is_loaded_after_it():
    driver = Driver(DEFAULT)
    x, t, y = (driver.dram(name, Memory.INP, 4) for name in "xty")
    sums = driver.dram("zero", Memory.ACC, 4, constant=True)
    driver.load(Memory.ACC, 0, sums, 0, [(4, 1)])
    driver.alu(AluOp.ADD, (0, 0), [Loop(4, 1, 1)], 5)
    driver.store(0, t, 0, [(4, 1)])
    driver.load(Memory.INP, 0, x, 0, [(4, 1)])
    driver.load(Memory.INP, 4, t, 0, [(4, 1)])
    driver.load(Memory.WGT, 0, driver.dram("w", Memory.WGT, 1, constant=True), 0, [(1, 1)])
    driver.gemm((4, 4, 0), [Loop(4, 1, 1)], reset=True)
    driver.gemm((4, 4, 0), [Loop(4, 1, 1)])
    driver.store(4, y, 0, [(4, 1)])
    insn, _, image = finished(driver)
    stream = proven(insn, image)
    relays = [i for i in stream if isinstance(i, Load) and i.is_nop and i.deps.pop_next]
    assert len(relays) == 2  # one between store and load, one before the end
    assert isinstance(stream[-1], Finish)


def test_resident_micro_ops_are_loaded_once():
    insn, _, image = finished(pipeline(7, 2))
    stream = proven(insn, image)
    loads = [i for i in stream if isinstance(i, Load) and i.memory is Memory.UOP and not i.is_nop]
    assert loads == [stream[0]]
    assert loads[0].x_size < 7  # two places of sums and of x repeat


def test_micro_ops_that_do_not_fit_replace_others():
    config = Config(log_uop_buff_size=4)  # four micro-ops
    driver = pipeline(12, 3, config)
    insn, _, image = finished(driver)
    stream = proven(insn, image, config)
    loads = [i for i in stream if isinstance(i, Load) and i.memory is Memory.UOP and not i.is_nop]
    assert len(loads) > 6
    assert all(i.sram_base + i.x_size <= 4 for i in loads)
    gemms = [i for i in stream if isinstance(i, Gemm)]
    assert len(gemms) == 24
    with pytest.raises(VtaMemoryError, match="a kernel of 5 micro-ops is 1 over its depth of 4"):
        Driver(config).gemm((0, 0, 0), [Loop(2, 9, 0), Loop(6, 2, 1), Loop(5, 1, 0)], reset=True)


def test_scratchpads_refuse_to_spill():
    driver = Driver(DEFAULT)
    driver.buffer(Memory.INP, 1000, 2)
    with pytest.raises(VtaMemoryError, match=r"50 tiles in 1 versions .* 2 tiles over its depth"):
        driver.buffer(Memory.INP, 50)
    driver.release()
    driver.buffer(Memory.INP, 2048)


def test_transfers_stay_inside_their_region():
    driver = Driver(DEFAULT)
    x = driver.dram("x", Memory.INP, 4)
    with pytest.raises(VtaError, match="beyond the end of memory 'x'"):
        driver.load(Memory.INP, 0, x, 2, [(3, 1)])


def many_steps(driver: Driver, together: bool) -> None:
    """Record 300 tiles without a place that is used twice: nothing but counters limits units."""
    x = driver.dram("x", Memory.INP, 300)
    y = driver.dram("y", Memory.OUT, 300)
    driver.load(Memory.WGT, 0, driver.dram("w", Memory.WGT, 1, constant=True), 0, [(1, 1)])
    for i in range(300 if together else 0):
        driver.load(Memory.INP, i, x, i, [(1, 1)])
    for i in range(300):
        if not together:
            driver.load(Memory.INP, i, x, i, [(1, 1)])
        driver.gemm((i, 0, 0), [], reset=True)
        driver.gemm((i, i, 0), [])
        driver.store(i, y, i, [(1, 1)])


def test_counters_of_tokens_do_not_overflow():
    driver = Driver(DEFAULT)
    many_steps(driver, together=False)
    insn, _, image = finished(driver)
    proven(insn, image)
    driver = Driver(DEFAULT)
    many_steps(driver, together=True)  # tokens are due before compute is heard of
    with pytest.raises(VtaError, match="up to 300 tokens wait between LOAD and COMPUTE"):
        driver.finish()


def test_buffers_remember_what_they_hold():
    buffer = Buffer("inp", 10, 4, 2)
    assert buffer.fill("a")
    first = buffer.base
    assert buffer.fill("b")
    assert buffer.base != first
    assert not buffer.fill("a")
    assert buffer.base == first
    assert buffer.fill("c")  # takes the place of b, used longest ago
    assert not buffer.fill("a")
    assert buffer.fill("b")


def test_stores_are_of_the_last_operation():
    insn, _, image = finished(pipeline(3, 1))
    stream = proven(insn, image)
    assert sum(isinstance(i, Store) for i in stream) == 3


def test_two_places_hide_loads():
    """VTA_ISA, section 8: 16 times 16 inp tiles, 4 wgt tiles and 256 tile operations."""
    cycles = {}
    for versions in (1, 2):
        driver = Driver(DEFAULT)
        x = driver.dram("x", Memory.INP, 256)
        w = driver.dram("w", Memory.WGT, 64, constant=True)
        inp, wgt = (
            driver.buffers[driver.buffer(memory, size, versions)]
            for memory, size in ((Memory.INP, 16), (Memory.WGT, 4))
        )
        for i in range(16):
            inp.fill(i)
            wgt.fill(i)
            driver.load(Memory.INP, inp.base, x, 16 * i, [(16, 1)])
            driver.load(Memory.WGT, wgt.base, w, 4 * i, [(4, 1)])
            loops = [Loop(4, 0, 0, 0), Loop(16, 4, 1, 0), Loop(4, 1, 0, 1)]
            driver.gemm((0, inp.base, wgt.base), loops)
        cycles[versions] = predict(decode_stream(driver.finish()[0])).cycles
    assert cycles[1] >= 1.6 * cycles[2]
