"""Operators as JSON and arrays: how an expression travels in a graph, a file or a checkpoint."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields
from typing import Any

from tvmstruct import ops
from tvmstruct.errors import ModelError
from tvmstruct.ops import Array, Op

NODES: dict[str, type[Op]] = {
    node.__name__: node
    for node in (
        ops.Dense,
        ops.BlockDiag,
        ops.SharedBlockDiag,
        ops.Permute,
        ops.Diag,
        ops.WalshHadamard,
        ops.Slice,
        ops.Pad,
        ops.Sum,
        ops.Product,
    )
}
DEEPEST = 64  # of an expression that is read


def to_json(op: Op) -> tuple[list[Any], list[Array]]:
    """Return ``op`` as nested lists ``[node, field, ...]`` and the arrays that they number.

    An array that is used twice is one array with one number.
    """
    arrays = list(op.arrays())
    numbers = {ops.identity(a): i for i, a in enumerate(arrays)}

    def written(value: Any) -> Any:
        if isinstance(value, Op):
            return [type(value).__name__, *(written(getattr(value, f.name)) for f in fields(value))]  # pyright: ignore[reportArgumentType]
        if isinstance(value, tuple):
            return [written(v) for v in value]  # pyright: ignore[reportUnknownVariableType]
        return value if isinstance(value, int | float) else numbers[ops.identity(value)]

    return written(op), arrays


def from_json(text: Any, arrays: Sequence[Array]) -> Op:
    """Return the operator that `to_json` wrote; ModelError where it is none."""
    try:
        return _read(text, arrays, DEEPEST)
    except (ValueError, TypeError, IndexError, KeyError, AttributeError) as error:
        raise ModelError(f"operator {str(text)[:200]} cannot be read: {error}") from error


def _read(text: Any, arrays: Sequence[Array], depth: int) -> Op:
    if depth == 0:
        raise ValueError(f"nested more than {DEEPEST} deep")
    name, *values = text
    node = NODES[name]
    read: list[Any] = []
    for field, value in zip(fields(node), values, strict=True):  # pyright: ignore[reportArgumentType]
        if field.name in ("terms", "factors"):
            read.append(tuple(_read(v, arrays, depth - 1) for v in value))
        elif field.name in ("w", "d"):
            if not 0 <= value < len(arrays):
                raise IndexError(f"array {value} of {len(arrays)}")
            read.append(arrays[value])
        else:
            read.append(tuple(map(int, value)) if isinstance(value, list) else value)  # pyright: ignore[reportUnknownArgumentType]
    return node(*read)
