"""Exploration of a board: VTA's parameters, fronts, tables and the command."""

import json
from dataclasses import replace

import pytest
import typer
from typer.testing import CliRunner

from tvmstruct import models
from tvmstruct.errors import VtaConfigError
from tvmstruct.vta import explore, explore_command, gemm_stream
from tvmstruct.vta.channel import Dram
from tvmstruct.vta.config import DEFAULT, Config
from tvmstruct.vta.operations import Gemm, Workload, workload
from tvmstruct.vta.resources import LIMITS, Resources, vta_resources
from tvmstruct.vta.search import LEAST, MOST, PARAMETERS, Search, front, neighbours

SMALL = "random:bert?layers=1&seq=24&hidden=96&heads=4&ffn=160"


@pytest.fixture(scope="module")
def small():
    return workload(models.parse(SMALL.removeprefix("random:")))


@pytest.fixture(scope="module")
def found(small):
    return explore.explore(SMALL, small, "ultra96")


def test_latency_is_the_sum_of_the_products(small):
    point = Search(small, "pynq").time(DEFAULT)
    shapes = [(24, 96, 96)] * 4 + [(24, 96, 160), (24, 160, 96)]
    assert point.cycles == sum(gemm_stream.cycles(*s, DEFAULT, Dram()) for s in shapes)
    assert point.milliseconds == pytest.approx(point.cycles / 100e3)


def test_clock_and_bus_are_those_of_the_board(small):
    slow, fast = (Search(small, board).time(DEFAULT) for board in ("pynq", "zcu104"))
    assert fast.cycles < slow.cycles
    assert fast.milliseconds == pytest.approx(fast.cycles / 333e3)


def test_neighbours_are_valid_and_one_move_away():
    found = list(neighbours(DEFAULT))
    assert len(set(found)) == len(found) > 10
    for config in found:
        moves = [getattr(config, name) - getattr(DEFAULT, name) for name in PARAMETERS]
        assert sum(move > 0 for move in moves) == 1
        assert sum(move < 0 for move in moves) <= 1
        for name, least, most in zip(PARAMETERS, LEAST, MOST, strict=True):
            assert least <= getattr(config, name) <= most


@pytest.mark.parametrize("part", [0.5, 1.0])
def test_reconfiguration_ends_where_no_neighbour_is_better(small, part):
    search = Search(small, "ultra96")
    best = search.reconfigure(part)
    assert best is not None
    limits = LIMITS["ultra96"] * part
    assert best.resources.fits(limits)
    for near in neighbours(best.config):
        if vta_resources(near, search.limits).fits(limits):
            assert search.time(near).cycles >= 0.98 * best.cycles


def test_more_of_a_board_is_faster_than_the_shipped_design():
    """Products large enough to keep a larger matrix unit busy."""
    asked = Workload("made up", (), (Gemm(256, 512, 512),))
    search = Search(asked, "zcu104")
    best = search.reconfigure()
    assert best is not None
    assert best.cycles < 0.4 * search.time(replace(DEFAULT, target="zcu104")).cycles


def test_nothing_fits_a_sliver_of_a_board(small):
    assert Search(small, "pynq").reconfigure(0.05) is None


def test_front_keeps_what_nothing_beats(small):
    search = Search(small, "ultra96")
    points = [search.time(c) for c in (DEFAULT, *list(neighbours(DEFAULT))[:12])]
    kept = front(points)
    assert [p.share for p in kept] == sorted(p.share for p in kept)
    assert [p.cycles for p in kept] == sorted((p.cycles for p in kept), reverse=True)
    for point in points:
        assert any(k.share <= point.share and k.cycles <= point.cycles for k in kept)


def test_exploration_is_consistent(found):
    assert found.best == found.points[-1]
    for point in found.points:
        assert point.resources == vta_resources(point.config, LIMITS["ultra96"])
    whole = found.lanes[-1]
    assert whole.part == 1
    assert whole.speedup == whole.equal.cycles / whole.adaptive.cycles > 1
    times = [row.adaptive.cycles for row in found.lanes]
    assert times == sorted(times, reverse=True)


def test_text_names_every_point_and_class(found):
    text = explore.text(found)
    for point in found.points:
        assert f"{point.config.name} " in text
    for name, lanes in found.lanes[-1].adaptive.lanes.items():
        assert f"  {name:<16}{lanes:>5}" in text
    assert f"{found.lanes[-1].speedup:.2f}x" in text


def test_picture(found):
    assert explore.to_png(found).startswith(b"\x89PNG")


def test_model_without_products_is_refused():
    with pytest.raises(VtaConfigError, match="no products"):
        Search(Workload("empty", (), ()), "pynq")


def test_unknown_board_is_refused(small):
    with pytest.raises(VtaConfigError, match="unknown board 'vcu118'"):
        Search(small, "vcu118")


def test_board_without_room_is_refused(small, monkeypatch):
    monkeypatch.setitem(LIMITS, "ultra96", Resources(60_000, 90_000, 360, 30))
    with pytest.raises(VtaConfigError, match="no VTA fits ultra96"):
        explore.explore(SMALL, small, "ultra96")


@pytest.fixture(scope="module")
def run():
    app = typer.Typer()
    explore_command.register(app)
    app.callback()(lambda: None)  # one command alone would lose its name
    return lambda *arguments: CliRunner().invoke(app, ["explore", *map(str, arguments)])


def test_command_writes_configuration_and_plot(run, tmp_path):
    output, plot = tmp_path / "vta.json", tmp_path / "front.png"
    done = run(SMALL, "--board", "ultra96", "-o", output, "--plot", plot, "--json")
    assert done.exit_code == 0, done.output
    printed = json.loads(done.stdout[done.stdout.index("{") :])
    config = Config.from_json(output)
    assert config.target == "ultra96"
    assert config.name == min(printed["vta"], key=lambda row: row["cycles"])["name"]
    assert printed["lanes"][-1]["speedup"] > 1
    assert plot.read_bytes().startswith(b"\x89PNG")


def test_command_prints_tables(run, tmp_path):
    output = tmp_path / "vta.json"
    done = run(SMALL, "--board", "pynq", "-o", output)
    assert done.exit_code == 0, done.output
    assert "Pareto front" in done.stdout
    assert f"{output}: {Config.from_json(output).name}" in done.stdout


def words(output):
    """Return what a box says on one line: it is broken where the width of the terminal says."""
    return " ".join(output.replace("│", " ").split())


@pytest.mark.parametrize("option", ["-o", "--plot"])
def test_missing_folder_is_misuse(run, tmp_path, option):
    done = run(SMALL, "--board", "pynq", option, tmp_path / "none" / "file")
    assert done.exit_code == 2
    assert "no folder" in words(done.output)


def test_command_reads_a_model_file(run, tmp_path):
    """The same graph as a built-in model's: the same VTA is the fastest."""
    file, output = tmp_path / "model.onnx", tmp_path / "vta.json"
    file.write_bytes(models.build(models.parse(SMALL.removeprefix("random:"))).SerializeToString())
    done = run(file, "--board", "ultra96", "-o", output, "--length", 24)
    assert done.exit_code == 0, done.output
    assert "dense 96x160" in done.stdout
    built_in = tmp_path / "built_in.json"
    run(SMALL, "--board", "ultra96", "-o", built_in)
    assert output.read_text() == built_in.read_text()


def test_compiled_model_is_misuse(run, tmp_path):
    file = tmp_path / "model.tvms"
    file.touch()
    done = run(file, "--board", "pynq")
    assert done.exit_code == 2
    assert "compiled already" in words(done.output)
