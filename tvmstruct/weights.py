"""Weights in the layout that kernels read: made once, shared by every bucket."""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Callable

import numpy as np
import tvm

from tvmstruct import compat, ops
from tvmstruct.arrays import aligned_empty
from tvmstruct.parts import lower_parts
from tvmstruct.stages import Program

LARGE = 4 << 20  # bytes from which on numpy asks the system for large pages


class WeightStore:
    """Packed tensors by key. One store belongs to one compiled model and its buckets."""

    def __init__(self) -> None:
        self.tensors: dict[str, tvm.runtime.Tensor] = {}
        self._programs: dict[str, Program] = {}
        self._names: dict[int, str] = {}
        self._lock = threading.Lock()

    def tensor(self, key: str, make: Callable[[], np.ndarray]) -> tvm.runtime.Tensor:
        """Return the tensor called ``key``, made on first use."""
        with self._lock:
            if key not in self.tensors:
                self.add(key, _held(np.ascontiguousarray(make())))
            return self.tensors[key]

    def add(self, key: str, tensor: tvm.runtime.Tensor) -> None:
        """Take a tensor that exists already, under its own memory."""
        self.tensors[key] = tensor
        self._names[compat.address(tensor)] = key

    def small(self, prefix: str, array: np.ndarray) -> tvm.runtime.Tensor:
        """Return the tensor of a small array that is known by its content, such as a bias."""
        digest = hashlib.sha256(np.ascontiguousarray(array).tobytes()).hexdigest()[:24]
        return self.tensor(f"{prefix}#{digest}", lambda: array)

    def program(
        self, key: str, op: ops.Op, lanes: int, form: str = "float", parts: int = 1
    ) -> Program:
        """Return the stages of a structured operator, lowered once; see `lower_parts`."""
        if key not in self._programs:
            self._programs[key] = lower_parts(op, lanes, parts, form=form)
        return self._programs[key]

    def name(self, tensor: tvm.runtime.Tensor) -> str:
        """Return the key of a tensor, taking it in under its content where it is new."""
        address = compat.address(tensor)
        with self._lock:
            key = self._names.get(address)
            if key is not None and self.tensors[key].shape == tensor.shape:
                return key
            digest = hashlib.sha256(str(tensor.dtype).encode() + tensor.numpy().tobytes())
            key = f"constant#{'x'.join(map(str, tensor.shape))}#{digest.hexdigest()[:24]}"
            if key not in self.tensors:
                self.add(key, tensor)
            return key


def _held(array: np.ndarray) -> tvm.runtime.Tensor:
    """Return a tensor with a copy of ``array``, large ones on pages of 2 MB where there are any.

    Rows gathered from tables of many megabytes would else miss the translation of their address
    each time.
    """
    if array.nbytes < LARGE:
        return tvm.runtime.tensor(array)
    held = aligned_empty(array.shape, array.dtype)
    held[...] = array
    return tvm.runtime.from_dlpack(held)
