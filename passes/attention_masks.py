"""Turn the masks of an attention into one additive tensor, or into ``causal``.

Masks are followed from the inside out with the arithmetic of the graph. What is constant is
kept apart from what is computed, so that a causal mask can be told from the rest.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from tvm import relax

from tvmstruct import compat
from tvmstruct.passes.attention_pattern import LOWEST, Add, Floor, Refused, Scale, Select, Step
from tvmstruct.passes.constant_values import evaluate
from tvmstruct.passes.factors import Axes, Factor, join_all, shape_of
from tvmstruct.passes.views import arrange, arrange_array, view
from tvmstruct.rewrite import Graph

R = relax.op
HIDDEN = -1e8  # a mask constant at most this low hides a key whether it is added or selected
HARMLESS = -1e6  # a mask that nowhere is lower leaves the hidden keys of HIDDEN hidden
SWALLOWS = -1e30  # added to a score, a number at most this low is left unchanged

Dims = Sequence[Sequence[Factor]]  # loops of batch, heads, queries and keys


@dataclass
class Masks:
    """The mask so far: a constant part, and a computed one, both (batch, heads, queries, keys)."""

    graph: Graph
    dims: Dims
    constant: np.ndarray | None = None
    computed: relax.Expr | None = None
    shape: tuple[int, ...] = (1, 1, 1, 1)  # of the computed part
    lows: set[float] = field(default_factory=set)  # what selects put in the place of scores
    hides: bool = False  # whether something that is added may hide keys, too

    def apply(self, step: Step, name: str) -> None:
        """Take one more step towards the softmax; the step's tensor moves by strides ``name``."""
        if isinstance(step, Scale):
            self._scale(step.factor)
        elif isinstance(step, Floor):
            self._floor()
        elif isinstance(step, Add):
            self._add(step, name)
        elif isinstance(step, Select):
            self._select(step, name)

    def _scale(self, factor: float) -> None:
        if any(map(math.isfinite, self.lows)) or (self.lows and factor <= 0):
            raise Refused(f"scores are scaled by {factor:g} after hidden ones were replaced")
        if self.constant is not None:
            self.constant = self.constant * np.float32(factor)
        if self.computed is not None:
            self.computed = R.multiply(self.computed, _const(factor))

    def _floor(self) -> None:
        if self.computed is not None:
            self.computed, self.constant = R.maximum(self._total(), _const(LOWEST)), None
        elif self.constant is not None:
            self.constant = np.maximum(self.constant, np.float32(LOWEST))

    def _add(self, step: Add, name: str) -> None:
        mask, shape = self.tensor(step.mask, name)
        if isinstance(mask, np.ndarray):
            mask = np.float32(step.sign) * mask
            self.hides |= bool(mask.min() < HARMLESS)
            self.constant = mask if self.constant is None else self.constant + mask
            return
        self.hides = True
        mask = mask if step.sign > 0 else R.negative(mask)
        self._put(mask if self.computed is None else R.add(self.computed, mask), shape)

    def _put(self, mask: relax.Expr, shape: tuple[int, ...]) -> None:
        self.computed, self.shape = mask, np.broadcast_shapes(shape, self.shape)

    def _select(self, step: Select, name: str) -> None:
        """Hide keys: add a number that swallows any score, or, over masks so far, replace them.

        Replacing -inf equals adding it.
        """
        keep, shape = self.tensor(step.keep, name)
        self.lows.add(step.low)
        low = step.low if math.isinf(step.low) else LOWEST
        empty = self.constant is None and self.computed is None
        if isinstance(keep, np.ndarray) and (self.computed is None or math.isinf(low)):
            below = np.float32(0) if self.constant is None else self.constant
            self.constant = np.where(keep == step.kept, below, np.float32(low))
            return
        below = _const(0.0) if empty or math.isinf(low) else self._total()
        keep = relax.const(keep) if isinstance(keep, np.ndarray) else keep
        chosen = R.where(keep, *((below, _const(low)) if step.kept else (_const(low), below)))
        if math.isinf(low) and self.computed is not None:
            chosen = R.add(self.computed, chosen)
        elif not math.isinf(low):
            self.constant = None
        self._put(chosen, shape)

    def _total(self) -> relax.Expr:
        if self.constant is None:
            assert self.computed is not None
            return self.computed
        constant = relax.const(np.ascontiguousarray(self.constant, np.float32))
        self.shape = np.broadcast_shapes(self.shape, self.constant.shape)
        return constant if self.computed is None else R.add(self.computed, constant)

    def tensor(
        self, expr: relax.Expr, name: str
    ) -> tuple[np.ndarray | relax.Expr, tuple[int, ...]]:
        """Return a step's tensor with the four axes, of extent 1 where it does not vary."""
        root = view(self.graph, expr, name).root
        dims = [[f for f in dim] if any(f.stride(name) for f in dim) else [] for dim in self.dims]
        shape = shape_of([tuple(dim) for dim in dims])
        array = evaluate(self.graph, root)
        return (
            arrange(root, name, dims) if array is None else arrange_array(array, name, dims)
        ), shape

    def finish(self) -> tuple[bool, relax.Expr | None, tuple[int, ...]]:
        """Return whether keys after the query are hidden; the rest of the mask; its shape."""
        weak = [low for low in self.lows if low > SWALLOWS]
        if weak and (self.hides or len(self.lows) > 1):
            raise Refused(
                f"keys are hidden by {weak[0]:g} and by another mask: a row without any other key "
                f"needs the lower of the two (want {LOWEST:.3g} or -inf)"
            )
        causal = self._take_causal()
        if self.constant is not None and not self.constant.any():
            self.constant = None
        if self.constant is None and self.computed is None:
            return causal, None, ()
        total = self._total()
        full = [math.prod(f.size for f in dim) for dim in self.dims]
        if self.shape[3] != full[3]:  # the kernel reads a value for every key
            self.shape = (*self.shape[:3], full[3])
            total = R.broadcast_to(total, self.shape)
        return causal, total, self.shape

    def _take_causal(self) -> bool:
        """Move hidden keys above the diagonal from the constant to the kernel, where exact.

        Query i always sees key 0, so its maximum is a score that no constant has lowered, and
        exp(score + constant - maximum) is zero unless scores differ by nearly 1e8: hiding such
        keys changes nothing. With a computed mask that no longer holds, since it may hide key 0
        as well, and a row without keys follows the arithmetic of finite masks; only -inf is
        independent of it.
        """
        if self.constant is None:
            return False
        queries, keys = (math.prod(f.size for f in dim) for dim in self.dims[2:])
        later = np.triu(np.ones((queries, keys), bool), 1)
        hidden = self.constant <= HIDDEN
        if not later.any() or not (hidden == later).all():
            return False
        gone = bool(np.isneginf(self.constant[hidden]).all())
        rest = np.where(hidden, np.float32(0), self.constant)
        if not gone and (self.computed is not None or rest.min() < HARMLESS):
            return False
        self.constant = rest
        return True


def meet(graph: Graph, step: Step, axes: Axes, name: str) -> Axes:
    """Return the axes of the scores with the strides of the step's mask, checking that it fits."""
    if isinstance(step, Add):
        expr = step.mask
    elif isinstance(step, Select):
        expr = step.keep
        if step.low > HIDDEN:
            raise Refused(
                f"scores are replaced by {step.low:g}, which hides no key (want <= {HIDDEN:g})"
            )
    else:
        return axes
    shape = compat.static_shape(expr)
    full = shape_of(axes)
    if (
        shape is None
        or len(shape) > len(full)
        or any(m not in (1, f) for m, f in zip(shape[::-1], full[::-1], strict=False))
    ):
        raise Refused(f"mask of shape {shape} does not broadcast to {full}")
    joined = join_all(axes, view(graph, expr, name).axes)
    if joined is None:
        raise Refused(f"mask of shape {shape} splits the axes of {full} in another way")
    return joined


def _const(value: float) -> relax.Expr:
    return relax.const(np.float32(value))
