"""LookupFFN's costs: every FLOP of Tables 1 to 4, Table 6's rates, simulated caches, refusals."""

from __future__ import annotations

from collections import OrderedDict

import numpy as np
import pytest

from tvmstruct.caches import L1, L2, L3, MEMORY, Caches, host_caches, parse_caches
from tvmstruct.energy import Energy, Traffic, at, from_miss_rates, operands
from tvmstruct.errors import InputError
from tvmstruct.families import bh4
from tvmstruct.lookup import Lookup
from tvmstruct.lookup_cost import (
    LookupSize,
    Projection,
    Walk,
    dense_traffic,
    distinct_rows,
    lookup_cost,
)
from tvmstruct.ops import Dense

CACHES = Caches(l1=32 << 10, l2=1 << 20, l3=32 << 20)
COST = {"n_in": 512, "n_out": 512}


def size(h: int = 128, tau: int = 8, d: int = 512, block: int = 64, **more) -> LookupSize:
    projection = Projection.bh4(d, h * tau, block)
    return LookupSize(n_in=d, n_out=d, h=h, tau=tau, projection=projection, **more)


@pytest.mark.parametrize(
    ("row", "printed"),
    [
        ({"h": 256}, "1.38"),  # Table 1, and Table 3 in the middle
        ({"h": 128}, "0.69"),
        ({"h": 64}, "0.35"),
        ({"h": 32}, "0.31"),
        ({"h": 170, "tau": 9, "d": 768}, "1.39"),  # Table 2
        ({"h": 256, "tau": 4}, "0.82"),  # Table 4
    ],
)
def test_mflop_of_a_token_are_those_printed(row, printed):
    assert f"{size(**row).flops / 1e6:.2f}" == printed


@pytest.mark.parametrize(
    ("row", "hashed", "gathered"),
    [
        ({"block": 64}, "0.56", "0.13"),  # Table 3, top
        ({"block": 32}, "0.30", "0.13"),
        ({"block": 16}, "0.17", "0.13"),
        ({"h": 64, "tau": 4}, "0.28", "0.07"),  # and bottom
        ({"h": 32, "tau": 8}, "0.28", "0.03"),
        ({"h": 20, "tau": 13}, "0.28", "0.02"),
    ],
)
def test_mflop_of_hash_and_gather_are_those_of_table_3(row, hashed, gathered):
    found = size(**row)
    assert (f"{found.hash_flops / 1e6:.2f}", f"{found.gather_flops / 1e6:.2f}") == (
        hashed,
        gathered,
    )


def test_a_dense_hash_and_the_dense_block_are_those_printed():
    dense = LookupSize(h=128, tau=8, projection=Projection.dense(512, 1024), **COST)
    assert f"{dense.hash_flops / 1e6:.2f}" == "1.05"
    assert dense.hash_flops / dense.flops == pytest.approx(0.89, abs=0.005)
    assert f"{2 * size().dense_macs / 1e6:.2f}" == "4.19"
    assert f"{2 * size(170, 9, 768).dense_macs / 1e6:.2f}" == "9.44"


def test_a_layer_is_counted_as_its_operator_counts_itself():
    rng = np.random.default_rng(0)
    blocks = rng.normal(size=(2, 4, 2, 8, 8))
    layer = Lookup(bh4(blocks, 13, 24), rng.normal(size=(6, 16, 11)))
    found = LookupSize.of(layer, item=2)
    assert found.projection.params == blocks.size
    formula = Projection.bh4(13, 24, 8)
    assert formula.params == blocks.size
    own = 4 * 13  # the mix with the repeated features: a scale for each at most
    assert formula.flops <= found.projection.flops <= formula.flops + 4 * own
    assert found.table_bytes == layer.tables.size * 2
    assert found.gather_flops == 2 * 6 * 11
    assert LookupSize.of(Lookup(Dense(np.ones((5, 4))), np.ones((2, 4, 3)))).hash_flops == 40


def test_more_memory_than_dense_is_said():
    cost = lookup_cost(size(), 32768, CACHES)
    assert cost.stored == 128 * 256 * 512 * 4 + 4 * 2 * 4 * 512 * 64
    assert cost.dense_stored == 2 * 512 * 2048 * 4
    text = "\n".join(cost.lines())
    assert "8.1 times the memory of the dense block's 8.4 MB" in text
    assert "0.69 MFLOP a token (hash 0.56, gather 0.13); dense 4.19" in text
    assert "tables in memory" in text
    small = LookupSize(h=2, tau=2, projection=Projection.dense(512, 4), **COST)
    assert "times less than the dense block's" in "\n".join(lookup_cost(small, 1, CACHES).lines())


def test_rates_of_table_6_agree_with_each_other_and_with_the_gather():
    """Bandwidths of L1 and LLC times the time are the bytes that the miss rates leave."""
    for seconds, first, last, l1, llc in (
        (0.100, 0.1187, 0.6956, 79.7e9, 9.5e9),
        (0.035, 0.2268, 0.1277, 231.5e9, 52.5e9),
    ):
        found = from_miss_rates(l1 * seconds, first, last)
        assert (found[L3] + found[MEMORY]) / seconds == pytest.approx(llc, rel=0.01)
        assert found.total == pytest.approx(32768 * 128 * 512 * 4, rel=0.08)


def test_energy_is_the_papers_constants_times_words():
    traffic = at(L1, 80) + at(L3, 8) + at(MEMORY, 16)
    low, high = 11 * 14 + 2 * 300, 11 * 14 + 2 * 450
    assert traffic.energy.low == pytest.approx(low * 1e-12)
    assert traffic.energy.high == pytest.approx(high * 1e-12)
    assert str(Energy(2e-6, 3e-6)) == "2 to 3 uJ"
    assert str(Energy(5e-4, 5e-4)) == "500 uJ"
    assert operands(1024)[L1] == 1024 * 4 * (1 / 8 + 1 / 32)


def simulate(capacity: int, rows: int, reads: int) -> float:
    """Return the hit rate of a cache of ``capacity`` rows that drops what was used longest ago."""
    rng, held, hits = np.random.default_rng(1), OrderedDict(), 0
    for i, row in enumerate(rng.integers(0, rows, 2 * reads).tolist()):
        if row in held:
            held.move_to_end(row)
            hits += i >= reads
        else:
            held[row] = None
            if len(held) > capacity:
                held.popitem(last=False)
    return hits / reads


def test_shares_of_uniform_reads_are_those_of_a_simulated_cache():
    caches = Caches(l1=128, l2=512, l3=640)
    shares = caches.shares(1024)
    assert sum(shares.values()) == pytest.approx(1)
    assert shares[L1] == pytest.approx(simulate(128, 1024, 40_000), abs=0.01)
    assert shares[L1] + shares[L2] == pytest.approx(simulate(512, 1024, 40_000), abs=0.01)
    assert shares[MEMORY] == pytest.approx(1 - simulate(640, 1024, 40_000), abs=0.01)
    assert caches.shares(100) == {L1: 1, L2: 0, L3: 0, MEMORY: 0}


@pytest.mark.parametrize("draws", [1, 37, 3000])
def test_distinct_rows_are_those_drawn(draws):
    rng = np.random.default_rng(2)
    found = [len(set(rng.integers(0, 512, draws).tolist())) for _ in range(300)]
    assert distinct_rows(9, draws) == pytest.approx(np.mean(found), rel=0.01)


def test_slices_read_tables_from_memory_once_for_a_chunk():
    found = lookup_cost(size(), 32768, CACHES)
    rows = 32768 * 128 * 512 * 4
    assert found.gather[MEMORY] == pytest.approx(
        8 * 128 * 256 * 512 * 4 + 32768 * 512 * 4, rel=1e-3
    )
    assert found.gather[L2] >= rows  # a slice of 16 tables: 512 KiB
    whole = lookup_cost(size(), 32768, CACHES, Walk(order="row-major")).gather
    assert whole[MEMORY] - 32768 * 512 * 4 == pytest.approx(rows / 2, rel=1e-3)  # 64 of 32 MiB
    assert (
        found.energy.high < lookup_cost(size(), 32768, CACHES, Walk(order="row-major")).energy.low
    )


def test_few_tokens_touch_few_rows():
    found = lookup_cost(size(), 1, CACHES, Walk())
    assert found.gather[MEMORY] == pytest.approx(128 * 512 * 4)


def test_tables_in_cache_read_nothing_from_memory():
    small = size(h=8, tau=4)
    assert lookup_cost(small, 64, CACHES).traffic[MEMORY] == 0
    dense = dense_traffic(small, 64, CACHES)
    assert dense[L3] == 2 * 512 * 2048 * 4
    assert dense[MEMORY] == 0


def test_private_caches_of_several_threads_hold_shared_work_together():
    one, four = Caches(), Caches(threads=4)
    assert (one.holding(3 << 20), four.holding(3 << 20, split=True)) == (L3, L2)
    assert four.holding(3 << 20) == L3


def test_caches_are_read_from_text_and_from_linux(tmp_path):
    assert parse_caches("48K,2M,32M", 2) == Caches(48 << 10, 2 << 20, 32 << 20, 2)
    for i, (level, kind, room) in enumerate(
        [("1", "Data", "48K"), ("1", "Instruction", "64K"), ("2", "Unified", "2048K")]
    ):
        folder = tmp_path / f"index{i}"
        folder.mkdir()
        for name, text in (("level", level), ("type", kind), ("size", room)):
            (folder / name).write_text(text + "\n")
    assert host_caches(3, tmp_path) == Caches(48 << 10, 2 << 20, Caches.l3, 3)
    assert host_caches(1, tmp_path / "none") == Caches()
    assert str(Caches(512, 2 << 20, 32 << 20, 2)) == (
        "512 B L1 and 2 MiB L2 a core, 32 MiB L3, 2 threads"
    )


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: size(tau=21), "at most 20 bits"),
        (lambda: size(flips=9), "9 flips"),
        (lambda: size(h=0), "want sizes of 1 or more"),
        (lambda: Projection.bh4(512, 8, 48), "block size 48 does not divide 512"),
        (lambda: lookup_cost(size(), 0, CACHES), "tokens is 0"),
        (lambda: Walk(order="random"), "want an order of table-major, row-major"),
        (lambda: Caches(l1=2, l2=1), "want sizes above 0 that grow"),
        (lambda: parse_caches("48K,2M"), "want three sizes such as"),
        (lambda: parse_caches("48K,2M,x"), "want three sizes such as"),
    ],
)
def test_refusals_name_the_values(call, message):
    with pytest.raises(InputError, match=message):
        call()


def test_traffic_adds_up():
    assert (at(L1, 3) + at(L1, 4) + at(MEMORY, 1)).bytes == {L1: 7, MEMORY: 1}
    assert Traffic().energy == Energy()
