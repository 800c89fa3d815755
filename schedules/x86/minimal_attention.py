"""Self- or cross-attention from x to its output projection, in the memory of Table III of NLP-Fast.

One head after the other: its queries (length x head_dim), then chunk after chunk of keys their k
and v (chunk x head_dim), scores, running softmax and weighted sum, and at the end its share of
the output projection. Of Q, K, V, S, P and A nothing larger exists at any time. Threads share
the rows of every step, or take an element of the batch each where there are enough.
"""

from __future__ import annotations

from tvm import tirx
from tvm.script.ir_builder import tirx as T

from tvmstruct.schedules.builder import argument, i64, loops, prim_func, symbol
from tvmstruct.schedules.compute.layer_norm import RowNorm
from tvmstruct.schedules.registry import Kernel, make_kernel
from tvmstruct.schedules.vector_math import replace_math
from tvmstruct.schedules.x86.minimal_element import Element, Sizes, head_dims, source_heads
from tvmstruct.schedules.x86.minimal_skipping import SkippingElement
from tvmstruct.schedules.x86.packed_dense import panel_width


def legal(isa, n: int) -> bool:
    """Return whether the kernel can compute a projection to n features."""
    return n % panel_width(isa) == 0


def minimal_attention(sizes: Sizes, rows: int, threads: int) -> Kernel:
    """Return the kernel: xq, xk, xv, wq, [bq], wk, [bk], wv, [bv], [mask], w, and the rest.

    The rest is [bias], [residual], [gamma, beta], y. wq, wk and wv are packed by `pack_heads`,
    their biases by `pad_heads`, w is in packed panels.
    """
    h = sizes.h
    within = rows // h.query_length < threads
    key = (*h.key, sizes.sources, sizes.n, sizes.epilogue, sizes.zero_ratio, within)
    made = sum(s.features * d for s, d in zip(sizes.sources, head_dims(h), strict=True)) * h.heads
    work = made + h.heads * (h.key_length * (h.head_dim + h.width) + h.width * sizes.n)
    return make_kernel("minimal_attention", key, lambda: _build(sizes, within), work=work)


def _build(sizes: Sizes, within: bool) -> tirx.PrimFunc:
    h, width = sizes.h, panel_width(sizes.h.isa)

    def body() -> None:
        rows, key_rows = symbol("rows"), symbol("key_rows")
        buffers = {}
        for name, source in zip("qkv", sizes.sources, strict=True):
            m = rows if name == "q" else key_rows
            buffers[f"x{name}"] = argument(f"x{name}", (m, i64(source.features)))
        for name, source, dim in zip("qkv", sizes.sources, head_dims(h), strict=True):
            panels = -(-dim // width)
            heads = source_heads(h)["qkv".index(name)]
            shape = (heads, panels, source.features, width)
            buffers[f"w{name}"] = argument(f"w{name}", tuple(map(i64, shape)))
            if source.bias:
                buffers[f"b{name}"] = argument(f"b{name}", (i64(heads * panels * width),))
        if h.mask != "none":
            buffers["mask"] = argument("mask", h.mask_shape())
        buffers["w"] = argument("w", (i64(sizes.n // width), i64(h.heads * h.width), i64(width)))
        if sizes.epilogue.bias:
            buffers["bias"] = argument("bias", (i64(sizes.n),))
        if sizes.epilogue.residual:
            buffers["residual"] = argument("residual", (rows, i64(sizes.n)))
        norm = RowNorm.declare(h.isa.lanes, sizes.n, sizes.epilogue.norm)
        buffers["y"] = argument("y", (rows, i64(sizes.n)))
        with loops(rows // h.query_length, kind=T.serial if within else T.parallel) as (element,):
            kind = Element if h.skip is None else SkippingElement
            kind(sizes, buffers, element, T.parallel if within else T.serial).emit(norm)

    return replace_math(prim_func(body))
