"""Helpers to build and run single kernels on every instruction set that the host has."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np
import pytest
import tvm

from tvmstruct.building import build_library
from tvmstruct.schedules.compute.dense import Epilogue
from tvmstruct.schedules.registry import Pick, pick_default
from tvmstruct.targets import ISAS, Isa

CPUS = {"avx512": "x86-64-v4", "avx2": "x86-64-v3", "sse": "x86-64"}
every_isa = pytest.mark.parametrize(
    "isa", [pytest.param(isa, id=isa.name, marks=pytest.mark.isa(isa.name)) for isa in ISAS]
)
GUARD = np.float32(-7.25)  # what lies around an output: kernels must not touch it


def build(isa: Isa, kernels: Mapping[str, tvm.tirx.PrimFunc]) -> tvm.runtime.Module:
    """Compile PrimFuncs for an ISA as one library."""
    target = tvm.target.Target({"kind": "llvm", "mcpu": CPUS[isa.name], "num-cores": 2})
    named = {n: f.with_attr("global_symbol", n) for n, f in kernels.items()}
    return build_library(tvm.IRModule(named), target)


def random_picks(rng: np.random.Generator, count: int) -> list[Pick]:
    """Return what a schedule suggests by itself, and answers at random."""

    def pick(name: str, options: Sequence[int], default: int) -> int:
        assert default in options
        assert len(set(options)) == len(options)
        return int(options[rng.integers(len(options))])

    return [pick_default, *[pick] * count]


def tensor(array: np.ndarray) -> tvm.runtime.Tensor:
    """Return an aligned tensor with a float32 copy of an array."""
    return tvm.runtime.tensor(np.ascontiguousarray(array, np.float32))


def call(function, arrays: list[np.ndarray], rows: int, columns: int) -> np.ndarray:
    """Call a kernel and return its (rows, columns) result, checked to stay inside its buffer."""
    flat = tvm.runtime.tensor(np.full(rows * columns + 64, GUARD, np.float32))
    view = np.from_dlpack(flat)
    out = tvm.runtime.from_dlpack(view[: rows * columns].reshape(rows, columns))
    function(*(a if isinstance(a, tvm.runtime.Tensor) else tensor(a) for a in arrays), out)
    assert (view[rows * columns :] == GUARD).all(), "the kernel wrote past the end of its output"
    return view[: rows * columns].reshape(rows, columns).copy()


def activate(name: str, v: np.ndarray) -> np.ndarray:
    """Return an activation in float64."""
    from scipy.special import erf

    v = v.astype(np.float64)
    with np.errstate(over="ignore"):
        return {
            "none": lambda: v,
            "relu": lambda: np.maximum(v, 0),
            "tanh": lambda: np.tanh(v),
            "sigmoid": lambda: 1 / (1 + np.exp(-v)),
            "silu": lambda: v / (1 + np.exp(-v)),
            "gelu_sigmoid": lambda: v / (1 + np.exp(-1.702 * v)),
            "gelu": lambda: v / 2 * (1 + erf(v * math.sqrt(0.5))),
            "gelu_tanh": lambda: (
                v / 2 * (1 + np.tanh(math.sqrt(2 / math.pi) * (v + 0.044715 * v**3)))
            ),
        }[name]()


def finish(y: np.ndarray, epilogue: Epilogue, bias: np.ndarray, residual: np.ndarray) -> np.ndarray:
    """Return the epilogue of ``y`` in float64."""
    y = activate(epilogue.activation, y + bias if epilogue.bias else y)
    y = y + residual if epilogue.residual else y
    if epilogue.norm is None:
        return y
    gamma, beta = gamma_and_beta(y.shape[1])
    centred = y - y.mean(axis=1, keepdims=True)
    scale = np.sqrt((centred**2).mean(axis=1, keepdims=True) + epilogue.norm)
    return centred / scale * gamma + beta


def gamma_and_beta(n: int) -> list[np.ndarray]:
    """Return the scale and shift of the normalisation in ``finish``."""
    return [np.linspace(a, b, n, dtype=np.float32) for a, b in ((0.5, 1.5), (-1, 1))]


def extras(epilogue: Epilogue, bias: np.ndarray, residual: np.ndarray) -> list[np.ndarray]:
    """Return the arguments of a kernel for its epilogue, in their order."""
    norm = [] if epilogue.norm is None else gamma_and_beta(bias.shape[0])
    return [bias] * epilogue.bias + [residual] * epilogue.residual + norm
