"""Sums over a run that moves forwards, against sums from scratch."""

import random
from functools import reduce

import pytest

from tvmstruct.vta.accesses import Accesses, Rows
from tvmstruct.vta.config import DEFAULT, Memory
from tvmstruct.vta.windows import NOTHING, Footprint, Window, footprint


@pytest.mark.parametrize("seed", range(5))
def test_joined_equals_a_sum_from_scratch(seed: int) -> None:
    rng, items, start = random.Random(seed), [], 0
    window = Window(items)
    for n in range(200):
        if rng.random() < 0.6:
            items.append(Footprint(1 << n, 3 << n, (n, n + 9)))
        else:
            start = min(len(items), start + rng.choice([0, 0, 1, 3, 30]))
        assert window.joined(start) == reduce(Footprint.join, items[start:], NOTHING)


def test_conflicts() -> None:
    rows = Rows(0x1000, 2, 16, 64)
    store = footprint(Accesses({Memory.OUT: 0b110}, {}, rows), DEFAULT)
    load = footprint(Accesses({}, {Memory.INP: 0b110}, rows), DEFAULT)
    far = footprint(Accesses({}, {Memory.INP: 1}, Rows(0x2000, 1, 16, 16)), DEFAULT)
    change = footprint(Accesses({Memory.ACC: 8}, {Memory.ACC: 0b100}), DEFAULT)
    read = footprint(Accesses({Memory.INP: 0b010, Memory.WGT: 0b1}, {}), DEFAULT)
    assert store.may_conflict(load)  # the same bytes of DRAM
    assert not store.may_conflict(far)
    assert store.may_conflict(change)
    assert change.may_conflict(store)
    assert load.may_conflict(read)
    assert not far.may_conflict(read)
    assert not store.may_conflict(store)
