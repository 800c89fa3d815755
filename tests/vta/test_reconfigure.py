"""Algorithm 1 of NLP-Fast over lanes: against equal lanes, a closed form and brute force."""

from dataclasses import replace
from itertools import product
from math import sqrt

import pytest

from tvmstruct import models
from tvmstruct.errors import InputError, VtaConfigError
from tvmstruct.vta.operations import Step, Workload, lane, workload
from tvmstruct.vta.reconfigure import adaptive, equal, equal_bound, problem
from tvmstruct.vta.resources import LIMITS

BERTS = ["bert", "bert-s4x", "bert-h4x", "bert-f4x"]


@pytest.mark.parametrize("board", LIMITS)
@pytest.mark.parametrize("name", BERTS)
def test_adaptive_against_equal_parallelism(name, board):
    """At least 1.5, also where the equal design could have a fraction of a lane."""
    asked = problem(workload(models.config(name)), board)
    baseline, found = equal(asked), adaptive(asked)
    assert baseline.cycles / found.cycles > 1.5
    fractional = asked.cycles(dict.fromkeys(asked.classes, equal_bound(asked)))
    assert fractional / found.cycles > 1.5
    for design in (baseline, found):
        assert design.resources.fits(LIMITS[board])
        assert min(design.lanes.values()) >= 1


@pytest.mark.parametrize("board", LIMITS)
def test_equal_lanes_are_as_many_as_fit(board):
    asked = problem(workload(models.config("bert")), board)
    lanes = equal(asked).lanes
    assert len(set(lanes.values())) == 1
    assert not asked.fits({name: n + 1 for name, n in lanes.items()})


def test_lanes_follow_the_square_root_of_the_work():
    """Lagrange: with one binding limit and equal lanes, n is in proportion to sqrt(work)."""
    works = {"Q-Gen": 4e9, "linear 1": 9e9, "linear 2": 1e9}
    steps = tuple(Step(name, int(work)) for name, work in works.items())
    asked = problem(Workload("made up", steps, ()), "zcu104")
    found = adaptive(asked)
    total, roots = sum(found.lanes.values()), {n: sqrt(w) for n, w in works.items()}
    for name, root in roots.items():
        assert found.lanes[name] == pytest.approx(total * root / sum(roots.values()), abs=1.5)


def test_no_whole_design_is_much_better():
    """Exhaustive over three classes on a small part of a board."""
    steps = (Step("Q-Gen", 3_000_000), Step("softmax", 500_000), Step("linear 1", 9_000_000))
    asked = problem(Workload("made up", steps, ()), "pynq", 0.5)
    designs = (dict(zip(asked.classes, n, strict=True)) for n in product(range(1, 25), repeat=3))
    best = min(asked.cycles(lanes) for lanes in designs if asked.fits(lanes))
    assert adaptive(asked).cycles <= 1.01 * best


def test_lanes_of_a_class_that_waits_for_memory_go_to_others():
    """The dot product ends long before the weights beside it are there."""
    steps = (
        Step("Q-Gen", 100_000_000),
        Step("dot product", 40_000_000),
        Step("attention FC", 100_000_000, bytes=64_000_000),
    )
    asked = problem(Workload("made up", steps, ()), "pynq")
    without = problem(
        Workload("made up", tuple(replace(step, bytes=0) for step in steps), ()), "pynq"
    )
    found, plain = adaptive(asked), adaptive(without)
    assert found.rounds >= 1
    assert found.lanes["dot product"] < plain.lanes["dot product"]
    assert found.cycles < asked.cycles(plain.lanes)
    assert asked.waits(found.lanes)["Q-Gen"] == 0


def test_cycles_are_work_or_the_fetch_beside_it():
    steps = (Step("Q-Gen", 1000, 80), Step("softmax", 50, 4000), Step("linear 1", 600, 1600))
    asked = problem(Workload("made up", steps, ()), "pynq")
    lanes = {"Q-Gen": 4, "softmax": 1, "linear 1": 3}
    first = 80 / 8
    assert asked.cycles(lanes) == first + max(250, 4000 / 8) + max(50, 1600 / 8) + 200
    assert asked.waits(lanes) == {"Q-Gen": 250, "softmax": 150, "linear 1": 0}


@pytest.mark.parametrize("name", ["bert", "transformer"])
def test_work_is_that_of_the_matrices(name):
    """Products with constants as in the list of matrices; attention is s x s x hidden twice."""
    config = models.config(name, layers=3, seq=40, hidden=96, heads=4, ffn=200)
    found = workload(config)
    dense = {"Q-Gen", "K/V-Gen", "attention FC", "linear 1", "linear 2"}
    assert sum(found.work(n) for n in dense) == sum(g.macs for g in found.gemms)
    attentions = 3 if name == "bert" else 9
    assert found.work("dot product") == attentions * 40 * 40 * 96
    assert found.work("softmax") == attentions * 40 * 40 * 4
    encoders = 3 if name == "bert" else 6
    assert found.work("linear 1") == encoders * 40 * 96 * 200
    assert sum(step.bytes for step in found.steps) == 4 * sum(
        g.count * g.inputs * g.outputs for g in found.gemms
    )


def test_memory_network_reads_its_memory_in_every_hop():
    found = workload(models.config("memory-network", keys=1000, hidden=64, hops=3, answers=10))
    assert sum(step.bytes for step in found.steps) == 3 * 2 * 1000 * 64 * 4 + 64 * 10 * 4
    assert found.work("dot product") == 3 * 1000 * 64


def test_lane_without_multiply_add_takes_its_own():
    assert lane("softmax").dsp > lane("Q-Gen").dsp
    assert lane("Q-Gen") == lane("linear 2")


def test_model_without_classes_is_refused():
    with pytest.raises(InputError, match="no operation classes of t5"):
        workload(models.config("t5"))


def test_factored_model_is_refused():
    with pytest.raises(InputError, match="form=kronecker"):
        workload(models.config("bert", form="kronecker", layers=1))


def test_unknown_board_is_refused():
    with pytest.raises(VtaConfigError, match="unknown board 'de10'; known are pynq"):
        problem(workload(models.config("bert")), "de10")


@pytest.mark.parametrize("part", [0, -0.5, 1.5])
def test_part_of_a_board_is_refused(part):
    with pytest.raises(VtaConfigError, match="want over 0"):
        problem(workload(models.config("bert")), "pynq", part)


def test_part_too_small_for_a_lane_each_is_refused():
    with pytest.raises(VtaConfigError, match="one lane of each class"):
        problem(workload(models.config("bert")), "pynq", 0.1)
