"""The parser on a stored file, what is refused, and one real simulation."""

import shutil

import pytest

from tvmstruct.errors import InputError, ProfilingError
from tvmstruct.models import config
from tvmstruct.profiling import cachegrind

OUTPUT = """desc: I1 cache:         32768 B, 64 B, 8-way associative
desc: LL cache:         2097152 B, 64 B, 16-way associative
cmd: python -m tvmstruct.profiling.run_saved model.tvms 1
events: Ir I1mr ILmr Dr D1mr DLmr Dw D1mw DLmw
fl=???
fn=???
0 100 1 1 40 5 2 20 3 1
summary: 14299937481 119975119 1005229 5695923277 102294156 29310502 2243006329 13113514 4488663
"""


def test_totals_of_an_output_file():
    found = cachegrind.parse(OUTPUT)
    assert found["Ir"] == 14299937481
    assert found["Dr"] + found["Dw"] == 5695923277 + 2243006329
    assert found["DLmr"] == 29310502


@pytest.mark.parametrize(
    "text",
    ["", "events: Ir Dr\nsummary: 1 2\n", OUTPUT.replace(" 4488663", "")],
    ids=["empty", "without caches", "cut off"],
)
def test_an_output_file_without_totals(text):
    with pytest.raises(ProfilingError, match="cachegrind's output has events"):
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


def test_one_call_is_a_share_of_the_difference(monkeypatch, tmp_path):
    """Two processes differ by CALLS calls; what both do to start cancels."""
    start = {"Ir": 1000, "Dr": 500, "Dw": 100, "D1mr": 50, "D1mw": 5, "DLmr": 20, "DLmw": 2}
    monkeypatch.setattr(cachegrind, "check_valgrind", lambda: None)
    monkeypatch.setattr(
        cachegrind, "_run", lambda file, n, size: {k: v + 7 * n for k, v in start.items()}
    )
    tiny = config("memory-network", keys=20, hidden=8, answers=4, hops=1)
    found = cachegrind.simulate(tiny, cache="64KB")
    assert (found.instructions, found.references, found.d1_misses, found.lld_misses) == (
        *(7, 14),
        *(14, 14),
    )
    assert "LL data misses (0.0625 MB)" in str(found)
    assert found.shapes == tiny.shapes()


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
