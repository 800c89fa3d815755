"""The functional simulator against the reference programs and a second implementation."""

from dataclasses import replace

import numpy as np
import pytest

from tests.vta import reference
from tests.vta.golden_programs import golden_programs
from tvmstruct.errors import VtaConfigError, VtaEncodingError, VtaRunError
from tvmstruct.vta.assembly import assemble
from tvmstruct.vta.config import DEFAULT, Memory
from tvmstruct.vta.isa import Alu, AluOp, Gemm, Uop, encode_stream, encode_uops
from tvmstruct.vta.simulator import Machine, simulate

BASE = 0x1000
WIDE = replace(
    DEFAULT, log_batch=1, log_block=3, log_wgt_width=2, log_inp_width=2, log_wgt_buff_size=14
)


@pytest.mark.parametrize("golden", golden_programs(), ids=lambda g: g.name)
def test_reference_programs(golden) -> None:
    run = simulate(golden.insn, golden.before, golden.base)
    assert run.dram.tobytes() == golden.after
    assert run.counters.to_dict() == golden.counters


def ready(config, rng) -> tuple[Machine, dict]:
    """Return a machine with random contents, and copies of them as the reference wants them."""
    machine = Machine(config)
    deep = min(config.depth(m) for m in (Memory.ACC, Memory.INP, Memory.WGT))
    machine.uops[:40] = rng.integers(0, min(16, deep), (40, 3))
    for array in (machine.inp, machine.wgt):
        array[...] = rng.integers(-128, 128, array.shape)
    machine.acc[...] = rng.integers(-(2**31), 2**31, machine.acc.shape)
    held = {"uops": machine.uops.copy(), "acc": machine.acc.copy(), "inp": machine.inp.copy()}
    return machine, held | {"wgt": machine.wgt.transpose(0, 2, 1).copy()}


def launch(machine: Machine, *instructions) -> None:
    program = [*instructions, *assemble("finish")]
    machine.launch(encode_stream(program, machine.config), bytes(64), BASE, strict=False)


@pytest.mark.parametrize(
    "config", [DEFAULT, WIDE, replace(DEFAULT, log_block=6)], ids=lambda c: c.name
)
@pytest.mark.parametrize("repeated", [False, True], ids=["distinct", "same dst"])
def test_gemm(config, repeated: bool, rng) -> None:
    machine, held = ready(config, rng)
    factor = 0 if repeated else 3
    gemm = Gemm(
        uop_bgn=3, uop_end=36, iter_out=2, iter_in=3, dst_factor_out=factor, dst_factor_in=0,
        src_factor_out=1, src_factor_in=5, wgt_factor_out=2, wgt_factor_in=1,
    )  # fmt: skip
    if config.log_block == 6:
        machine.uops[:40, 2] = held["uops"][:40, 2] = 0
    launch(machine, gemm)
    reference.gemm(gemm, held["uops"], held["acc"], held["inp"], held["wgt"])
    np.testing.assert_array_equal(machine.acc, held["acc"])


def test_gemm_reset(rng) -> None:
    machine, held = ready(DEFAULT, rng)
    gemm = Gemm(reset=True, uop_end=5, iter_out=3, iter_in=2, dst_factor_out=17, dst_factor_in=40)
    launch(machine, gemm)
    reference.gemm(gemm, held["uops"], held["acc"], held["inp"], held["wgt"])
    np.testing.assert_array_equal(machine.acc, held["acc"])


@pytest.mark.parametrize("op", AluOp)
@pytest.mark.parametrize("imm", [None, -32768, -33, -3, 0, 7, 31, 40])
def test_alu(op: AluOp, imm: int | None, rng) -> None:
    machine, held = ready(DEFAULT, rng)
    loops = {"uop_end": 9, "iter_out": 2, "iter_in": 3, "dst_factor_out": 1, "src_factor_in": 2}
    alu = Alu(alu_opcode=op, use_imm=imm is not None, imm=imm or 0, **loops)
    launch(machine, alu)
    reference.alu(alu, held["uops"], held["acc"])
    np.testing.assert_array_equal(machine.acc, held["acc"])


def test_alu_reads_what_the_operation_before_wrote() -> None:
    machine = Machine()
    machine.acc[0], machine.uops[:8] = 1, [[i + 1, i, 0] for i in range(8)]
    launch(machine, Alu(alu_opcode=AluOp.ADD, uop_end=8))
    assert machine.acc[:9, 0, 0].tolist() == [1] * 9  # 0 + 1, from tile to tile


def test_sums_wrap() -> None:
    machine = Machine()
    machine.acc[...], machine.inp[...], machine.wgt[...] = 2**31 - 1, -128, -128
    launch(machine, Gemm())
    assert (machine.acc[0] == -(2**31) + 16 * 128 * 128 - 1).all()


def image(config, **parts: bytes) -> bytes:
    """Return 16 KiB with parts at pages 0, 1, 2 and so on."""
    data = bytearray(4 * 4096)
    for page, part in enumerate(parts.values()):
        data[page * 4096 : page * 4096 + len(part)] = part
    return bytes(data)


def test_load_and_store_of_a_narrow_design(rng) -> None:
    # 4-bit inputs: two elements a byte, low half first; stores keep the low 4 bits
    values = rng.integers(-8, 8, (3, 16))  # 3 tiles of 2 x 8
    packed = bytes(int(a & 15) | int(b & 15) << 4 for a, b in values.reshape(-1, 2))
    acc = rng.integers(-1000, 1000, (4, 16)).astype("<i4")
    uop = encode_uops([Uop()], WIDE)
    data = image(WIDE, inp=packed, acc=acc.tobytes(), uop=uop)
    tile = {m: WIDE.tile_bytes(m) for m in Memory}
    assert (tile[Memory.INP], tile[Memory.OUT]) == (8, 8)
    program = assemble(
        f"load.inp sram=5 dram={BASE // 8} rows=1x3 stride=3 pad=0,0,1,0 push=next\n"
        f"load.uop dram={(BASE + 8192) // 4} rows=1x1\n"
        f"load.acc sram=2 dram={(BASE + 4096) // tile[Memory.ACC]} rows=2x2 stride=2\n"
        "alu.add uop=0:1 iter=1x4 dst=0,1 src=0,1 imm=0 pop=prev push=next\n"
        f"store.out sram=2 dram={(BASE + 12288) // 8} rows=2x2 stride=3 pop=prev push=prev\n"
        "finish pop=next",
        WIDE,
    )
    machine = Machine(WIDE)
    run = machine.launch(program, data, BASE, strict=False)
    np.testing.assert_array_equal(machine.inp[6:9].reshape(3, 16), values)
    assert not machine.inp[5].any()
    out = bytes(int(a & 15) | int(b & 15) << 4 for a, b in acc.reshape(-1, 2))
    stored = run.dram.tobytes()[12288:]
    assert stored[:16] == out[:16]
    assert stored[24:40] == out[16:]
    assert stored[16:24] == bytes(8)
    assert run.counters.inp_load_nbytes == 24
    assert run.counters.acc_load_nbytes == 256
    assert run.counters.out_store_nbytes == 32


def test_acc8_widens(rng) -> None:
    values = rng.integers(-128, 128, (2, 16)).astype(np.int8)
    data = image(DEFAULT, acc=values.tobytes())
    machine = Machine()
    program = assemble(f"load.acc8 sram=7 dram={BASE // 16} rows=1x2 stride=2\nfinish")
    run = machine.launch(program, data, BASE, strict=False)
    np.testing.assert_array_equal(machine.acc[7:9, 0], values)
    assert run.counters.acc_load_nbytes == 128


def test_rows_that_overlap_are_stored_in_order() -> None:
    machine = Machine()
    machine.acc[:4, 0] = np.arange(4)[:, None]
    run = machine.launch(
        assemble(f"store.out dram={BASE // 16} rows=2x2 stride=1 push=prev\nfinish pop=next"),
        image(DEFAULT), BASE, strict=False,
    )  # fmt: skip
    assert run.dram[:64:16].tolist() == [0, 2, 3, 0]


def test_scratchpads_survive_a_launch(rng) -> None:
    acc = rng.integers(-100, 100, (1, 16)).astype("<i4")
    data = image(DEFAULT, acc=acc.tobytes(), uop=encode_uops([Uop()]))
    machine = Machine()
    first = f"load.acc dram={BASE // 64} rows=1x1\nload.uop dram={(BASE + 4096) // 4} rows=1x1\n"
    machine.launch(assemble(first + "finish"), data, BASE)
    second = (
        "alu.add imm=3 push=next\n"
        f"store.out dram={(BASE + 8192) // 16} rows=1x1 pop=prev push=prev\nfinish pop=next"
    )
    run = machine.launch(assemble(second), data, BASE)
    assert run.dram[8192:8208].view(np.int8).tolist() == (acc[0] + 3).tolist()
    with pytest.raises(VtaRunError, match=r"unwritten: .*uop tile 0 was never written"):
        simulate(assemble(second), data, BASE)


def test_tokens_survive_a_launch_that_is_not_strict() -> None:
    machine = Machine()
    machine.launch(assemble("load.inp push=next\nfinish"), bytes(64), BASE, strict=False)
    machine.launch(assemble("finish pop=prev"), bytes(64), BASE)
    with pytest.raises(VtaRunError, match="deadlock"):
        machine.launch(assemble("finish pop=prev"), bytes(64), BASE)


def test_the_given_image_is_not_changed() -> None:
    data = np.full(64, 7, np.uint8)
    store = f"store.out dram={BASE // 16} rows=1x1 push=prev\nfinish pop=next"
    run = simulate(assemble(store), data, BASE, strict=False)
    assert not run.dram[:16].any()
    assert (data == 7).all()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("load.inp sram=2047 dram=0x100 rows=1x2", "sram-range: instruction 0 .* inp tile 2048"),
        ("load.acc8 sram=2048 dram=0x100 rows=1x1", "sram-range: .* acc tile 2048; there are 2048"),
        ("store.out sram=2047 dram=0x100 rows=1x2", "sram-range: .* out tile 2048"),
        ("load.inp rows=65535x65535 pad=15,15,15,15", "sram-range"),
        ("gemm uop=8191:8193", "sram-range: .* runs uop 8192 of 8192"),
        ("gemm iter=3x2 dst=1000,100", "sram-range: .* acc tile 2100; there are 2048"),
        ("gemm iter=1x3 wgt=0,1000", "sram-range: .* wgt tile 2000; there are 1024"),
        ("alu.add imm=1 iter=1x3 src=0,2000", "sram-range: .* acc tile 4000"),
        ("load.inp dram=0xff rows=1x1", "dram-range: .* touches 0xff0 to 0x1000; the image has"),
        ("store.out dram=0x4ff rows=1x2 push=prev", "dram-range: .* touches 0x4ff0 to 0x5010"),
        ("load.acc dram=0xffffffff rows=1x1", "dram-range: .* addresses have 32 bits"),
        ("load.out dram=0x100 rows=1x1", "memory: .* nothing can be loaded into out"),
        ("store.acc dram=0x40 rows=1x1", "memory: .* only out can be stored"),
    ],
)
def test_out_of_range(text: str, message: str) -> None:
    with pytest.raises(VtaRunError, match=message):
        simulate(assemble(text + "\nfinish"), image(DEFAULT), BASE, strict=False)


@pytest.mark.parametrize(
    ("base", "message"), [(0, "not page 0"), (100, "lies at 0x64"), (2**32 - 4096, "32 bits")]
)
def test_bad_base(base: int, message: str) -> None:
    with pytest.raises(VtaRunError, match=f"dram-base: .*{message}"):
        simulate(assemble("finish"), bytes(8192), base)


def test_too_much_work_is_refused() -> None:
    program = assemble("gemm uop=0:8192 iter=16383x16383\nfinish")
    with pytest.raises(VtaRunError, match="limit: the program has 2198754828288 tile operations"):
        simulate(program, bytes(64), BASE, strict=False)
    with pytest.raises(VtaRunError, match="over 3; the largest is instruction 0"):
        simulate(assemble("gemm iter=2x2\nfinish"), bytes(64), BASE, limit=3)


def test_what_cannot_be_simulated() -> None:
    with pytest.raises(VtaConfigError, match="accumulators of 16 bits; want 32"):
        Machine(replace(DEFAULT, log_acc_width=4, log_acc_buff_size=16))
    with pytest.raises(VtaEncodingError, match="bit 63 is set"):
        simulate((1 << 63).to_bytes(16, "little"), bytes(64), BASE)
