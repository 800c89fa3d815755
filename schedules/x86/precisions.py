"""Which dense kernel serves a precision on which CPU, and the tensors that it reads."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import numpy as np

from tvmstruct.errors import TargetError
from tvmstruct.rounding import BYTES, HALVES
from tvmstruct.schedules.compute.dense import Epilogue
from tvmstruct.schedules.compute.low_precision import (
    DYNAMIC,
    OFFSET,
    pack_words,
    pad_columns,
    quantize,
    recover_integers,
    round_bf16,
)
from tvmstruct.schedules.registry import Kernel
from tvmstruct.schedules.x86 import amx
from tvmstruct.schedules.x86.amx import amx_bf16_dense, amx_int8_dense
from tvmstruct.schedules.x86.bf16_dense import bf16_dense, bf16_weight_dense
from tvmstruct.schedules.x86.dynamic_dense import dynamic_dense
from tvmstruct.schedules.x86.int8_dense import int8_dense
from tvmstruct.schedules.x86.word_dense import panel_width
from tvmstruct.targets import Isa

BF16 = "avx512bf16"  # the features with the instructions
AMX_BF16 = {BF16, "amx-tile", "amx-bf16"}
AMX_INT8 = {"amx-tile", "amx-int8"}
VNNI = {"avx512": "avx512vnni", "avx2": "avxvnni"}

DYNAMIC_NOTE = "the source's integers, x rounded to bytes as in ONNX Runtime, exact int32 sums"

Build = Callable[[Isa, int, int, Epilogue, int], Kernel]  # isa, n, k, epilogue, rows


@dataclass(frozen=True)
class Precision:
    """How dense layers of one precision are computed on one CPU; ``note`` goes into the report."""

    name: str
    isa: Isa
    note: str
    names: tuple[str, ...]
    build: Build
    pack: Callable[..., Mapping[str, np.ndarray]]  # w, width, and scales where these are given

    def kernel(self, n: int, k: int, epilogue: Epilogue, rows: int) -> Kernel:
        """Return the kernel: x, the tensors of the weight in order, [bias], [residual], y."""
        return self.build(self.isa, n, k, epilogue, rows)

    def tensors(self, w: np.ndarray, scale: np.ndarray | None = None) -> Mapping[str, np.ndarray]:
        """Return what the kernel reads of a (k, n) weight, with the scales that it came with."""
        given = () if scale is None else (scale,)
        return self.pack(w, panel_width(self.isa), *given)


def precision(name: str, isa: Isa, features: frozenset[str]) -> Precision:
    """Return a precision on a CPU, or raise TargetError where the CPU cannot compute it."""
    if name == "int8":
        return _int8_precision(isa, features)
    if name == DYNAMIC:
        isa = replace(isa, dots=multiplies_bytes(isa, features))
        names = ("words", "sums", "shift", "scale")
        return Precision(name, isa, DYNAMIC_NOTE, names, dynamic_dense, _integers)
    if name == "bf16" and isa.name == "avx512":
        note = "x rounded to bf16, f32 sums"
        if AMX_BF16 <= features:
            return Precision(name, isa, f"{note}, AMX", ("words",), amx_bf16_dense, _bf16_tiles)
        if BF16 in features:
            return Precision(name, isa, note, ("words",), bf16_dense, _bf16)
    note = "weights in bf16, x and arithmetic in f32"
    if name == "bf16":
        note += f": the target has no {BF16}"
    return Precision(name, isa, note, ("words",), bf16_weight_dense, _bf16)


def product_form(name: str, isa: Isa, features: frozenset[str]) -> str:
    """Return the form of the products of structured layers in a precision."""
    if name == "bf16" and isa.name == "avx512" and BF16 in features:
        return HALVES
    return {"f32": "float", "int8": BYTES}.get(name, "pairs")


def _int8_precision(isa: Isa, features: frozenset[str]) -> Precision:
    note = "rows of x rounded to int8, exact int32 sums"
    if not multiplies_bytes(isa, features):
        raise TargetError(
            f'precision="int8" needs {" or ".join(VNNI.values())}, which this target does not '
            'have; "bf16" works on every target'
        )
    names = ("words", "start", "scale")
    if isa.name == "avx512" and AMX_INT8 <= features:
        return Precision("int8", isa, f"{note}, AMX", names, amx_int8_dense, _int8_tiles)
    return Precision("int8", isa, note, names, int8_dense, _int8)


def multiplies_bytes(isa: Isa, features: frozenset[str]) -> bool:
    """Return whether a CPU has an instruction for dot products of bytes."""
    return VNNI.get(isa.name) in features


def _integers(w: np.ndarray, width: int, scale: np.ndarray) -> Mapping[str, np.ndarray]:
    q, shift = recover_integers(w, scale)
    return {
        "words": pack_words(q, width),
        "sums": pad_columns(q.sum(axis=0, dtype=np.int32), width),
        "shift": np.array([shift], np.int32),
        "scale": pad_columns(scale.astype(np.float32), width),
    }


def _bf16(w: np.ndarray, width: int, multiple: int = 1) -> Mapping[str, np.ndarray]:
    return {"words": pack_words(round_bf16(w).view(np.uint16), width, multiple=multiple)}


def _int8(w: np.ndarray, width: int, multiple: int = 1) -> Mapping[str, np.ndarray]:
    q, scale = quantize(w)
    start = -OFFSET * q.sum(axis=0, dtype=np.int32)
    return {
        "words": pack_words(q, width, multiple=multiple),
        "start": pad_columns(start, width),
        "scale": pad_columns(scale, width),
    }


def _bf16_tiles(w: np.ndarray, width: int) -> Mapping[str, np.ndarray]:
    return _bf16(w, width, amx.ROWS)


def _int8_tiles(w: np.ndarray, width: int) -> Mapping[str, np.ndarray]:
    return _int8(w, width, amx.ROWS)
