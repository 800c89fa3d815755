"""Kernels for x86: one file per kernel, and the class through which passes ask for them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields, replace

from tvm import tirx

from tvmstruct.ops import Op
from tvmstruct.schedules.compute.dense import Epilogue
from tvmstruct.schedules.compute.embedding import EmbeddingSum
from tvmstruct.schedules.compute.hash_tables import Tables
from tvmstruct.schedules.compute.recurrence import Recurrence
from tvmstruct.schedules.compute.sequence import Member
from tvmstruct.schedules.registry import Kernel, make_kernel
from tvmstruct.schedules.x86 import (
    feed_forward,
    hash_tables,
    minimal_attention,
    minimal_element,
    projected_attention,
    recurrence,
    sequence,
    streamed_attention,
    wide_tile,
)
from tvmstruct.schedules.x86.attention import Heads, attention
from tvmstruct.schedules.x86.chain import chain
from tvmstruct.schedules.x86.embedding_rows import embedding_rows
from tvmstruct.schedules.x86.generic import schedule_generic
from tvmstruct.schedules.x86.layer_norm import layer_norm
from tvmstruct.schedules.x86.packed_dense import packed_dense, panel_width
from tvmstruct.schedules.x86.precisions import (
    Precision,
    multiplies_bytes,
    precision,
    product_form,
)
from tvmstruct.skipping import Skip
from tvmstruct.stages import Program
from tvmstruct.targets import Isa


class X86Kernels:
    """The kernels of one x86 instruction set."""

    def __init__(
        self,
        isa: Isa,
        threads: int = 1,
        features: frozenset[str] = frozenset(),
        *,
        least_memory: bool = False,
        skip: Skip | None = None,
    ) -> None:
        self.isa = replace(isa, dots=multiplies_bytes(isa, features))
        self.threads, self.features = threads, features
        self.least_memory, self.skip = least_memory, skip
        self.lanes = isa.lanes
        self.panel_width = panel_width(isa)

    def packed_dense(self, n: int, k: int, epilogue: Epilogue, rows: int) -> Kernel:
        """Return ``y = epilogue(x @ w)`` with w packed in panels of ``panel_width``."""
        return packed_dense(self.isa, n, k, epilogue, rows)

    def precision(self, name: str) -> Precision:
        """Return how dense layers of a precision other than f32 are computed, or TargetError."""
        return precision(name, self.isa, self.features)

    def product_form(self, precision: str) -> str:
        """Return the form of the products of a structured operator in a precision."""
        return product_form(precision, self.isa, self.features)

    def chain(self, program: Program, epilogue: Epilogue, rows: int, macs: int) -> Kernel:
        """Return a structured operator as one kernel."""
        return chain(self.isa, program, epilogue, rows, macs, self.threads)

    def joins(self, op: Op, precision: str, rows: int) -> bool:
        """Return whether so few rows of a layer are computed in one kernel with its neighbours."""
        return sequence.pays(self.isa, op, precision, rows, self.threads)

    def sequence(self, members: Sequence[Member], inputs: Sequence[int], rows: int) -> Kernel:
        """Return layers in a row as one kernel."""
        return sequence.sequence(self.isa, members, inputs, rows, self.threads)

    def splits_feed_forward(self, sizes: tuple[int, int, int], rows: int) -> bool:
        """Return whether (k, hidden, n) in one kernel is legal and pays for so many rows."""
        _, hidden, n = sizes
        if self.least_memory:
            return feed_forward.legal(self.isa, n, hidden)
        return feed_forward.pays(self.isa, n, hidden, rows, self.threads)

    def feed_forward(
        self,
        sizes: tuple[int, int, int],
        up: Epilogue,
        down: Epilogue,
        rows: int,
    ) -> Kernel:
        """Return two dense layers in one."""
        block = feed_forward.block_rows(rows, self.threads)
        return feed_forward.feed_forward(self.isa, sizes, up, down, block)

    def attention(self, node, rows: int) -> Kernel:
        """Return fused attention for an `Attention` node; rows are its output rows."""
        heads = self._heads(node)
        if (count := streamed_attention.ranges(heads, rows, self.threads)) > 1:
            return streamed_attention.streamed_attention(heads, rows, count, self.threads)
        work = node.heads * node.key_length * (node.head_dim + node.value_dim)
        key = (*heads.key, self.threads if heads.skip else 0)
        return make_kernel("attention", key, lambda: attention(heads, self.threads), work=work)

    def projects_attention(self, node, n: int, rows: int) -> bool:
        """Return whether attention and its projection to n in one kernel is legal and pays."""
        return projected_attention.pays(self._heads(node), n, rows, self.threads)

    def projected_attention(self, node, n: int, epilogue: Epilogue, rows: int) -> Kernel:
        """Return fused attention and its output projection in one."""
        heads = self._heads(node)
        return projected_attention.projected_attention(heads, n, epilogue, rows, self.threads)

    def minimises_attention(self, n: int) -> bool:
        """Return whether attention that makes q, k and v can be projected to n features."""
        return minimal_attention.legal(self.isa, n)

    def source_heads(self, node) -> tuple[int, int, int]:
        """Return the heads of q, k and v of an `Attention` node."""
        return minimal_element.source_heads(self._heads(node))

    def minimal_attention(
        self, node, sources: Sequence, epilogue: Epilogue, shape: tuple[int, ...]
    ) -> Kernel:
        """Return attention that makes q, k and v and projects its result to ``shape``."""
        q, k, v = (
            minimal_element.Source(layer.op.n_in, layer.bias is not None) for layer in sources
        )
        ratio = 1.0 if self.skip is None else self.skip.zero_ratio
        sizes = minimal_element.Sizes(self._heads(node), (q, k, v), shape[1], epilogue, ratio)
        return minimal_attention.minimal_attention(sizes, shape[0], self.threads)

    def _heads(self, node) -> Heads:
        """Return the static side of an `Attention` node."""
        names = (field.name for field in fields(Heads) if field.name not in ("isa", "skip"))
        options = {name: getattr(node, name) for name in names}
        skip = None if self.skip is None else (self.skip.threshold, self.skip.raw)
        return Heads(self.isa, **options, skip=skip)

    def skip_grain(self, node, *, makes_values: bool = False) -> tuple[int, int, int]:
        """Return the keys of a chunk, and the queries that skip an exp and a product together."""
        heads = self._heads(node)
        problem = minimal_element.tile_problem(heads) if makes_values else heads.problem
        if problem.narrow:
            return problem.chunk, 1, 1
        return problem.chunk, problem.tile, wide_tile.group_size(problem)

    def hashes(self, tables: Tables) -> bool:
        """Return whether there is a kernel for so many entries of a table."""
        return hash_tables.legal(tables)

    def hash_tables(self, tables: Tables, rows: int) -> Kernel:
        """Return codes, gathers and weighted sums of a LookupFFN layer."""
        return hash_tables.hash_tables(self.isa, tables, rows, self.threads)

    def unit_width(self, precision: str) -> int:
        """Return the vectors of units whose recurrent gates lie together in a hidden matrix."""
        return recurrence.unit_width(precision)

    def recurrence(self, r: Recurrence, programs: Sequence[Sequence[Program | None]]) -> Kernel:
        """Return all steps of a recurrent layer, with the programs of structured matrices."""
        return recurrence.recurrence(self.isa, r, programs, self.threads)

    def layer_norm(self, n: int, epsilon: float) -> Kernel:
        """Return layer normalisation over rows of n features."""
        key = (self.isa.name, n, epsilon)
        return make_kernel(
            "layer_norm", key, lambda: layer_norm(self.isa, n=n, epsilon=epsilon), work=n
        )

    def embedding_rows(self, total: EmbeddingSum) -> Kernel:
        """Return a sum of embedding rows, normalised where it says so."""
        return embedding_rows(self.isa, total)

    def schedule(self, func: tirx.PrimFunc) -> tirx.PrimFunc:
        """Schedule a PrimFunc that no kernel of ours stands for."""
        return schedule_generic(func, self.isa)
