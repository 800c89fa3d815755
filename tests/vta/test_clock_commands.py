"""``tvmstruct vta clocks`` and ``tvmstruct vta timeline``."""

import json

import pytest
import typer
from typer.testing import CliRunner

from tests.vta.streams import GOLDEN, INDEX
from tvmstruct.vta import clocks_command, timeline_command
from tvmstruct.vta.config import DEFAULT
from tvmstruct.vta.tpu_clock import ROWS

PROGRAM = GOLDEN / "205.insn.bin"
CYCLES = next(entry["cycles"] for entry in INDEX if entry["name"] == "205")


@pytest.fixture(scope="module")
def run():
    app = typer.Typer()
    clocks_command.register(app)
    timeline_command.register(app)
    return lambda *arguments: CliRunner().invoke(app, [*map(str, arguments)])


def test_clocks_prints_every_row_with_its_difference(run):
    lines = run("clocks").stdout.splitlines()
    assert len(lines) == 1 + len(ROWS)
    for line, row in zip(lines[1:], ROWS, strict=True):
        assert line.startswith(row.label)
        assert line.endswith(f"{row.difference:+.2%}")


def test_clocks_as_json(run):
    rows = json.loads(run("clocks", "--json").stdout)
    assert [row["clocks"] for row in rows] == [row.clocks for row in ROWS]


def test_timeline_prints_and_draws(run, tmp_path):
    png = tmp_path / "out.png"
    done = run("timeline", PROGRAM, "--png", png)
    assert done.exit_code == 0, done.output
    assert f"{CYCLES} cycles" in done.stdout
    assert png.read_bytes().startswith(b"\x89PNG")


def test_timeline_of_a_part_with_a_configuration(run, tmp_path):
    config = tmp_path / "vta.json"
    config.write_text(DEFAULT.to_json())
    done = run("timeline", PROGRAM, "--config", config, "--from", 7, "--count", 1)
    assert done.stdout.splitlines()[1].split()[0] == "7"
    assert done.stdout.splitlines()[2] == ""


def test_timeline_as_json(run):
    found = json.loads(run("timeline", PROGRAM, "--json").stdout)
    assert found["cycles"] == CYCLES
    assert found["instructions"][-1]["end"] == CYCLES


def test_timeline_into_a_missing_folder_is_misuse(run, tmp_path):
    done = run("timeline", PROGRAM, "--png", tmp_path / "none" / "out.png")
    assert done.exit_code == 2
    assert "no folder" in " ".join(done.output.replace("│", " ").split())
