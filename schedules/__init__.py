"""Kernels: what they compute (``compute/``), and how, one folder per target."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Protocol

import numpy as np
from tvm import tirx

from tvmstruct.ops import Op
from tvmstruct.schedules.compute.dense import Epilogue
from tvmstruct.schedules.compute.embedding import EmbeddingSum
from tvmstruct.schedules.compute.hash_tables import Tables
from tvmstruct.schedules.compute.recurrence import Recurrence
from tvmstruct.schedules.compute.sequence import Member
from tvmstruct.schedules.registry import Kernel
from tvmstruct.stages import Program


class Precision(Protocol):
    """Dense layers in a precision other than f32."""

    @property
    def names(self) -> tuple[str, ...]:
        """The tensors of a weight in the order that the kernel takes them."""
        ...

    @property
    def note(self) -> str:
        """What the report says of it."""
        ...

    def kernel(self, n: int, k: int, epilogue: Epilogue, rows: int) -> Kernel:
        """Return the kernel: x, the tensors ``names`` of the weight, [bias], [residual], y."""
        ...

    def tensors(self, w: np.ndarray, scale: np.ndarray | None = None) -> Mapping[str, np.ndarray]:
        """Return what the kernel reads of a (k, n) weight, with the scales that it came with."""
        ...


class Kernels(Protocol):
    """What a target folder offers to the passes."""

    threads: int
    lanes: int
    panel_width: int

    def packed_dense(self, n: int, k: int, epilogue: Epilogue, rows: int) -> Kernel:
        """Return a dense layer on packed weights."""
        ...

    def precision(self, name: str) -> Precision:
        """Return how dense layers of that precision are computed, or raise TargetError."""
        ...

    def product_form(self, precision: str) -> str:
        """Return the form of products of structured layers in a precision: see `stages.MatMul`."""
        ...

    def chain(self, program: Program, epilogue: Epilogue, rows: int, macs: int) -> Kernel:
        """Return a structured operator."""
        ...

    def joins(self, op: Op, precision: str, rows: int) -> bool:
        """Return whether so few rows of a layer are computed in one kernel with its neighbours."""
        ...

    def sequence(self, members: Sequence[Member], inputs: Sequence[int], rows: int) -> Kernel:
        """Return layers in a row: the inputs, all constants, y of the last."""
        ...

    def splits_feed_forward(self, sizes: tuple[int, int, int], rows: int) -> bool:
        """Return whether (k, hidden, n) in one kernel is legal and pays for so many rows."""
        ...

    def feed_forward(
        self,
        sizes: tuple[int, int, int],
        up: Epilogue,
        down: Epilogue,
        rows: int,
    ) -> Kernel:
        """Return two dense layers in one."""
        ...

    def attention(self, node, rows: int) -> Kernel:
        """Return fused attention."""
        ...

    def skip_grain(self, node, *, makes_values: bool = False) -> tuple[int, int, int]:
        """Return keys in a chunk, queries in a tile and queries skipped together, of a node.

        With ``makes_values`` they are those of `minimal_attention`.
        """
        ...

    def projects_attention(self, node, n: int, rows: int) -> bool:
        """Return whether attention and its projection to n in one kernel is legal and pays."""
        ...

    def projected_attention(self, node, n: int, epilogue: Epilogue, rows: int) -> Kernel:
        """Return fused attention and its output projection in one."""
        ...

    def minimises_attention(self, n: int) -> bool:
        """Return whether attention that makes q, k and v can be projected to n features."""
        ...

    def source_heads(self, node) -> tuple[int, int, int]:
        """Return the heads of q, k and v of an `Attention` node."""
        ...

    def minimal_attention(
        self, node, sources: Sequence, epilogue: Epilogue, shape: tuple[int, ...]
    ) -> Kernel:
        """Return attention that makes q, k and v and projects its result to ``shape``."""
        ...

    def hashes(self, tables: Tables) -> bool:
        """Return whether there is a kernel for so many entries of a table."""
        ...

    def hash_tables(self, tables: Tables, rows: int) -> Kernel:
        """Return codes, gathers and weighted sums of a LookupFFN layer."""
        ...

    def unit_width(self, precision: str) -> int:
        """Return the vectors of units whose recurrent gates lie together in a hidden matrix."""
        ...

    def recurrence(self, r: Recurrence, programs: Sequence[Sequence[Program | None]]) -> Kernel:
        """Return all steps of a recurrent layer: lengths, h, c, per direction z, weights, ...

        A direction has as many programs as a step has hidden products, None for dense ones.
        """
        ...

    def layer_norm(self, n: int, epsilon: float) -> Kernel:
        """Return layer normalisation."""
        ...

    def embedding_rows(self, total: EmbeddingSum) -> Kernel:
        """Return a sum of embedding rows."""
        ...

    def schedule(self, func: tirx.PrimFunc) -> tirx.PrimFunc:
        """Schedule any other PrimFunc."""
        ...
