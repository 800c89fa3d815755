"""What activation and LayerNorm cost where they are the end of another layer's kernel.

They have no time of their own there, so the same kernel is timed with and without them, on
random data and in turns. The best times count, for whatever else runs only adds to them; a
negative difference is noise and counts as zero.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import singledispatch
from typing import TYPE_CHECKING

import numpy as np
import tvm
from tvm import relax

from tvmstruct import compat
from tvmstruct.building import build_library
from tvmstruct.layers import FeedForward, Layer, LayerTable, Node, ProjectedAttention
from tvmstruct.measure import random_array
from tvmstruct.passes.emit_kernels import EmitKernels
from tvmstruct.profiling.classes import ACTIVATION, NORM
from tvmstruct.schedules.registry import Kernel

if TYPE_CHECKING:
    from tvmstruct.passes.emit_kernels import KernelCall
    from tvmstruct.pipeline import Lowered, Session

ROUNDS, ROUND_MS = 7, 2
SCALE_AND_SHIFT = 2  # arguments of a normalisation, the last before the output
MOST_ARGUMENTS = 8  # of a node


@dataclass(frozen=True)
class _Variant:
    """A node without one part of its epilogue, and how many last arguments that part had."""

    name: str
    node: Layer | FeedForward | ProjectedAttention
    dropped: int = 0


def epilogue_shares(session: Session, lowered: Lowered) -> dict[str, Mapping[str, float]]:
    """Return the share of a kernel's time that its activation and its LayerNorm take.

    Keys are symbols of kernels, then names of classes.
    """
    found: dict[str, Mapping[str, float]] = {}
    for call in lowered.calls:
        if call.symbol not in found and (variants := list(_variants(call.node))):
            found[call.symbol] = _compare(session, call, variants)
    return found


@singledispatch
def _variants(node: object) -> Iterator[_Variant]:
    """Yield a node without its activation and without its normalisation, as far as it has them."""
    yield from ()


@_variants.register
def _(node: Layer) -> Iterator[_Variant]:
    if node.activation != "none":
        yield _Variant(ACTIVATION, replace(node, activation="none"))
    if node.norm is not None:
        yield _Variant(NORM, replace(node, norm=None), SCALE_AND_SHIFT)


@_variants.register
def _(node: FeedForward) -> Iterator[_Variant]:
    if node.up.activation != "none":
        yield _Variant(ACTIVATION, replace(node, up=replace(node.up, activation="none")))
    if node.down.norm is not None:
        yield _Variant(NORM, replace(node, down=replace(node.down, norm=None)), SCALE_AND_SHIFT)


@_variants.register
def _(node: ProjectedAttention) -> Iterator[_Variant]:
    if (layer := node.projection).norm is not None:
        less = replace(node, projection=replace(layer, norm=None))
        yield _Variant(NORM, less, SCALE_AND_SHIFT)


def _compare(session: Session, call: KernelCall, variants: Sequence[_Variant]) -> dict[str, float]:
    # As they are untuned, for no record has the kernel without a part.
    kernels = [_kernel(session, call, n) for n in (call.node, *(v.node for v in variants))]
    dropped = [0, *(v.dropped for v in variants)]
    funcs = {kernel.symbol: kernel.func for kernel in kernels}
    library = build_library(tvm.IRModule(funcs), session.spec.target)
    rng = np.random.default_rng(0)
    *inputs, out = (
        tvm.runtime.tensor(random_array(rng, *pair))
        for pair in zip(call.shapes, call.dtypes, strict=True)
    )
    timers = [
        library.time_evaluator(k.symbol, tvm.cpu(), number=1, repeat=1, min_repeat_ms=ROUND_MS)
        for k in kernels
    ]
    arguments = [[*inputs[: len(inputs) - n], out] for n in dropped]
    rounds = [
        [float(timer(*args).mean) for timer, args in zip(timers, arguments, strict=True)]
        for _ in range(ROUNDS)
    ]
    whole, *less = np.min(rounds, axis=0)
    return {
        variant.name: max(0.0, 1.0 - float(seconds / whole))
        for variant, seconds in zip(variants, less, strict=True)
    }


def _kernel(session: Session, call: KernelCall, node: Node) -> Kernel:
    """Return the default kernel of a node; of its arguments it asks for nothing but a name."""
    emit = EmitKernels(LayerTable(), session.kernels, session.store, scales=session.scales)
    shape = call.shapes[-1]
    any_tensor = compat.tensor_type(shape, "float32")
    arguments = [relax.Var(f"a{i}", any_tensor) for i in range(MOST_ARGUMENTS)]
    return emit.kernel_of(node, arguments, shape)
