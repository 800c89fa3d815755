"""Every rule of portable programs: one that breaks it and one that just does not."""

from pathlib import Path

import numpy as np
import pytest

from tests.vta.golden_programs import golden_programs
from tvmstruct.errors import VtaRunError
from tvmstruct.vta.assembly import assemble
from tvmstruct.vta.isa import Uop, encode_uops
from tvmstruct.vta.portable import RULES, STATE_RULES, Level, check
from tvmstruct.vta.simulator import simulate

BASE = 0x1000
# uops at page 0: dst, src, wgt
UOPS = [Uop(0, 0), Uop(1, 1), Uop(2, 2), Uop(1, 0), Uop(2, 1), Uop(0, 1), Uop(0, 0, 3), Uop(0, 0)]
IMAGE = encode_uops(UOPS).ljust(4 * 4096, b"\0")
# everything that programs below read is written first, and outputs are fresh
PROLOGUE = """
load.inp dram=0x100 rows=1x64 stride=64
load.wgt dram=0x10 rows=1x16 stride=16 push=next
load.uop dram=0x400 rows=1x8 stride=8 pop=prev
load.acc dram=0x40 rows=1x64 stride=64
alu.add uop=0:1 iter=1x64 dst=0,1 src=0,1 imm=0
"""
EPILOGUE = "\nfinish"


def rules(text: str, level: Level = Level.RTL, *, prologue: str = PROLOGUE) -> list[str]:
    return [v.rule for v in check(assemble(prologue + text + EPILOGUE), IMAGE, BASE, level=level)]


BROKEN = [
    ("zero-count", "gemm iter=0x1", "gemm iter=1x1"),
    ("zero-count", "alu.add uop=3:3 imm=0", "alu.add uop=0:1 imm=0"),
    ("zero-count", "load.acc rows=0x1 pad=1,0,0,0", "load.acc rows=0x0 pad=1,0,0,0"),
    ("acc8", "load.acc8 dram=0x100 rows=1x1", "load.acc dram=0x40 rows=1x1"),
    ("mul", "alu.mul imm=2", "alu.add imm=2"),
    ("immediate-source", "alu.add uop=3:4 imm=1", "alu.add uop=3:4"),
    ("immediate-source", "alu.add iter=1x2 dst=0,3 src=0,2 imm=1", "alu.add dst=0,3 imm=1"),
    (
        "immediate-source",
        "alu.add iter=2x1 dst=3,0 imm=1",
        "alu.add iter=2x1 dst=3,0 src=3,0 imm=1",
    ),
    ("alu-distance", "alu.add uop=3:5", "alu.add uop=4:6"),  # 2 <- 1 reads 1 <- 0
    ("alu-distance", "alu.add iter=1x2 imm=1", "alu.add iter=1x2 dst=0,1 src=0,1 imm=1"),
    (
        "alu-distance",
        "alu.add uop=0:3 iter=1x2 dst=0,2 src=0,2 imm=1",
        "alu.add uop=0:3 iter=1x2 dst=0,3 src=0,3 imm=1",
    ),
    (
        "alu-distance",
        "alu.add uop=7:8 iter=2x3 dst=2,1 src=2,1 imm=1",
        "alu.add uop=7:8 iter=2x3 dst=3,1 src=3,1 imm=1",
    ),
    (
        "alu-distance",
        "alu.add uop=3:4 iter=1x4 dst=0,1 src=0,1",
        "alu.add uop=3:4 iter=1x4 dst=0,2 src=0,2",
    ),
    (
        "alu-distance",
        "alu.add uop=3:4 iter=3x2 dst=2,3 src=4,3",
        "alu.add uop=3:4 iter=3x2 dst=2,3 src=2,3",
    ),
    ("shift-register", "alu.shr uop=3:4 unused_imm=-1", "alu.shr uop=3:4 unused_imm=1"),
    ("shift-register", "alu.shr uop=0:1", "alu.shr uop=3:4"),
    (
        "uop-depth",
        "load.uop sram=2041 dram=0x400 rows=1x8",
        "load.uop sram=2040 dram=0x400 rows=1x8",
    ),
    ("alu-uop-wgt", "alu.add uop=6:7 imm=0", "alu.add uop=7:8 imm=0"),
    ("unwritten", "gemm iter=1x65 src=0,1", "gemm iter=1x64 src=0,1"),
    ("unwritten", "gemm iter=1x17 wgt=0,1", "gemm iter=1x16 wgt=0,1"),
    ("unwritten", "gemm uop=7:9", "gemm uop=7:8"),
    ("unwritten", "alu.add iter=1x65 dst=0,1 src=0,1 imm=0", "gemm.reset iter=1x65 dst=0,1"),
    ("token-leftover", "load.inp push=next", "load.inp push=next\nload.uop pop=prev"),
    ("dram-range", "load.acc dram=0x13f rows=1x2", "load.acc dram=0x13e rows=1x2"),
    ("sram-range", "alu.add iter=1x2049 dst=0,1 src=0,1 imm=0", "gemm.reset iter=1x2048 dst=0,1"),
]


@pytest.mark.parametrize(("rule", "bad", "good"), BROKEN)
def test_rule(rule: str, bad: str, good: str) -> None:
    assert rules(bad)[0] == rule
    assert rule not in rules(good)


def store(line: str, *, before: str = "") -> str:
    """Return a program whose STORE is ordered after all else and before FINISH."""
    return f"{before}\nload.uop push=next\n{line} pop=prev push=prev\nload.uop pop=next"


@pytest.mark.parametrize(
    ("rule", "bad", "good"),
    [
        ("memory", store("store.acc dram=0x40 rows=1x1"), store("store.out dram=0x400 rows=1x1")),
        (
            "store-pads",
            store("store.out dram=0x400 rows=1x1 pad=0,0,0,1"),
            store("store.out dram=0x400 rows=1x1"),
        ),
        (
            "zero-count",
            store("store.out dram=0x400 rows=0x1"),
            store("store.out dram=0x400 rows=1x1"),
        ),
        (
            "stale-out",
            store("store.out dram=0x400 rows=1x4", before="load.acc sram=3 dram=0x40 rows=1x1"),
            store("store.out dram=0x400 rows=1x3", before="load.acc sram=3 dram=0x40 rows=1x1"),
        ),
        (
            "stale-out",
            store("store.out dram=0x400 rows=1x4", before="gemm.reset iter=1x4 dst=0,1"),
            store(
                "store.out dram=0x400 rows=1x4",
                before="gemm.reset iter=1x4 dst=0,1\ngemm iter=1x4 dst=0,1",
            ),
        ),
        (
            "uop-stored",
            store("store.out dram=0x101 rows=1x1") + "\nload.uop dram=0x404 rows=1x1",
            store("store.out dram=0x101 rows=1x1") + "\nload.uop dram=0x400 rows=1x4",
        ),
    ],
)
def test_rule_of_stores(rule: str, bad: str, good: str) -> None:
    assert rules(bad)[0] == rule
    assert rules(good) == []


@pytest.mark.parametrize(
    ("rule", "bad", "good"),
    [
        ("shift-range", "alu.shr imm=16", "alu.shr imm=15"),
        ("shift-range", "alu.shr imm=-17", "alu.shr imm=-16"),
        ("gemm-distance", "gemm uop=5:8", "gemm uop=0:3"),
        ("gemm-distance", "gemm uop=2:5", "gemm.reset uop=2:5"),
        (
            "weight-pads",
            "load.wgt dram=0x10 rows=1x1 pad=0,0,0,1 push=next\nload.uop pop=prev",
            "load.wgt dram=0x10 rows=1x1 push=next\nload.uop pop=prev",
        ),
        ("uop-rows", "load.uop dram=0x400 rows=2x2 stride=2", "load.uop dram=0x400 rows=1x4"),
    ],
)
def test_rule_of_hls(rule: str, bad: str, good: str) -> None:
    assert rules(bad) == []
    assert rule in rules(bad, Level.HLS)
    assert rule not in rules(good, Level.HLS)


RACES = [
    ("load.inp dram=0x100 rows=1x1 push=next\ngemm\nload.uop pop=prev", "inp tile 0"),
    ("load.wgt sram=3 dram=0x10 rows=1x1 push=next\ngemm uop=6:7\nload.uop pop=prev", "wgt tile 3"),
    (
        "load.uop push=next\nstore.out dram=0x400 rows=1x2 pop=prev push=prev\n"
        "gemm uop=1:2\nload.uop pop=next",
        "acc tile 1",
    ),
    (  # what is stored is loaded again without a token
        "load.uop push=next\nstore.out dram=0x140 rows=1x2 stride=2 pop=prev push=prev\n"
        "load.inp sram=100 dram=0x141 rows=1x1 stride=1 push=next\nload.uop pop=prev,next",
        "DRAM from 0x1410",
    ),
]


@pytest.mark.parametrize(("text", "what"), RACES, ids=[what for _, what in RACES])
def test_race(text: str, what: str) -> None:
    violations = check(assemble(PROLOGUE + text + EPILOGUE), IMAGE, BASE)
    assert [v.rule for v in violations] == ["race"]
    assert what in violations[0].message
    assert all(f"instruction {i} (" in violations[0].message for i in violations[0].instructions)


def test_tokens_order_what_would_race() -> None:
    ordered = "gemm push=prev\nload.inp dram=0x100 rows=1x1 pop=next push=next\ngemm pop=prev"
    assert rules(ordered) == []
    rows = "load.uop push=next\nstore.out dram=0x140 rows=2x1 stride=2 pop=prev push=prev\n"
    between = "load.inp sram=99 dram=0x141 rows=2x1 stride=2 push=next\nload.uop pop=prev,next"
    assert rules(rows + between) == []  # interleaved rows, no byte in common


def test_load_that_may_run_ahead_of_its_counter() -> None:
    pairs = "load.inp push=next\nload.uop pop=prev\n"
    assert rules(pairs * 253) == []
    assert "token-overflow" in rules(pairs * 256)


def test_finish_that_does_not_wait() -> None:
    text = "load.uop push=next\nstore.out dram=0x400 rows=1x1 pop=prev"
    assert rules(text) == ["finish-last"]
    violation = check(assemble(PROLOGUE + text + EPILOGUE), IMAGE, BASE)[0]
    assert "pop its token first" in violation.message


def test_broken_structure_is_the_only_violation() -> None:
    assert rules("gemm pop=next iter=0x0") == ["deadlock"]
    assert [v.rule for v in check(assemble("finish"), IMAGE, 12)] == ["dram-base"]


def test_amounts_of_register_shifts_are_checked_when_run() -> None:
    data = bytearray(IMAGE)
    data[4096:4160] = np.full(16, 5, "<i4").tobytes()  # acc tile 0: amounts
    load = "load.uop dram=0x400 rows=1x8\nload.acc dram=0x80 rows=1x2\n"
    program = assemble(load + "alu.shr uop=3:4\nfinish")
    assert check(program, bytes(data), BASE) == []
    simulate(program, bytes(data), BASE)
    for amount in (-1, 32):
        data[4100:4104] = int(amount).to_bytes(4, "little", signed=True)
        with pytest.raises(VtaRunError, match=r"shift-register: instruction 2 .* agree on 0 to 31"):
            simulate(program, bytes(data), BASE)
        simulate(program, bytes(data), BASE, strict=False)


def test_a_strict_run_names_the_rule_and_the_instruction() -> None:
    program = assemble(PROLOGUE + "alu.mul imm=3\nalu.mul imm=4" + EPILOGUE)
    with pytest.raises(VtaRunError, match=r"mul: instruction 5 .*\(1 more violations\)") as caught:
        simulate(program, IMAGE, BASE)
    assert (caught.value.rule, caught.value.instruction) == ("mul", 5)
    simulate(program, IMAGE, BASE, strict=False)


def test_every_rule_has_a_test() -> None:
    text = Path(__file__).read_text(encoding="utf-8")
    assert all(
        f'("{rule.name}"' in text or f'"{rule.name}",' in text for rule in (*RULES, *STATE_RULES)
    )


@pytest.mark.parametrize("golden", golden_programs(), ids=lambda g: g.name)
def test_reference_programs_are_portable_between_simulator_and_rtl(golden) -> None:
    assert check(golden.insn, golden.before, golden.base) == []
    # they were made for those two; HLS would differ only in these
    hls = {v.rule for v in check(golden.insn, golden.before, golden.base, level=Level.HLS)}
    assert hls <= {"shift-range", "gemm-distance"}
