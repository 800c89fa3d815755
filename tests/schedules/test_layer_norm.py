"""The LayerNorm kernel against float64 numpy, on every ISA that this machine has."""

import re

import numpy as np
import pytest
import tvm

from tvmstruct.schedules.x86.layer_norm import PARALLEL_ELEMENTS, layer_norm
from tvmstruct.targets import ISAS, host_features

CPUS = {"avx512": "x86-64-v4", "avx2": "x86-64-v3", "sse": "x86-64"}
TOLERANCE = 3e-6  # float32 results of size 1 to 4
every_isa = pytest.mark.parametrize(
    "isa",
    [
        pytest.param(
            isa,
            id=isa.name,
            marks=pytest.mark.skipif(
                bool(isa.needs - host_features()), reason=f"host lacks {isa.needs}"
            ),
        )
        for isa in ISAS
    ],
)


def build(isa, func):
    target = tvm.target.Target({"kind": "llvm", "mcpu": CPUS[isa.name], "num-cores": 2})
    return tvm.compile(tvm.IRModule({"main": func}), target=target).mod


def reference(terms, epsilon, gamma=1.0, beta=0.0):
    total = sum(x.astype("float64") for x in terms)
    centred = total - total.mean(-1, keepdims=True)
    return centred / np.sqrt((centred**2).mean(-1, keepdims=True) + epsilon) * gamma + beta


def empty(shape):
    return tvm.runtime.tensor(np.full(shape, 7, "float32"))


@every_isa
@pytest.mark.parametrize("n", [1, 7, 20, 384, 1023])
def test_matches_reference(isa, n):
    rng = np.random.default_rng(n)
    lib = build(isa, layer_norm(isa, n=n, epsilon=1e-5))
    gamma, beta = rng.standard_normal((2, n), "float32")
    for rows in (0, 1, 5, PARALLEL_ELEMENTS // n + 3 if n > 99 else 17):  # serial and parallel
        x = rng.standard_normal((rows, n), "float32")
        out = empty((rows, n))
        lib["main"](*map(tvm.runtime.tensor, (x, gamma, beta)), out)
        want = reference([x], 1e-5, gamma, beta)
        np.testing.assert_allclose(out.numpy(), want, atol=TOLERANCE)


@every_isa
@pytest.mark.parametrize("residuals", [1, 3])
@pytest.mark.parametrize("keep_sum", [False, True])
def test_residuals(isa, residuals, keep_sum):
    rng = np.random.default_rng(residuals)
    terms = rng.standard_normal((residuals + 1, 9, 52), "float32")
    gamma, beta = rng.standard_normal((2, 52), "float32")
    func = layer_norm(isa, n=52, epsilon=1e-12, residuals=residuals, keep_sum=keep_sum)
    out, total = empty((9, 52)), empty((9, 52))
    arrays = map(tvm.runtime.tensor, (*terms, gamma, beta))
    build(isa, func)["main"](*arrays, out, *([total] if keep_sum else []))
    want = reference(list(terms), 1e-12, gamma, beta)
    np.testing.assert_allclose(out.numpy(), want, atol=TOLERANCE)
    if keep_sum:
        np.testing.assert_array_equal(total.numpy(), sum(terms[1:], start=terms[0]))


@every_isa
@pytest.mark.parametrize(("scale", "bias"), [(False, False), (True, False), (False, True)])
def test_without_scale_or_bias(isa, scale, bias):
    rng = np.random.default_rng(0)
    x, (vector,) = rng.standard_normal((3, 40), "float32"), rng.standard_normal((1, 40), "float32")
    out = empty((3, 40))
    arrays = [x, *([vector] if scale or bias else [])]
    func = layer_norm(isa, n=40, epsilon=1e-5, scale=scale, bias=bias)
    build(isa, func)["main"](*map(tvm.runtime.tensor, arrays), out)
    want = reference([x], 1e-5, vector if scale else 1.0, vector if bias else 0.0)
    np.testing.assert_allclose(out.numpy(), want, atol=TOLERANCE)


@every_isa
def test_a_mean_far_from_zero_costs_no_digits(isa):
    rng = np.random.default_rng(0)
    x = rng.standard_normal((4, 384), "float32") + np.float32(3e3)
    out = empty(x.shape)
    func = layer_norm(isa, n=384, epsilon=1e-5, scale=False, bias=False)
    build(isa, func)["main"](tvm.runtime.tensor(x), out)
    # The mean of float32 values near 3000 is known to 1e-3; E[x^2] - E[x]^2 would be off by 1.
    np.testing.assert_allclose(out.numpy(), reference([x], 1e-5), atol=1e-3)


@every_isa
def test_nan_stays_in_its_row(isa):
    x = np.random.default_rng(0).standard_normal((3, 100), "float32")
    x[1, 99] = np.nan
    out = empty(x.shape)
    func = layer_norm(isa, n=100, epsilon=1e-5, scale=False, bias=False)
    build(isa, func)["main"](tvm.runtime.tensor(x), out)
    np.testing.assert_array_equal(np.isnan(out.numpy()).all(1), [False, True, False])
    np.testing.assert_array_equal(np.isnan(out.numpy()).any(1), [False, True, False])


@pytest.mark.parametrize("isa", ISAS, ids=lambda isa: isa.name)
def test_assembly_calls_no_math_library(isa):
    assembly = build(isa, layer_norm(isa, n=384, epsilon=1e-5)).inspect_source("asm")
    assert not re.findall(r"call\w*\s+\S*(?:sqrt|fma|exp|pow)", assembly)
    assert "TVMBackendAllocWorkspace" not in assembly
