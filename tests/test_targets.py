"""Targets: every way to write one, the ISA table, host features, errors, thread counts."""

import json
import subprocess
import sys

import pytest
import tvm

from tvmstruct import targets, threads
from tvmstruct.errors import TargetError
from tvmstruct.targets import check_runs_here, host_features, known_cpus, resolve

ZNVER2 = {"kind": "llvm", "mcpu": "znver2", "num-cores": 3}
CPUINFO = "processor: 0\nflags\t\t: lm pni fma avx2\n\nprocessor: 1\nflags\t\t: lm pni fma\n"


@pytest.mark.parametrize(
    "target",
    [
        "llvm -mcpu=znver2 -num-cores=3",
        "  llvm  --mcpu=znver2   -num-cores=3 -keys=cpu ",
        ZNVER2,
        json.dumps(ZNVER2),
        tvm.target.Target(ZNVER2),
        tvm.target.Target(ZNVER2, host=tvm.target.Target({"kind": "llvm", "mcpu": "x86-64"})),
    ],
    ids=["words", "spaces", "dict", "json", "target", "target with host"],
)
def test_all_ways_to_write_a_target(target):
    spec = resolve(target)
    assert (spec.isa.name, spec.threads, spec.key) == ("avx2", 3, "avx2:znver2")
    assert spec.target.attrs["mcpu"] == "znver2"
    assert {"avx2", "fma", "bmi2"} <= spec.features
    assert resolve(spec) is spec


@pytest.mark.parametrize(
    ("cpu", "isa"),
    [
        ("x86-64", "sse"),
        ("x86-64-v2", "sse"),
        ("ivybridge", "sse"),
        ("x86-64-v3", "avx2"),
        ("haswell", "avx2"),
        ("broadwell", "avx2"),
        ("skylake", "avx2"),
        ("znver1", "avx2"),
        ("znver3", "avx2"),
        ("alderlake", "avx2"),
        ("x86-64-v4", "avx512"),
        ("skylake-avx512", "avx512"),
        ("cascadelake", "avx512"),
        ("icelake-server", "avx512"),
        ("znver4", "avx512"),
        ("znver5", "avx512"),
        ("sapphirerapids", "avx512"),
        ("graniterapids", "avx512"),
        ("knl", "avx2"),
    ],
)
def test_isa_of_cpus(cpu, isa):
    assert resolve(f"llvm -mcpu={cpu}").isa.name == isa


def test_every_known_cpu_resolves():
    for cpu in known_cpus():
        assert resolve(f"llvm -mcpu={cpu}").isa in targets.ISAS


def test_attributes_change_the_isa():
    assert resolve("llvm -mcpu=x86-64 -mattr=+avx2,+fma").isa.name == "avx2"
    assert resolve("llvm -mattr=+avx2,+fma").isa.name == "avx2"
    assert resolve("llvm -mcpu=znver4 -mattr=-avx512f").isa.name == "avx2"
    assert resolve({"kind": "llvm", "mcpu": "haswell", "mattr": "-fma"}).isa.name == "sse"
    assert resolve("llvm -mcpu=haswell -mattr=-fma").key == "sse:haswell:-fma"


def test_isa_lanes_follow_the_generated_code():
    assert [(i.name, i.lanes, i.registers, i.fma) for i in targets.ISAS] == [
        ("avx512", 16, 32, True),
        ("avx2", 8, 16, True),
        ("sse", 4, 16, False),
    ]


def test_plain_llvm_is_the_baseline_and_warns():
    with pytest.warns(UserWarning, match="names no CPU"):
        spec = resolve("llvm")
    assert (spec.isa.name, spec.target.attrs["mcpu"]) == ("sse", "x86-64")


@pytest.mark.parametrize(
    ("target", "message"),
    [
        ("cuda", "cuda.*not available yet"),
        ("vtaa", "unknown target kind 'vtaa'; did you mean vta"),
        ("lvm", "unknown target kind 'lvm'; did you mean llvm"),
        ("", "cannot be read"),
        ("llvm '", "cannot be read"),
        ("llvm znver2", "'znver2' is no option"),
        ("llvm -mcpu=znver22", "unknown CPU -mcpu=znver22; did you mean znver2.*skylake-avx512"),
        ("llvm -mcpu=", "unknown CPU"),
        ("llvm -mcpu=i386", "unknown CPU"),
        ({"kind": "llvm", "mcpu": 5}, "unknown CPU"),
        ("llvm -mcp=znver2", "unknown option -mcp; did you mean mcpu"),
        ("llvm -mcpu=znver2 -mattr=+avx3", "unknown -mattr=.avx3.*did you mean avx"),
        ("llvm -mcpu=znver2 -mattr=avx2", "write .name or -name"),
        ("llvm -mcpu=znver2 -num-cores=two", "whole number"),
        ("llvm -mcpu=znver2 -num-cores=0", "at least 1"),
        ("llvm -mcpu=znver2 -fast-math", "would change results"),
        ("llvm -mcpu=znver2 -fast-math-nnan=1", "would change results"),
        ("llvm -mcpu=znver2 -mtriple=aarch64-linux-gnu", "only x86_64"),
        ("{'kind'", "not: Expecting"),
        (["llvm"], "type list"),
        (None, "type NoneType"),
        ({"kind": "llvm", "mcpu": "znver2", "opt-level": []}, "TVM refuses"),
    ],
    ids=str,
)
def test_errors_name_the_fix(target, message):
    with pytest.raises(TargetError, match=message):
        resolve(target)


def test_host_has_all_that_it_resolves_to():
    spec = resolve("host")
    assert spec.features <= host_features()
    check_runs_here(spec)
    assert spec == resolve("llvm -mcpu=native") == resolve(tvm.target.Target(spec.target.export()))


def test_unknown_cpu_gets_its_level_and_extra_sets(monkeypatch):
    """A machine that LLVM cannot name: AVX2 and VNNI, half of AVX-512."""
    have = targets._llvm_features("x86-64-v3") & targets.INSTRUCTION_SETS
    monkeypatch.setattr(targets, "host_features", lambda: have | {"avxvnni", "avx512f"})
    spec = resolve("host")
    assert (spec.isa.name, spec.target.attrs["mcpu"]) == ("avx2", "x86-64-v3")
    assert list(spec.target.attrs["mattr"]) == ["+avx512f", "+avxvnni"]


def test_running_needs_the_features(monkeypatch):
    monkeypatch.setattr(targets, "host_features", lambda: frozenset({"64bit", "sse2"}))
    with pytest.raises(TargetError, match=r"avx2:znver2 uses .*avx2.*does not have"):
        check_runs_here(resolve("llvm -mcpu=znver2"))


def test_not_x86(monkeypatch):
    monkeypatch.setattr(targets, "host_features", frozenset)
    with pytest.raises(TargetError, match="no 64-bit x86"):
        resolve("host")


def test_features_from_the_kernel_or_from_llvm(monkeypatch, tmp_path):
    file = tmp_path / "cpuinfo"
    file.write_text(CPUINFO)
    for path, want in ((file, {"64bit", "sse3", "fma"}), (tmp_path / "none", {"sse2", "64bit"})):
        monkeypatch.setattr(targets, "CPUINFO", path)
        found = host_features.__wrapped__()
        assert (found == want) if path is file else (found >= want)


@pytest.mark.parametrize(
    ("files", "quota"),
    [
        ({}, None),
        ({"cpu.max": "max 100000"}, None),
        ({"cpu.max": "150000 100000"}, 1.5),
        ({"cpu/cpu.cfs_quota_us": "-1", "cpu/cpu.cfs_period_us": "100000"}, None),
        ({"cpu/cpu.cfs_quota_us": "200000", "cpu/cpu.cfs_period_us": "100000"}, 2.0),
    ],
    ids=str,
)
def test_cpu_quota(files, quota, tmp_path):
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text + "\n")
    assert threads.cpu_quota(tmp_path) == quota


def test_hyperthreads_count_once(tmp_path):
    for cpu, siblings in enumerate(["0,2", "1,3", "0,2", "1,3"]):
        folder = tmp_path / f"cpu{cpu}" / "topology"
        folder.mkdir(parents=True)
        (folder / "thread_siblings_list").write_text(siblings)
    assert threads.physical_cores({0, 1, 2, 3}, tmp_path) == 2
    assert threads.physical_cores({0, 1, 2, 3}, tmp_path / "none") == 4


def test_quota_bounds_threads(monkeypatch):
    monkeypatch.setattr(threads, "physical_cores", lambda cpus: 8)
    monkeypatch.setattr(threads, "cpu_quota", lambda: 2.5)
    assert threads.available_threads() == 2
    monkeypatch.setattr(threads, "cpu_quota", lambda: 0.5)
    assert threads.available_threads() == 1


def test_user_variable_wins(monkeypatch):
    monkeypatch.setenv("TVM_NUM_THREADS", "7")
    assert threads.wanted_threads() == 7
    assert resolve("llvm -mcpu=znver2").threads == 7
    for text in ("", "0", "many"):
        monkeypatch.setenv("TVM_NUM_THREADS", text)
        assert threads.wanted_threads() == threads.available_threads()


STARTED = """
import ctypes, os, pathlib, sys, warnings
os.environ.pop("TVM_NUM_THREADS", None)
import tvm
if {started}:
    library = pathlib.Path(tvm.__file__).parent / "lib" / "libtvm_runtime.so"
    ctypes.CDLL(str(library))._ZN3tvm7runtime9threading10NumThreadsEv()
warnings.simplefilter("error")
import importlib.util
spec = importlib.util.spec_from_file_location("threads", sys.argv[1])
module = importlib.util.module_from_spec(spec)
spec.loader.exec_module(module)
assert os.environ["TVM_NUM_THREADS"] == str(module.available_threads())
assert os.environ["TVM_BIND_THREADS"] == "0"
assert module.pool_threads() == module.available_threads()
"""


@pytest.mark.parametrize("started", [False, True])
def test_pool_started_before_us(started):
    if threads.available_threads() < 2:
        pytest.skip("one core: TVM's single thread is all there is")
    command = [sys.executable, "-c", STARTED.format(started=started), threads.__file__]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (done.returncode != 0) == started, done.stderr
    assert ("Import tvmstruct first" in done.stderr) == started
