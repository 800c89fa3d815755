"""Helpers to build and run the kernels of low precision."""

from __future__ import annotations

from copy import copy
from dataclasses import replace

import numpy as np
import tvm

from tests.kernels import GUARD, extras
from tvmstruct.building import build_library
from tvmstruct.schedules.compute.dense import Epilogue
from tvmstruct.schedules.registry import Kernel, Pick
from tvmstruct.schedules.x86.precisions import Precision, precision
from tvmstruct.targets import ISAS, TargetSpec, resolve

ROWS = (1, 3, 8, 17, 131)  # the last one is cut into blocks
SHAPES = [  # (n, k): whole and ragged panels, single columns, depths that end within a word
    (1, 1), (7, 33), (33, 7), (64, 64), (130, 63), (31, 1034), (40, 2),
]  # fmt: skip
TARGETS = {
    "avx512": {"mcpu": "x86-64-v4", "mattr": ["+avx512bf16", "+avx512vnni"]},
    "avx2": {"mcpu": "x86-64-v3", "mattr": ["+avxvnni"]},
    "sse": {"mcpu": "x86-64"},
}


def target(isa: str) -> TargetSpec:
    """Return the target of an ISA with its dot products."""
    return resolve({"kind": "llvm", "num-cores": 2, **TARGETS[isa]})


def choose(name: str, isa: str, features: set[str] | None = None) -> Precision:
    """Return a precision of an ISA; without ``features``, with all that the target has."""
    row = next(row for row in ISAS if row.name == isa)
    have = target(isa).features if features is None else frozenset(features)
    return precision(name, row, have)


def build(kernels: list[Kernel], isa: str) -> tvm.runtime.Module:
    """Compile kernels as one library."""
    functions = {kernel.symbol: kernel.func for kernel in kernels}
    return build_library(tvm.IRModule(functions), target(isa).target)


def call(function, arrays: list[np.ndarray], rows: int, columns: int) -> np.ndarray:
    """Call a kernel and return its (rows, columns) result, checked to stay inside its buffer."""
    flat = tvm.runtime.tensor(np.full(rows * columns + 64, GUARD, np.float32))
    view = np.from_dlpack(flat)
    out = tvm.runtime.from_dlpack(view[: rows * columns].reshape(rows, columns))
    function(*(tvm.runtime.tensor(np.ascontiguousarray(a)) for a in arrays), out)
    assert (view[rows * columns :] == GUARD).all(), "the kernel wrote past the end of its output"
    return view[: rows * columns].reshape(rows, columns).copy()


CHOSEN = [  # rows, n, k, epilogue: with a rest under the tile, the block, the panel and the word
    (24, 96, 128, Epilogue(True, "gelu", True)),
    (17, 70, 33, Epilogue()),
    (1, 100, 256, Epilogue(bias=True)),
    (131, 33, 45, Epilogue(False, "relu")),
]


def tuned(case: Case, picks: list[Pick]) -> list[Case]:
    """Return the case once for each pick, on kernels that are scheduled as it answers."""
    assert case.kernel.space is not None
    cases = [copy(case) for _ in picks]
    for i, (one, pick) in enumerate(zip(cases, picks, strict=True)):
        symbol = f"{case.kernel.symbol}_{case.rows}_{i}"
        func = case.kernel.space.build(case.rows, pick).with_attr("global_symbol", symbol)
        one.kernel = replace(case.kernel, symbol=symbol, func=func)
    return cases


class Case:
    """One kernel with its arrays."""

    def __init__(
        self,
        chosen: Precision,
        sizes: tuple[int, int],
        epilogue: Epilogue,
        rows: int,
        rng,
        scale: np.ndarray | None = None,  # of integers that the weights are
    ) -> None:
        self.sizes, self.epilogue, self.rows = sizes, epilogue, rows
        n, k = sizes
        self.kernel = chosen.kernel(n, k, epilogue, rows)
        self.x = rng.normal(size=(rows, k)).astype(np.float32)
        self.w = (rng.normal(size=(k, n)) / np.sqrt(k)).astype(np.float32)
        self.bias = rng.normal(size=n).astype(np.float32)
        self.residual = rng.normal(size=(rows, n)).astype(np.float32)
        if scale is not None:
            self.w = (rng.integers(-99, 156, (k, n)) * scale).astype(np.float32)
        self.tensors = list(chosen.tensors(self.w, scale).values())

    def run(self, library: tvm.runtime.Module) -> np.ndarray:
        """Return what the kernel computes."""
        more = extras(self.epilogue, self.bias, self.residual)
        arrays = [self.x, *self.tensors, *more]
        return call(library[self.kernel.symbol], arrays, len(self.x), self.sizes[0])
