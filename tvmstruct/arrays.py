"""Arrays in and out without copies: numpy, DLPack, and the 64-byte alignment of kernels."""

from __future__ import annotations

from typing import Any

import numpy as np
import tvm

from tvmstruct.errors import InputError

ALIGNMENT = 64  # compiled code loads whole vectors from the start of a buffer
KINDS = {"i": "integers", "u": "integers", "b": "booleans", "f": "floats"}


def aligned_empty(shape: tuple[int, ...], dtype: Any) -> np.ndarray:
    """Return an uninitialised C-contiguous array that a model takes without a copy."""
    dtype = np.dtype(dtype)
    size = int(np.prod(shape)) * dtype.itemsize
    raw = np.empty(size + ALIGNMENT, np.uint8)
    start = -raw.ctypes.data % ALIGNMENT
    return raw[start : start + size].view(dtype).reshape(shape)


def as_array(name: str, value: Any, dtype: str) -> np.ndarray:
    """Return ``value`` as a numpy array of ``dtype``, or say why that would change it."""
    if not isinstance(value, np.ndarray):
        value = _import(name, value)
    if value.dtype == dtype:
        return value
    want = np.dtype(dtype)
    if value.dtype.kind in KINDS and np.can_cast(value.dtype, want, "safe"):
        return value.astype(want)
    hint = ""
    if want.kind in "iu" and value.dtype.kind == "f":
        bad = "NaN or infinite values" if not np.isfinite(value).all() else "floats"
        hint = f" (it holds {bad} where ids are expected)"
    raise InputError(
        f"input {name!r} has dtype {value.dtype}{hint}; the model takes {dtype}: "
        f'convert it with array.astype("{dtype}") if that is what you mean'
    )


def _import(name: str, value: Any) -> np.ndarray:
    try:
        if hasattr(value, "__dlpack__"):
            return np.from_dlpack(value)
        array = np.asarray(value)
    except (ValueError, TypeError, BufferError, RuntimeError) as error:
        raise InputError(f"input {name!r} is no array: {error}") from error
    if array.dtype.kind not in KINDS:
        raise InputError(
            f"input {name!r} is a {type(value).__name__} of dtype {array.dtype}; "
            "want a numpy array or anything with DLPack"
        )
    return array


def to_numpy(tensor: tvm.runtime.Tensor) -> np.ndarray:
    """Return a view of a tensor; bfloat16, which numpy lacks, comes as a float32 copy."""
    try:
        return np.from_dlpack(tensor)
    except (BufferError, RuntimeError):
        return tensor.numpy().astype(np.float32)
