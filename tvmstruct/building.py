"""Kernels to machine code, without the pass that only schedules need."""

from __future__ import annotations

from collections.abc import Mapping

import tvm
from tvm.ir.instrument import pass_instrument
from tvm.s_tir import SBlockRealize
from tvm.tirx import PrimFunc

COMPACTION = "s_tir.CompactBufferAllocation"


def build_kernels(
    functions: Mapping[str, PrimFunc], target: tvm.target.Target
) -> dict[str, tvm.runtime.Module]:
    """Return by symbol the library that each function is in."""
    kinds = {name: _is_scheduled(func) for name, func in functions.items()}
    libraries: dict[str, tvm.runtime.Module] = {}
    for kind in dict.fromkeys(kinds.values()):
        group = {name: func for name, func in functions.items() if kinds[name] is kind}
        libraries |= dict.fromkeys(group, build_library(tvm.IRModule(group), target))
    return libraries


def build_library(mod: tvm.IRModule, target: tvm.target.Target) -> tvm.runtime.Module:
    """Return a module of PrimFuncs as one library.

    Kernels that are written out, not scheduled, allocate what they use and no more. TVM would
    bound each of their accesses to shrink the allocations, and where rows are a symbol that takes
    most of the time of a build, for a size with dozens of minima and maxima that every call
    evaluates.
    """
    if any(_is_scheduled(func) for func in mod.functions.values()):
        return tvm.compile(mod, target=target).mod
    outer = tvm.transform.PassContext.current()
    less = [_WithoutCompaction()]
    with tvm.transform.PassContext(outer.opt_level, instruments=less, config=outer.config):
        return tvm.compile(mod, target=target).mod


def _is_scheduled(func: PrimFunc) -> bool:
    """Return whether a function is blocks under a root, as only a schedule makes it."""
    return isinstance(func.body, SBlockRealize)


@pass_instrument
class _WithoutCompaction:
    """Leaves one pass out of the pipeline."""

    def should_run(self, mod: tvm.IRModule, info: tvm.transform.PassInfo) -> bool:
        """Return whether to run a pass."""
        return info.name != COMPACTION
