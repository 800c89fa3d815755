"""Streams that nobody wrote: a result or a named error, never a crash, never a hang."""

import random
from collections import Counter
from functools import cache

import numpy as np
import pytest

from tests.vta import fuzzing
from tests.vta.golden_programs import golden_programs
from tvmstruct.errors import VtaError
from tvmstruct.vta.dram import Dram
from tvmstruct.vta.isa import decode_stream
from tvmstruct.vta.queues import Order, order
from tvmstruct.vta.simulator import Launch, Machine, Run


@cache
def before(name: str) -> bytes:
    return next(g.before for g in golden_programs() if g.name == name)


def fuzz(seed: int, count: int) -> Counter:
    """Run ``count`` streams, strict and not; count how they end."""
    rng, ends = random.Random(seed), Counter()
    for _ in range(count):
        golden, data = fuzzing.stream(rng)
        dram = before(golden.name)
        strict = fuzzing.run(golden, data, dram, strict=True)
        loose = fuzzing.run(golden, data, dram, strict=False)
        if isinstance(strict, Run):
            assert isinstance(loose, Run)
            np.testing.assert_array_equal(strict.dram, loose.dram)
            np.testing.assert_array_equal(strict.dram, shuffled(golden, data, dram, rng))
        for mode, end in (("strict", strict), ("loose", loose)):
            ends[mode, getattr(end, "rule", type(end).__name__)] += 1
    return ends


def shuffled(golden, data: bytes, dram: bytes, rng: random.Random) -> np.ndarray:
    """Return the image after a run in another order that the tokens allow.

    A program without races must not notice: this tests the rules against the machine.
    """
    program, machine = decode_stream(data), Machine()
    image = np.frombuffer(dram, np.uint8).copy()
    launch = Launch(machine, program, Dram(image, golden.base), None)
    for index in another_order(order(program), rng):
        launch.run(index)
    return image


def another_order(found: Order, rng: random.Random) -> list[int]:
    waiting = [[i for i in found.sequence if found.units[i] == unit] for unit in range(3)]
    done, result = {-1}, []
    while any(waiting):
        heads = [q for q in waiting if q and done.issuperset(found.sources[q[0]])]
        queue = rng.choice(heads)
        while queue and done.issuperset(found.sources[queue[0]]):  # as far as tokens allow
            done.add(queue[0])
            result.append(queue.pop(0))
    return result


def test_a_few_streams() -> None:
    ends = fuzz(seed=7, count=60)
    assert ends["strict", "Run"] + ends["loose", "Run"] > 5
    assert ends["strict", "VtaEncodingError"] > 5


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(10))
def test_five_thousand_streams(seed: int) -> None:
    ends = fuzz(seed, 500)
    # many different things happen to them, results among them
    assert ends["strict", "Run"] >= 20
    assert ends["loose", "Run"] > ends["strict", "Run"]
    assert len(ends) >= 20


@pytest.mark.parametrize("golden", golden_programs(), ids=lambda g: g.name)
def test_reference_programs_in_other_orders(golden) -> None:
    data, dram = golden.insn, before(golden.name)
    for seed in range(3):
        after = shuffled(golden, data, dram, random.Random(seed))
        assert after.tobytes() == golden.after


def test_an_error_is_named() -> None:
    golden = golden_programs()[0]
    end = fuzzing.run(golden, b"\xff" * 16, before(golden.name), strict=True)
    assert isinstance(end, VtaError)
    assert "opcode is 7" in str(end)
