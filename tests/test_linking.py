"""Compiled modules survive the way through bytes, on a machine without a compiler."""

import os
import subprocess
import sys

import numpy as np
import pytest
import tvm
from tvm import relax
from tvm.script import relax as R
from tvm.script import tirx as T

from tvmstruct import linking
from tvmstruct.errors import ArtifactError, MissingDependencyError

TARGET = tvm.target.Target({"kind": "llvm", "mcpu": "x86-64"})
JIT_MISSING = "tvm_ffi_orcjit is not installed"

LOAD = """
import os, sys
assert os.environ["PATH"] == ""
import numpy as np, tvm
from tvm import relax
from tvmstruct.linking import load_bytes
module = load_bytes(open(sys.argv[1], "rb").read())
vm = relax.VirtualMachine(module, tvm.cpu())
x = tvm.runtime.tensor(np.arange(32, dtype="float32").reshape(4, 8))
w = tvm.runtime.tensor(np.full((8, 3), 0.5, "float32"))
np.save(sys.argv[2], vm["main"](x, w).numpy())
print(type(module).__name__, module.kind)
"""


@T.prim_func(s_tir=True)
def double(a: T.handle, c: T.handle):
    n = T.int64()
    A = T.match_buffer(a, (n,), "float32")
    C = T.match_buffer(c, (n,), "float32")
    for i in T.parallel(n):
        C[i] = A[i] * T.float32(2)


def executable() -> relax.VMExecutable:
    """Return relu(x @ w) with a symbolic number of rows, and a shape computed by bytecode."""
    builder = relax.BlockBuilder()
    rows = tvm.tirx.Var("rows", "int64")
    x = relax.Var("x", R.Tensor((rows, 8), "float32"))
    w = relax.Var("w", R.Tensor((8, 3), "float32"))
    with builder.function("main", [x, w]):
        y = builder.emit(relax.op.nn.relu(relax.op.matmul(x, w)))
        z = builder.emit(relax.op.concat([y, y], axis=0))
        builder.emit_func_output(builder.emit(relax.op.reshape(z, (rows * 6,))))
    return relax.build(builder.get(), TARGET)


def test_executable_in_a_fresh_process_without_path(tmp_path):
    pytest.importorskip("tvm_ffi_orcjit", reason=JIT_MISSING)
    code, out = tmp_path / "code", tmp_path / "out.npy"
    code.write_bytes(linking.to_bytes(executable()))
    environment = {**os.environ, "PATH": ""}
    environment.pop("CXX", None)
    done = subprocess.run(
        [sys.executable, "-c", LOAD, str(code), str(out)],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    x = np.arange(32, dtype="float32").reshape(4, 8)
    want = np.tile(np.maximum(x @ np.full((8, 3), 0.5, "float32"), 0), (2, 1)).ravel()
    np.testing.assert_allclose(np.load(out), want, rtol=1e-6)


def test_plain_module_and_executable_in_this_process():
    pytest.importorskip("tvm_ffi_orcjit", reason=JIT_MISSING)
    built = tvm.compile(tvm.IRModule({"double": double}), target=TARGET)
    for module in (built, built.mod):
        loaded = linking.load_bytes(memoryview(linking.to_bytes(module)))
        x = np.arange(100, dtype="float32")
        a, c = tvm.runtime.tensor(x), tvm.runtime.empty((100,), "float32")
        loaded["double"](a, c)
        np.testing.assert_array_equal(c.numpy(), 2 * x)


def test_several_modules_live_side_by_side():
    pytest.importorskip("tvm_ffi_orcjit", reason=JIT_MISSING)
    data = linking.to_bytes(executable())
    x = np.ones((2, 8), "float32")
    w = np.ones((8, 3), "float32")
    machines = [relax.VirtualMachine(linking.load_bytes(data), tvm.cpu()) for _ in range(3)]
    del machines[1]
    for vm in machines:
        got = vm["main"](tvm.runtime.tensor(x), tvm.runtime.tensor(w)).numpy()
        np.testing.assert_array_equal(got, np.full(12, 8.0))


def test_saving_needs_no_compiler_and_is_deterministic(monkeypatch):
    monkeypatch.setenv("PATH", "")
    built = executable()
    assert linking.to_bytes(built) == linking.to_bytes(built)


def test_missing_package_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "tvm_ffi_orcjit", None)
    with pytest.raises(MissingDependencyError, match=r"pip install .*apache-tvm-ffi-orcjit"):
        linking.load_bytes(linking.to_bytes(executable()))


def test_damaged_bytes_never_reach_the_linker(monkeypatch):
    monkeypatch.setitem(sys.modules, "tvm_ffi_orcjit", None)
    data = linking.to_bytes(executable())
    huge = data[:12] + b"\xff" * 8 + data[20:]
    empty = linking.MAGIC + bytes(4)
    cuts = [data[:n] for n in (0, 5, 9, 12, 15, 20, 100, len(data) // 2, len(data) - 1)]
    for broken in [*cuts, huge, empty, data + b"x", b"X" + data[1:]]:
        with pytest.raises(ArtifactError, match="again"):
            linking.load_bytes(broken)


def test_source_modules_are_refused():
    built = tvm.compile(tvm.IRModule({"double": double}), target=tvm.target.Target({"kind": "c"}))
    with pytest.raises(ArtifactError, match="only modules compiled for an llvm target"):
        linking.to_bytes(built)
