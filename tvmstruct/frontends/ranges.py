"""Bounds of integer tensors, to prove that every lookup stays inside its table."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import product
from math import prod

import numpy as np
from onnx import NodeProto

from tvmstruct.frontends.nodes import attribute

Range = tuple[int, int]
Shape = tuple[int, ...]

SAME = frozenset(
    """
    Cast Identity Reshape Squeeze Unsqueeze Transpose Expand Slice Split Flatten Tile Dropout
    ReduceMax ReduceMin Gather GatherElements GatherND
    """.split()
)
BOOLEAN = frozenset(
    "Equal Less LessOrEqual Greater GreaterOrEqual Not And Or Xor IsNaN IsInf".split()
)


def array_range(array: np.ndarray) -> Range | None:
    """Return the smallest and largest value of an integer or boolean array."""
    if array.dtype.kind not in "iub" or array.size == 0:
        return None
    return int(array.min()), int(array.max())


def node_range(
    node: NodeProto, ranges: Sequence[Range | None], shapes: Mapping[str, Shape]
) -> Range | None:
    """Return bounds of the first output of ``node``, given bounds of its inputs."""
    first = ranges[0] if ranges else None
    if node.op_type in BOOLEAN:
        return _compare(node.op_type, ranges) or (0, 1)
    if node.op_type in ("ArgMax", "ArgMin"):
        shape = shapes[node.input[0]]
        return 0, shape[attribute(node, "axis", 0)] - 1 if shape else 0
    if node.op_type == "Where":
        return _where(ranges)
    if first is None:
        return None
    if node.op_type in SAME:
        return first
    if node.op_type in ("CumSum", "ReduceSum"):
        shape = shapes[node.input[0]]
        axis = ranges[1] if len(ranges) > 1 else None
        exact = node.op_type == "CumSum" and axis is not None and -len(shape) <= axis[0]
        count = shape[axis[0]] if exact and axis[0] < len(shape) else prod(shape)
        return min(first[0], count * first[0], 0), max(first[1], count * first[1], 0)
    return _arithmetic(node.op_type, ranges)


def _where(ranges: Sequence[Range | None]) -> Range | None:
    condition, yes, no = ranges
    if condition == (0, 0):
        return no
    if condition == (1, 1):
        return yes
    return None if yes is None or no is None else (min(yes[0], no[0]), max(yes[1], no[1]))


def _compare(op: str, ranges: Sequence[Range | None]) -> Range | None:
    """Decide ``x < bound`` where the bounds of both sides do not overlap."""
    if op != "Less" or ranges[0] is None or ranges[1] is None:
        return None
    (low, high), (bound_low, bound_high) = ranges[0], ranges[1]
    if low >= bound_high:
        return 0, 0
    return (1, 1) if high < bound_low else None


def _arithmetic(op: str, ranges: Sequence[Range | None]) -> Range | None:
    known = [r for r in ranges if r is not None]
    if len(known) != len(ranges):
        return None
    lows, highs = [r[0] for r in known], [r[1] for r in known]
    if op in ("Min", "Max", "Clip"):
        return _clamp(op, lows, highs)
    if op in ("Concat", "Pad"):
        return (min(lows), max(highs)) if op == "Concat" else None
    if op in ("Add", "Sum"):
        return sum(lows), sum(highs)
    if op == "Sub":
        return lows[0] - highs[1], highs[0] - lows[1]
    if op in ("Div", "Mod"):
        return _divide(op, *known)
    if op == "Mul":
        corners = [a * b for a, b in product(known[0], known[1])]
        return min(corners), max(corners)
    return None


def _divide(op: str, number: Range, by: Range) -> Range | None:
    """Return quotient or remainder of numbers of 0 or more by one number above 0."""
    if by[0] != by[1] or by[0] < 1 or number[0] < 0:
        return None
    if op == "Div":
        return number[0] // by[0], number[1] // by[0]
    return 0, min(number[1], by[0] - 1)


def _clamp(op: str, lows: list[int], highs: list[int]) -> Range | None:
    if op == "Min":
        return min(lows), min(highs)
    if op == "Max":
        return max(lows), max(highs)
    if len(lows) != 3:
        return None
    return max(lows[0], lows[1]), min(max(highs[0], lows[1]), highs[2])
