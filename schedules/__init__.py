"""Kernels: what they compute (``compute/``), and how, one folder per target."""

from __future__ import annotations

from typing import Protocol

from tvm import tirx

from tvmstruct.schedules.compute.dense import Epilogue
from tvmstruct.schedules.registry import Kernel
from tvmstruct.stages import Program


class Kernels(Protocol):
    """What a target folder offers to the passes."""

    lanes: int
    panel_width: int

    def packed_dense(self, n: int, k: int, epilogue: Epilogue, rows: int) -> Kernel:
        """Return a dense layer on packed weights."""
        ...

    def chain(self, program: Program, epilogue: Epilogue, rows: int, macs: int) -> Kernel:
        """Return a structured operator."""
        ...

    def splits_feed_forward(self, sizes: tuple[int, int, int], rows: int) -> bool:
        """Return whether (k, hidden, n) in one kernel is legal and pays for so many rows."""
        ...

    def feed_forward(
        self,
        sizes: tuple[int, int, int],
        activation: str,
        flags: tuple[bool, bool, bool],
        rows: int,
    ) -> Kernel:
        """Return two dense layers in one; flags: first bias, second bias, residual."""
        ...

    def attention(self, node, rows: int) -> Kernel:
        """Return fused attention."""
        ...

    def layer_norm(self, n: int, epsilon: float) -> Kernel:
        """Return layer normalisation."""
        ...

    def schedule(self, func: tirx.PrimFunc) -> tirx.PrimFunc:
        """Schedule any other PrimFunc."""
        ...
