"""Kernels for x86: one file per kernel, and the class through which passes ask for them."""

from __future__ import annotations

from tvm import tirx

from tvmstruct.schedules.compute.dense import Epilogue
from tvmstruct.schedules.registry import Kernel, make_kernel
from tvmstruct.schedules.x86 import feed_forward
from tvmstruct.schedules.x86.attention import attention
from tvmstruct.schedules.x86.chain import chain
from tvmstruct.schedules.x86.generic import schedule_generic
from tvmstruct.schedules.x86.layer_norm import layer_norm
from tvmstruct.schedules.x86.packed_dense import packed_dense, panel_width
from tvmstruct.schedules.x86.precisions import Precision, precision
from tvmstruct.stages import Program
from tvmstruct.targets import Isa


class X86Kernels:
    """The kernels of one x86 instruction set."""

    def __init__(self, isa: Isa, threads: int = 1, features: frozenset[str] = frozenset()) -> None:
        self.isa, self.threads, self.features = isa, threads, features
        self.lanes = isa.lanes
        self.panel_width = panel_width(isa)

    def packed_dense(self, n: int, k: int, epilogue: Epilogue, rows: int) -> Kernel:
        """Return ``y = epilogue(x @ w)`` with w packed in panels of ``panel_width``."""
        return packed_dense(self.isa, n, k, epilogue, rows)

    def precision(self, name: str) -> Precision:
        """Return how dense layers of a precision other than f32 are computed, or TargetError."""
        return precision(name, self.isa, self.features)

    def chain(self, program: Program, epilogue: Epilogue, rows: int, macs: int) -> Kernel:
        """Return a structured operator as one kernel."""
        return chain(self.isa, program, epilogue, rows, macs, self.threads)

    def splits_feed_forward(self, sizes: tuple[int, int, int], rows: int) -> bool:
        """Return whether (k, hidden, n) in one kernel is legal and pays for so many rows."""
        _, hidden, n = sizes
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
        parameters = {
            name: getattr(node, name)
            for name in (
                "heads", "head_dim", "value_dim", "query_length", "key_length", "scale",
                "q_layout", "k_layout", "v_layout", "mask", "mask_dims",
                "causal", "kv_heads",
            )
        }  # fmt: skip
        work = node.heads * node.key_length * (node.head_dim + node.value_dim)
        key = (self.isa.name, *parameters.values())
        return make_kernel("attention", key, lambda: attention(self.isa, **parameters), work=work)

    def layer_norm(self, n: int, epsilon: float) -> Kernel:
        """Return layer normalisation over rows of n features."""
        key = (self.isa.name, n, epsilon)
        return make_kernel(
            "layer_norm", key, lambda: layer_norm(self.isa, n=n, epsilon=epsilon), work=n
        )

    def schedule(self, func: tirx.PrimFunc) -> tirx.PrimFunc:
        """Schedule a PrimFunc that no kernel of ours stands for."""
        return schedule_generic(func, self.isa)
