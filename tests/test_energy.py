"""The energy of a compiled model: bytes of every kernel, from the level that holds them."""

from __future__ import annotations

import json

import pytest

import tvmstruct
from tvmstruct import cli, models
from tvmstruct.caches import L1, L2, L3, MEMORY, Caches
from tvmstruct.energy import DRAM_PJ, SRAM_PJ
from tvmstruct.errors import InputError

TEXT = "bert?hidden=32&heads=2&ffn=48&seq=7&layers=1&vocabulary=2000"
SHAPES = models.parse(TEXT).shapes(3)
ROWS, TABLE = 3 * 7, 2000 * 32 * 4
DOWN = "encoder.layer.0.output.dense.weight"
HUGE, TINY = Caches(1 << 30, 1 << 30, 1 << 30), Caches(1, 1, 1)


@pytest.fixture(scope="module")
def model():
    compiled = tvmstruct.compile(models.source(models.parse(TEXT)), buckets="exact", threads=1)
    compiled.compile_bucket(SHAPES)
    return compiled


def row(report, name):
    return next(r for r in report.rows if r.name == name)


def test_all_is_served_from_where_all_fits(model):
    report = model.energy(SHAPES, HUGE)
    assert {n for r in report.rows for n in r.traffic.bytes} == {L1}
    assert report.energy.low == report.energy.high == report.traffic.total / 8 * SRAM_PJ * 1e-12


def test_what_a_layer_moves_is_counted_by_hand(model):
    """The second dense layer: weights, bias and norm once, input, residual and result, operands."""
    report = model.energy(SHAPES, TINY)
    moved = row(report, DOWN).traffic
    weights, vectors = 48 * 32, 3 * 32
    assert moved[MEMORY] == 4 * (weights + vectors + ROWS * (48 + 2 * 32))
    assert moved[L1] == pytest.approx(4 * ROWS * 48 * 32 * (1 / 8 + 1 / 32))
    assert row(report, DOWN).energy.high == pytest.approx(
        (moved[MEMORY] * DRAM_PJ[1] + moved[L1] * SRAM_PJ) / 8 * 1e-12
    )


def test_rows_of_a_table_come_from_where_the_whole_table_is(model):
    caches = Caches(l1=TABLE // 4, l2=TABLE // 2, l3=2 * TABLE)
    report = model.energy(SHAPES, caches)
    assert report.home == L1
    assert report.weights < TABLE // 4
    assert sum(r.traffic[L3] for r in report.rows) == ROWS * 32 * 4
    assert model.energy(SHAPES, Caches(TABLE // 4, TABLE // 2, TABLE // 2)).traffic[MEMORY] > 0


def test_weights_of_the_whole_model_decide_where_they_come_from(model):
    weights = model.energy(SHAPES, HUGE).weights
    assert model.energy(SHAPES, Caches(weights - 1, weights, 1 << 30)).home == L2
    two = Caches(weights // 2 + 1, weights, 1 << 30, threads=2)
    assert model.energy(SHAPES, two).home == L1  # each core holds its half


def test_the_report_says_what_it_assumes(model):
    report = model.energy()
    assert report.shapes == "3x7"
    data = json.loads(report.to_json())
    assert data["joules_high"] == report.energy.high
    assert sum(sum(r["bytes"].values()) for r in data["rows"]) == sum(data["bytes"].values())
    text = str(report)
    for line in ("14 pJ for 8 bytes", "300 to 450 pJ", "tiles of 8 x 32", "of weights from"):
        assert line in text
        assert any(line in assumption for assumption in data["assumptions"])


def test_refusals(model, tmp_path):
    model.save(tmp_path / "model.tvms")
    with pytest.raises(InputError, match="compile its source"):
        tvmstruct.load(tmp_path / "model.tvms").energy()
    with pytest.raises(InputError, match="unknown input 'ids'"):
        model.energy({"ids": (1, 2)})


def test_the_command_line_prints_it(capsys):
    command = ["report", "random:embedding?vocabulary=50&hidden=13&seq=3", "--energy"]
    with pytest.raises(SystemExit) as exit_info:
        cli.main([*command, "--caches", "1K,2K,3K", "--threads", "1"])
    assert not exit_info.value.code
    assert "1 KiB L1 and 2 KiB L2 a core, 3 KiB L3, 1 thread" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        cli.main([*command, "--caches", "1K"])
    assert "want three sizes" in capsys.readouterr().err
