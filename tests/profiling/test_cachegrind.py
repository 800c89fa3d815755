"""The parser on a stored file, what is refused, and one real simulation."""

import shutil
import subprocess
import sys

import pytest

from tvmstruct.errors import InputError, ProfilingError
from tvmstruct.models import config
from tvmstruct.profiling import cachegrind
from tvmstruct.profiling.valgrind import START, Valgrind

OUTPUT = """# callgrind format
version: 1
desc: I1 cache: 32768 B, 64 B, 8-way associative
desc: LL cache: 2097152 B, 64 B, 16-way associative
cmd: python -m tvmstruct.profiling.run_saved model.tvms
desc: Trigger: Program termination
positions: line
events: Ir Dr Dw I1mr D1mr D1mw ILmr DLmr DLmw
summary: 18446744072029197492 1 1 1 1 1 1 1 1
fn=(12) PyObject_Call
0 100 40 20 1 5 3 1 2 1
totals: 14299937481 5695923277 2243006329 119975119 102294156 13113514 1005229 29310502 4488663
"""

COUNTED = """
import sys
from tvmstruct.profiling.valgrind import Valgrind

valgrind = Valgrind()
assert valgrind.running
valgrind.start()
sum(range(1_000_000))
valgrind.zero()
sum(range(int(sys.argv[1])))
valgrind.stop()
"""


def test_totals_of_an_output_file():
    found = cachegrind.parse(OUTPUT)
    assert found["Ir"] == 14299937481
    assert found["Dr"] + found["Dw"] == 5695923277 + 2243006329
    assert found["DLmr"] == 29310502


@pytest.mark.parametrize(
    "text",
    ["", "events: Ir Dr\ntotals: 1 2\n", OUTPUT.replace(" 4488663", "")],
    ids=["empty", "without caches", "cut off"],
)
def test_an_output_file_without_totals(text):
    with pytest.raises(ProfilingError, match="callgrind's output has events"):
        cachegrind.parse(text)


def test_cache_sizes():
    assert cachegrind.cache_bytes("2MB") == 2 << 20
    assert cachegrind.cache_bytes("512 kb") == 512 << 10


@pytest.mark.parametrize("text", ["3MB", "0MB", "2", "big", "2GB"])
def test_a_cache_size_that_cannot_be_simulated(text):
    with pytest.raises(InputError, match="want a power of two in KB or MB from 1KB"):
        cachegrind.cache_bytes(text)


def test_without_valgrind(monkeypatch):
    monkeypatch.setattr(shutil, "which", lambda name: None)
    with pytest.raises(ProfilingError, match="apt-get install valgrind"):
        cachegrind.simulate(config("bert"))


def test_reads_and_writes_are_added_up(monkeypatch):
    events = {"Ir": 1000, "Dr": 500, "Dw": 100, "D1mr": 50, "D1mw": 5, "DLmr": 20, "DLmw": 2}
    monkeypatch.setattr(cachegrind, "check_valgrind", lambda: None)
    monkeypatch.setattr(cachegrind, "_run", lambda file, size: events)
    tiny = config("memory-network", keys=20, hidden=8, answers=4, hops=1)
    found = cachegrind.simulate(tiny, cache="64KB")
    assert (found.instructions, found.references) == (1000, 600)
    assert (found.d1_misses, found.lld_misses) == (55, 22)
    assert "LL data misses (0.0625 MB)" in str(found)
    assert found.shapes == tiny.shapes()


@pytest.mark.isa("avx2")  # of x86-64
def test_requests_without_valgrind():
    """The rotations change nothing, and the answer is the default."""
    valgrind = Valgrind()
    assert not valgrind.running
    assert valgrind.request(START, 7) == 7
    valgrind.start()
    valgrind.zero()
    valgrind.stop()


@pytest.mark.skipif(shutil.which("valgrind") is None, reason="needs valgrind")
@pytest.mark.isa("avx2")
@pytest.mark.parametrize("turns", [0, 100_000])
def test_only_what_is_asked_for_is_counted(tmp_path, turns):
    """Neither Python's start nor the loop before the counts go to zero."""
    script, out = tmp_path / "counted.py", tmp_path / "out"
    script.write_text(COUNTED)
    command = [
        *("valgrind", "--tool=callgrind", "--instr-atstart=no", "--cache-sim=yes"),
        *(f"--callgrind-out-file={out}", sys.executable, str(script), str(turns)),
    ]
    subprocess.run(command, check=True, capture_output=True)
    found = cachegrind.parse(out.read_text())
    assert 10 * turns < found["Ir"] < 5_000_000 + 300 * turns  # ctypes takes a million
    assert found["Dr"] > found["D1mr"] >= found["DLmr"]


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("valgrind") is None, reason="needs valgrind")
@pytest.mark.isa("avx2")
def test_a_real_simulation():
    """Keys and values, read once each, fit into no 64 KB: a call misses most of their lines."""
    keys, hidden = 4096, 64
    network = config("memory-network", keys=keys, hidden=hidden, answers=4, hops=1)
    found = cachegrind.simulate(network, cache="64KB")
    lines = 2 * keys * hidden * 4 // cachegrind.LINE
    assert 0.9 * lines < found.lld_misses < 3 * lines
    assert found.references > found.d1_misses >= found.lld_misses
