"""``tvmstruct vta run | dis | asm``."""

import gzip
import json
import re
import subprocess
import sys
from types import SimpleNamespace

import pytest

from tests.vta.golden_programs import FOLDER, golden_programs
from tvmstruct import cli
from tvmstruct.vta.config import DEFAULT

GOLDEN = golden_programs()[5]
INSN, DRAM = FOLDER / f"{GOLDEN.name}.insn.bin", FOLDER / f"{GOLDEN.name}.dram.gz"


@pytest.fixture
def call(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")

    def run(*arguments):
        with pytest.raises(SystemExit) as exit_info:
            cli.main(["vta", *map(str, arguments)])
        captured = capsys.readouterr()
        return SimpleNamespace(code=exit_info.value.code, out=captured.out, err=captured.err)

    return run


def test_run_writes_the_image_and_counters(call, tmp_path) -> None:
    out = tmp_path / "after"
    files = ("--insn", INSN, "--dram", DRAM, "--base", hex(GOLDEN.base))
    result = call("run", *files, "--out", out, "--json")
    assert result.code == 0, result.err
    assert out.read_bytes() == GOLDEN.after
    report = json.loads(result.out)
    assert report["counters"] == GOLDEN.counters
    assert report["instructions"] == len(GOLDEN.insn) // 16
    assert report["config"] == DEFAULT.name
    packed = tmp_path / "after.gz"
    result = call("run", *files, "--out", packed)
    assert gzip.decompress(packed.read_bytes()) == GOLDEN.after
    assert "gemm_counter" in result.out
    assert f"{GOLDEN.counters['alu_counter']:,}" in result.out


def test_run_takes_a_configuration_and_refuses_or_not(call, tmp_path) -> None:
    config = tmp_path / "vta_config.json"
    config.write_text(DEFAULT.to_json(), encoding="utf-8")
    insn, dram, out = tmp_path / "p.bin", tmp_path / "dram", tmp_path / "out"
    text = tmp_path / "p.vta"
    text.write_text("load.uop dram=0x400 rows=1x1  # zeros\nalu.mul imm=3\nfinish\n")
    dram.write_bytes(bytes(4096))
    assert call("asm", text, "-o", insn, "--config", config).code == 0
    run = ("run", "--insn", insn, "--dram", dram, "--base", 4096, "--out", out, "--config", config)
    result = call(*run)
    assert (result.code, out.exists()) == (1, False)
    assert result.err.startswith("tvmstruct: mul: instruction 1 (alu.mul")
    assert call(*run, "--no-strict").code == 0
    assert out.read_bytes() == bytes(4096)
    limited = call(*run, "--no-strict", "--limit", 0)
    assert "limit: the program has 1 tile operations, over 0" in limited.err


def test_run_checks_for_hls_when_asked(call, tmp_path) -> None:
    golden = golden_programs()[1]
    insn, dram = (FOLDER / f"{golden.name}{end}" for end in (".insn.bin", ".dram.gz"))
    run = ("run", "--insn", insn, "--dram", dram, "--base", golden.base, "--out", tmp_path / "o")
    result = call(*run, "--level", "hls")
    assert result.code == 1
    assert "shift-range: instruction" in result.err


def test_dis_and_asm_round_trip(call, tmp_path) -> None:
    text, out = tmp_path / "p.vta", tmp_path / "p.bin"
    result = call("dis", INSN)
    assert result.code == 0
    text.write_text(result.out, encoding="utf-8")
    assert f"{len(GOLDEN.insn) // 16} instructions" in call("asm", text, "-o", out).out
    assert out.read_bytes() == GOLDEN.insn


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["dis", DRAM], 1, "VtaEncoding|opcode is|bit .* is set|memory is|alu_opcode is"),
        (["dis", "missing"], 2, "does not exist"),
        (["asm", INSN, "-o", "x"], 1, "not text|line 1"),
        (["run", "--insn", INSN, "--dram", DRAM, "--base", "1M", "--out", "x"], 2, "1M is no int"),
        (["run", "--insn", INSN, "--dram", DRAM, "--base", "4096"], 2, "Missing option '--out'"),
        (
            ["run", "--insn", INSN, "--dram", DRAM, "--base", "4096", "--out", "no/such/x"],
            2,
            "--out: no folder",
        ),
        (
            ["run", "--insn", INSN, "--dram", DRAM, "--base", "4096", "--out", "x", "--level", "x"],
            2,
            "want rtl or hls",
        ),
        (
            ["run", "--insn", INSN, "--dram", DRAM, "--base", "4096", "--out", "x"],
            1,
            "dram-range: instruction 0 .* the image has 0x1000 to 0x81000",
        ),
    ],
)
def test_misuse(call, tmp_path, monkeypatch, arguments, code, message) -> None:
    monkeypatch.chdir(tmp_path)
    result = call(*arguments)
    assert result.code == code
    assert re.search(message, result.err), result.err
    assert not (tmp_path / "x").exists()


def test_a_damaged_gzip_file(call, tmp_path) -> None:
    damaged = tmp_path / "d.gz"
    damaged.write_bytes(DRAM.read_bytes()[:1000])
    run = ("run", "--insn", INSN, "--dram", damaged, "--base", 4096, "--out", tmp_path / "o")
    result = call(*run)
    assert result.code == 1
    assert f"{damaged}: damaged gzip file" in result.err


@pytest.mark.parametrize("command", ["run", "dis", "asm"])
def test_help_shows_an_example(call, command: str) -> None:
    result = call(command, "--help")
    assert result.code == 0
    assert f"Example: tvmstruct vta {command}" in result.out


def test_nothing_heavy_at_start_up() -> None:
    code = "import sys, tvmstruct.vta.command; print({'tvm', 'numpy'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"
