"""The read channel against a simulation that goes cycle by cycle."""

import numpy as np
import pytest

from tvmstruct.vta.channel import ACC, INP, Dram, ReadChannel

DRAM = Dram()


def serve(channel, client, bursts, until):
    """Admit all of ``bursts`` from time 0; ``until`` says how far the future is known."""
    channel.ask(client, bursts)
    now = 0
    while True:
        done, now = channel.admit(now, until(now))
        if done is not None:
            return now


def by_the_cycle(bursts, dram):
    """Return the time of the last beat: one admission and one beat a cycle, nothing analytic."""
    queue, outstanding, waiting, now, ready = [], 0, list(bursts), 0, 0
    while waiting or queue:
        if waiting and outstanding < dram.outstanding:
            if not queue:
                ready = now + dram.latency
            queue.append(waiting.pop(0))
            outstanding += 1
        now += 1
        if queue and now > ready:
            queue[0] -= 1
            if not queue[0]:
                queue.pop(0)
                outstanding -= 1
    return now


@pytest.mark.parametrize("seed", range(8))
def test_many_requests_at_once_are_as_one_by_one_and_by_the_cycle(seed):
    rng = np.random.default_rng(seed)
    bursts = rng.integers(1, (4, 40, 257)[seed % 3], int(rng.integers(1, 90))).tolist()
    quiet = serve(ReadChannel(DRAM), INP, bursts, lambda now: 1 << 40)
    busy = serve(ReadChannel(DRAM), INP, bursts, lambda now: now)
    partly = serve(ReadChannel(DRAM), INP, bursts, lambda now: now + 70)
    assert quiet == busy == partly == by_the_cycle(bursts, DRAM)


def test_first_by_priority_is_admitted_first_and_the_other_follows_without_gap():
    channel = ReadChannel(DRAM)
    channel.ask(ACC, [10])
    channel.ask(INP, [20])
    assert channel.admit(0, 1 << 40) == (INP, 16 + 20)
    assert channel.admit(1, 1 << 40) == (ACC, 16 + 20 + 10)


def test_the_seventeenth_request_waits_for_the_first():
    channel = ReadChannel(DRAM)
    channel.ask(INP, [4] * 17)
    now = 0
    for _ in range(16):
        done, now = channel.admit(now, now)
        assert done is None
    assert now == 16
    assert channel.admit(now, now) == (None, 16 + 4)
    assert channel.admit(16 + 4, 0) == (INP, 16 + 17 * 4)


@pytest.mark.parametrize(
    ("address", "count", "beats"),
    [
        (0, 1, [1]),
        (7, 2, [2]),
        (0, 2048, [256]),
        (2040, 16, [1, 1]),
        (1024, 5000, [128, 256, 241]),
        (2048, 4096, [256, 256]),
    ],
)
def test_requests_stay_in_blocks_of_two_kib(address, count, beats):
    assert DRAM.bursts(address, count) == beats
