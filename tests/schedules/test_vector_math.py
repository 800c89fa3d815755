"""Error bounds, special values and generated code of the vector elementary functions."""

from collections.abc import Callable
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import tvm
from scipy import special
from tvm import relax, te, tirx
from tvm.ir import Expr
from tvm.s_tir import Schedule
from tvm.script import relax as R
from tvm.script import tirx as T

from tvmstruct.schedules import vector_math
from tvmstruct.schedules.vector_math import LowerVectorMath, replace_math

ISAS = [("x86-64", 1), ("x86-64", 4), ("haswell", 8), ("haswell", 16), ("skylake-avx512", 16)]
NEEDS = {"x86-64": "sse2", "haswell": "fma", "skylake-avx512": "avx512vl"}
BLOCK = 1 << 12
FLOAT_MAX = float(np.finfo("float32").max)

REFERENCES: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "exp": np.exp,
    "erf": special.erf,
    "tanh": np.tanh,
    "sigmoid": special.expit,
    "gelu": lambda x: x / 2 * (1 + special.erf(x / 2**0.5)),
    "gelu_tanh": lambda x: x / 2 * (1 + np.tanh((2 / np.pi) ** 0.5 * (x + 0.044715 * x**3))),
}
ABSOLUTE = {"erf": 1e-6, "tanh": 1e-6, "sigmoid": 1e-6}
LIBM = ("exp", "erf", "tanh", "nearbyint", "fma", "floor", "rint")


def elementwise(build: Callable[[Expr], Expr], size: int) -> tirx.PrimFunc:
    """Return the scalar kernel c[i] = build(a[i])."""

    @T.prim_func(s_tir=True)
    def main(a: T.handle, c: T.handle):
        A = T.match_buffer(a, (size,), "float32")
        C = T.match_buffer(c, (size,), "float32")
        for i in T.serial(size):
            with T.sblock("map"):
                vi = T.axis.spatial(size, i)
                C[vi] = build(A[vi])

    return main


def stencil(build: Callable[[Expr], Expr], size: int) -> tirx.PrimFunc:
    """Return b = build(a), c[i] = b[i] + b[size - 1 - i]: inlining b copies its bindings."""

    @T.prim_func(s_tir=True)
    def main(a: T.handle, c: T.handle):
        A = T.match_buffer(a, (size,), "float32")
        C = T.match_buffer(c, (size,), "float32")
        B = T.sblock_alloc_buffer((size,), "float32")
        for i in T.serial(size):
            with T.sblock("map"):
                vi = T.axis.spatial(size, i)
                B[vi] = build(A[vi])
        for i in T.serial(size):
            with T.sblock("add"):
                vi = T.axis.spatial(size, i)
                C[vi] = B[vi] + B[size - 1 - vi]

    return main


def compile_cpu(mod: tvm.IRModule | tirx.PrimFunc, mcpu: str) -> tvm.runtime.Module:
    return tvm.compile(mod, target=tvm.target.Target({"kind": "llvm", "mcpu": mcpu})).mod


@cache
def compiled(name: str, mcpu: str, lanes: int) -> tvm.runtime.Module:
    schedule = Schedule(elementwise(getattr(vector_math, name), BLOCK))
    (loop,) = schedule.get_loops(schedule.get_sblock("map"))
    _, unrolled, vector = schedule.split(loop, [None, 2, lanes])
    schedule.unroll(unrolled)
    if lanes > 1:
        schedule.vectorize(vector)
    return compile_cpu(schedule.mod, mcpu)


def run(module: tvm.runtime.Module, x: np.ndarray) -> np.ndarray:
    """Apply an elementwise kernel of BLOCK elements to any number of values."""
    padded = np.resize(x, -(-x.size // BLOCK) * BLOCK).astype("float32")
    out = np.empty_like(padded)
    for start in range(0, padded.size, BLOCK):
        a = tvm.runtime.tensor(padded[start : start + BLOCK])
        c = tvm.runtime.empty((BLOCK,), "float32")
        module["main"](a, c)
        out[start : start + BLOCK] = c.numpy()
    return out[: x.size]


def every_exponent() -> np.ndarray:
    """Return 64 mantissas for each exponent and sign of float32, denormals and zeros included."""
    rng = np.random.default_rng(0)
    mantissa = rng.integers(0, 1 << 23, size=(255, 64), dtype=np.uint32)
    mantissa[:, :2] = [0, (1 << 23) - 1]
    bits = (np.arange(255, dtype=np.uint32)[:, None] << 23) | mantissa
    return np.concatenate([bits.ravel(), bits.ravel() | 1 << 31]).astype(np.uint32).view("float32")


def skip_unless(mcpu: str) -> None:
    flags = Path("/proc/cpuinfo")
    if flags.exists() and NEEDS[mcpu] not in flags.read_text():
        pytest.skip(f"this CPU has no {NEEDS[mcpu]}, which {mcpu} needs")


@pytest.fixture(params=ISAS, ids=lambda isa: f"{isa[0]}-{isa[1]}")
def isa(request: pytest.FixtureRequest) -> tuple[str, int]:
    skip_unless(request.param[0])
    return request.param


def test_exp_relative(isa):
    x = np.linspace(-87.3, 88.7, 1 << 18).astype("float32")
    got = run(compiled("exp", *isa), x)
    assert np.abs(got / np.exp(x.astype("float64")) - 1).max() <= 3e-7


def test_exp_on_every_exponent(isa):
    x = every_exponent()
    got = run(compiled("exp", *isa), x).astype("float64")
    want = np.exp(np.minimum(x, 100).astype("float64"))
    inside = (x >= -87.3) & (x <= 88.7)
    assert np.abs(got[inside] / want[inside] - 1).max() <= 3e-7
    assert np.abs(got[x < -87.3] - want[x < -87.3]).max() <= 1.2e-38
    assert np.isposinf(got[x >= 88.73]).all()


def test_exp_near_the_ends(isa):
    x = np.concatenate([np.linspace(-110, -87.3, 50000), np.linspace(88.73, 91, 5000)])
    x = x.astype("float32")
    got = run(compiled("exp", *isa), x).astype("float64")
    low = x < 0
    assert np.abs(got[low] - np.exp(x[low].astype("float64"))).max() <= 1.2e-38
    assert np.isposinf(got[~low]).all()
    np.testing.assert_array_equal(run(compiled("exp", *isa), np.zeros(1, "float32")), 1.0)


@pytest.mark.parametrize("name", ABSOLUTE)
def test_bounded_functions(name, isa):
    x = np.concatenate([every_exponent(), np.linspace(-12, 12, 1 << 18)]).astype("float32")
    got = run(compiled(name, *isa), x)
    want = REFERENCES[name](x.astype("float64"))
    assert np.abs(got - want).max() <= ABSOLUTE[name]
    assert np.abs(got).max() <= 1


@pytest.mark.parametrize("name", ["erf", "tanh"])
def test_odd_and_accurate_near_zero(name, isa):
    x = every_exponent()
    got = run(compiled(name, *isa), x)
    np.testing.assert_array_equal(got, -run(compiled(name, *isa), -x))
    normal = (np.abs(x) >= np.finfo("float32").tiny) & np.isfinite(x)
    relative = got[normal] / REFERENCES[name](x[normal].astype("float64")) - 1
    assert np.abs(relative).max() <= 5e-7
    assert np.signbit(got[np.signbit(x)]).all()


@pytest.mark.parametrize("name", ["gelu", "gelu_tanh"])
def test_gelu(name, isa):
    x = np.linspace(-12, 12, 1 << 18).astype("float32")
    got, want = run(compiled(name, *isa), x), REFERENCES[name](x.astype("float64"))
    assert (np.abs(got - want) <= 1e-6 * np.maximum(1, np.abs(x))).all()
    big = np.array([-FLOAT_MAX, -1e20, 1e20, FLOAT_MAX], "float32")
    np.testing.assert_allclose(run(compiled(name, *isa), big), np.maximum(big, 0), rtol=1e-6)


@pytest.mark.parametrize("name", REFERENCES)
def test_nan_and_infinity(name, isa):
    nans = np.array([0x7FC00000, 0x7F800001, 0x7FFFFFFF, 0xFF800001, 0xFFFFFFFF], "uint32")
    assert np.isnan(run(compiled(name, *isa), nans.view("float32"))).all()
    if not name.startswith("gelu"):
        ends = np.array([-np.inf, np.inf], "float32")
        want = REFERENCES[name](ends.astype("float64"))
        np.testing.assert_array_equal(run(compiled(name, *isa), ends), want)


@pytest.mark.parametrize("name", REFERENCES)
@pytest.mark.parametrize(("mcpu", "lanes"), ISAS)
def test_no_libm_call(name, mcpu, lanes):
    """Compiling needs no matching host, so every ISA is looked at everywhere."""
    source = compiled(name, mcpu, lanes).inspect_source("asm")
    calls = [line.split()[-1] for line in source.splitlines() if "call" in line.split("\t")[1:2]]
    calls += [line.split()[-1] for line in source.splitlines() if "\tcallq\t" in line]
    assert not [c for c in calls if any(c.lower().startswith(f) for f in LIBM)]
    register = {16: "%zmm", 8: "%ymm"}.get(lanes if mcpu != "haswell" else 8, "%xmm")
    assert register in source


@pytest.mark.parametrize("name", ["exp", "tanh", "gelu"])
def test_bindings_survive_inlining_and_unrolling(name):
    schedule = Schedule(stencil(getattr(vector_math, name), 64))
    schedule.compute_inline(schedule.get_sblock("map"))
    (loop,) = schedule.get_loops(schedule.get_sblock("add"))
    outer, inner = schedule.split(loop, [None, 4])
    schedule.unroll(outer)
    schedule.vectorize(inner)
    x = np.linspace(-3, 3, 64).astype("float32")
    a, c = tvm.runtime.tensor(x), tvm.runtime.empty((64,), "float32")
    compile_cpu(schedule.mod, "x86-64")["main"](a, c)
    want = REFERENCES[name](x.astype("float64"))
    np.testing.assert_allclose(c.numpy(), want + want[::-1], rtol=1e-6, atol=2e-6)


def test_functions_compose():
    """exp of exp of tanh: bindings inside the value of a binding."""
    chain = elementwise(
        lambda x: vector_math.exp(vector_math.exp(vector_math.tanh(vector_math.gelu(x)))), BLOCK
    )
    x = np.linspace(-3, 3, BLOCK).astype("float32")
    want = np.exp(np.exp(np.tanh(REFERENCES["gelu"](x.astype("float64")))))
    np.testing.assert_allclose(run(compile_cpu(chain, "x86-64"), x), want, rtol=1e-5)


def test_in_te_compute():
    a = te.placeholder((BLOCK,), name="a")
    c = te.compute((BLOCK,), lambda i: vector_math.gelu(a[i]), name="gelu")
    func = te.create_prim_func([a, c]).with_attr("global_symbol", "main")
    x = np.linspace(-5, 5, BLOCK).astype("float32")
    want = REFERENCES["gelu"](x.astype("float64"))
    np.testing.assert_allclose(run(compile_cpu(func, "x86-64"), x), want, atol=1e-6)


@pytest.mark.parametrize("name", vector_math.REPLACEMENTS)
def test_replace_math_before_and_after_scheduling(name):
    func = elementwise(getattr(tirx, name.removeprefix("tirx.")), BLOCK)
    schedule = Schedule(func)
    (loop,) = schedule.get_loops(schedule.get_sblock("map"))
    schedule.vectorize(schedule.split(loop, [None, 8])[1])
    x = np.linspace(-9, 9, BLOCK).astype("float32")
    want = REFERENCES[name.removeprefix("tirx.")](x.astype("float64"))
    for candidate in (replace_math(func), LowerVectorMath(schedule.mod)):
        assert name.replace("tirx.", "T.") + "(" not in candidate.script()
        np.testing.assert_allclose(
            run(compile_cpu(candidate, "x86-64"), x), want, rtol=3e-7, atol=1e-6
        )


def test_replace_math_leaves_other_types_and_functions():
    @T.prim_func(s_tir=True)
    def main(a: T.handle, b: T.handle):
        A = T.match_buffer(a, (4,), "float64")
        B = T.match_buffer(b, (4,), "float32")
        for i in T.serial(4):
            with T.sblock("map"):
                vi = T.axis.spatial(4, i)
                A[vi] = T.exp(A[vi])
                B[vi] = T.sqrt(B[vi])

    tvm.ir.assert_structural_equal(replace_math(main), main)


def test_fused_relax_gelu_and_softmax():
    """What LegalizeOps and FuseTIR make of a graph contains no libm call afterwards."""
    builder = relax.BlockBuilder()
    x = relax.Var("x", R.Tensor((4, 32), "float32"))
    with builder.function("main", [x]):
        y = builder.emit(relax.op.nn.softmax(relax.op.nn.gelu(x)))
        builder.emit_func_output(y)
    mod = relax.transform.LegalizeOps()(builder.get())
    mod = LowerVectorMath(mod)
    assert "T.erf(" not in mod.script()
    assert "T.exp(" not in mod.script()
    vm = relax.VirtualMachine(
        relax.build(mod, tvm.target.Target({"kind": "llvm", "mcpu": "x86-64"})), tvm.cpu()
    )
    value = np.random.default_rng(0).normal(size=(4, 32)).astype("float32")
    got = vm["main"](tvm.runtime.tensor(value)).numpy()
    want = special.softmax(REFERENCES["gelu"](value.astype("float64")), axis=-1)
    np.testing.assert_allclose(got, want, atol=1e-6)
