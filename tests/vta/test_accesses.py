"""Sets of tiles and the distance rule, against going through every tile operation."""

import random

import numpy as np
import pytest

from tests.vta import reference
from tvmstruct.vta.accesses import Rows, accesses_of, tile_range, tiles
from tvmstruct.vta.config import DEFAULT, Memory
from tvmstruct.vta.isa import Alu, AluOp, Gemm, Load, Store
from tvmstruct.vta.rules import Level, broken


def loops(rng: random.Random, limit: int) -> dict[str, int]:
    """Return small random loops; often factors are 0 or equal."""
    first, factors = rng.randrange(4), [0, 0, 1, 1, 2, 3, limit]
    names = ("dst_factor_out", "dst_factor_in", "src_factor_out", "src_factor_in")
    return {
        "uop_bgn": first,
        "uop_end": first + rng.randrange(1, 4),
        "iter_out": rng.randrange(1, 5),
        "iter_in": rng.randrange(1, 5),
        **{name: rng.choice(factors) for name in names},
    }


def members(ops: list, column: int) -> set[int]:
    return {op[column] for op in ops}


@pytest.mark.parametrize("seed", range(40))
def test_tiles_of_gemm(seed: int) -> None:
    rng = random.Random(seed)
    uops = np.array([[rng.randrange(9) for _ in range(3)] for _ in range(8)], np.int32)
    gemm = Gemm(**loops(rng, 20), wgt_factor_out=rng.randrange(3), wgt_factor_in=rng.randrange(9))
    touched, ops = accesses_of(0, gemm, uops, DEFAULT), list(reference.tile_ops(gemm, uops))
    assert set(tiles(touched.writes[Memory.ACC])) == members(ops, 0)
    for column, memory in enumerate((Memory.ACC, Memory.INP, Memory.WGT)):
        assert set(tiles(touched.reads[memory])) == members(ops, column)
    assert touched.reads[Memory.UOP] == tile_range(gemm.uop_bgn, gemm.uop_end - gemm.uop_bgn)


def test_distance_rule_finds_what_going_through_finds() -> None:
    rng, found = random.Random(1), [0, 0]
    for _ in range(600):
        uops = np.array([[rng.randrange(4), rng.randrange(4), 0] for _ in range(8)], np.int32)
        use_imm = rng.random() < 0.3
        alu = Alu(alu_opcode=AluOp.ADD, use_imm=use_imm, **loops(rng, 5))
        ops = list(reference.tile_ops(alu, uops))
        reads = [op[0] if use_imm else op[1] for op in ops]
        expected = any(later == ops[n][0] for n, later in enumerate(reads[1:]))
        words = uops[alu.uop_bgn : alu.uop_end].tobytes()
        rules = [name for name, _ in broken(Level.RTL, alu, words, DEFAULT)]
        assert ("alu-distance" in rules) == expected
        found[expected] += 1
    assert min(found) > 100


def test_distance_rule_of_long_loops_is_quick() -> None:
    words = np.array([[0, 1, 0], [5, 5, 0]], np.int32).tobytes()
    alu = Alu(alu_opcode=AluOp.ADD, uop_end=2, iter_out=16383, iter_in=16383)
    assert broken(Level.RTL, alu, words, DEFAULT) == ()


@pytest.mark.parametrize("seed", range(30))
def test_rows_overlap(seed: int) -> None:
    rng = random.Random(seed)

    def draw() -> tuple[Rows, set[int]]:
        rows = Rows(rng.randrange(40), rng.randrange(1, 5), rng.randrange(1, 7), rng.randrange(12))
        starts = range(rows.start, rows.start + 1) if not rows.pitch else None
        starts = starts or range(rows.start, rows.start + rows.count * rows.pitch, rows.pitch)
        return rows, {start + i for start in starts for i in range(rows.size)}

    for _ in range(30):
        (a, mine), (b, theirs) = draw(), draw()
        assert a.overlaps(b) == bool(mine & theirs), (a, b)
        assert max(mine) + 1 == a.end


def test_tiles_of_transfers() -> None:
    uops = np.zeros((8192, 3), np.int32)
    load = Load(memory=Memory.ACC8, sram_base=7, dram_base=3, y_size=2, x_size=3, x_stride=9,
                y_pad_0=1, x_pad_1=2)  # fmt: skip
    touched = accesses_of(0, load, uops, DEFAULT)
    assert touched.writes == {Memory.ACC: tile_range(7, 3 * 5)}
    assert touched.dram == Rows(48, 2, 48, 144)
    store = Store(sram_base=9, dram_base=2, y_size=3, x_size=4, x_stride=5)
    touched = accesses_of(0, store, uops, DEFAULT)
    assert (touched.reads, touched.writes) == ({Memory.OUT: tile_range(9, 12)}, {})
    assert touched.dram == Rows(32, 3, 64, 80)
