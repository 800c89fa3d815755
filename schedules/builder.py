"""A few words on top of TVM's IR builder, so that kernels are written as plain Python.

The builder rather than the TVMScript parser: kernels here have optional arguments, lists of
row segments and unrolled tiles, which Python loops over while it builds.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager

from tvm import tirx
from tvm.script.ir_builder import IRBuilder
from tvm.script.ir_builder import tirx as T


def prim_func(body: Callable[[], None]) -> tirx.PrimFunc:
    """Run ``body`` inside a new S-TIR function without aliasing and return the function."""
    with IRBuilder() as builder:
        with T.prim_func(s_tir=True):
            T.func_name("main")
            T.func_attr({"tirx.noalias": True})
            body()
        return builder.get()


def argument(name: str, shape: tuple, dtype: str = "float32", **layout):
    """Declare the next argument of the function: a buffer called ``name``."""
    buffer = T.match_buffer(T.arg(name, T.handle()), shape, dtype, **layout)
    IRBuilder.name(name, buffer)
    return buffer


def symbol(name: str):
    """Declare a symbolic extent."""
    var = T.int64()
    IRBuilder.name(name, var)
    return var


def i64(value) -> object:
    """Return ``value`` as an int64 expression; all extents and indices are int64."""
    return T.int64(value) if isinstance(value, int) else value


@contextmanager
def loops(*extents, kind: Callable | None = None) -> Iterator[list]:
    """Nest serial loops (the first of ``kind``) over ``extents`` and yield their variables."""
    with ExitStack() as stack:
        variables = []
        for level, extent in enumerate(extents):
            loop = kind if kind is not None and level == 0 else T.serial
            variables.append(stack.enter_context(loop(T.int64(0), i64(extent))))
        yield variables


def vectors(lanes: int):
    """Open a vectorised loop over ``lanes`` elements, or a serial one over a single element."""
    return (T.vectorized if lanes > 1 else T.serial)(T.int64(0), T.int64(lanes))


@contextmanager
def block(
    name: str, spatial: list[tuple], reduce: Sequence[tuple] = (), **annotations: int
) -> Iterator[list]:
    """Open an sblock whose axes are ``(extent, binding)`` pairs and yield the axis variables."""
    with T.sblock(name):
        if annotations:
            T.sblock_attr({f"tvmstruct.{key}": value for key, value in annotations.items()})
        axes = [T.axis.spatial(i64(extent), binding) for extent, binding in spatial]
        axes += [T.axis.reduce(i64(extent), binding) for extent, binding in reduce]
        yield axes


def fma(a, b, c, lanes: int, fused: bool):
    """Return ``a * b + c`` on vectors; without hardware FMA ``llvm.fma`` is a slow libm call."""
    if not fused:
        return a * b + c
    return T.call_llvm_pure_intrin(
        T.llvm_lookup_intrinsic_id("llvm.fma"),
        a,
        b,
        c,
        dtype="float32" if lanes == 1 else f"float32x{lanes}",
    )
