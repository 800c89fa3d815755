"""Einsum of one or two operands as transposes and one matmul, which every pass understands."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import prod

from tvm import relax

from tvmstruct import compat

R = relax.op
Emit = Callable[[relax.Expr], relax.Expr]
Operand = tuple[relax.Expr, str]  # a tensor and the letters of its axes


def einsum(emit: Emit, equation: str, operands: Sequence[relax.Expr]) -> relax.Expr | None:
    """Return the einsum, or None for more operands, an ellipsis, or a diagonal."""
    terms, arrow, output = equation.replace(" ", "").partition("->")
    inputs = terms.split(",")
    if not arrow:
        output = "".join(c for c in sorted(set(terms) - {","}) if terms.count(c) == 1)
    repeated = any(len(set(t)) < len(t) for t in (*inputs, output))
    if len(inputs) > 2 or "." in equation or repeated:
        return None
    sizes = {
        letter: size
        for letters, operand in zip(inputs, operands, strict=True)
        for letter, size in zip(letters, compat.static_shape(operand) or (), strict=True)
    }
    if len(operands) == 1:
        (letters,) = inputs
        total, kept = _sum_away(emit, operands[0], letters, output)
        return _order(emit, total, kept, output)
    (a, left), (b, right) = (
        _sum_away(emit, x, own, output + other)
        for x, own, other in zip(operands, inputs, reversed(inputs), strict=True)
    )
    if _position(output, left, right) > _position(output, right, left):
        (a, left), (b, right) = (b, right), (a, left)  # the rows of the result stand left
    return _product(emit, (a, left), (b, right), output, sizes)


def _position(output: str, letters: str, others: str) -> int:
    """Return where the axes that only one operand has end in the output."""
    return max((output.index(c) for c in letters if c not in others), default=-1)


def _sum_away(emit: Emit, x: relax.Expr, letters: str, wanted: str) -> tuple[relax.Expr, str]:
    """Sum over the axes that nothing else has."""
    gone = [i for i, c in enumerate(letters) if c not in wanted]
    kept = "".join(c for c in letters if c in wanted)
    return (emit(R.sum(x, gone)) if gone else x), kept


def _order(emit: Emit, x: relax.Expr, letters: str, wanted: str) -> relax.Expr:
    return x if letters == wanted else emit(R.permute_dims(x, [letters.index(c) for c in wanted]))


def _product(
    emit: Emit, left: Operand, right: Operand, output: str, sizes: dict[str, int]
) -> relax.Expr:
    """Return the matmul over what both have and the output has not, batched over what all have."""
    (a, own), (b, other) = left, right
    batch = "".join(c for c in own if c in other and c in output)
    inner = "".join(c for c in own if c in other and c not in output)
    rows = "".join(c for c in output if c in own and c not in other)
    columns = "".join(c for c in output if c in other and c not in own)

    def matrix(x: relax.Expr, letters: str, *groups: str) -> relax.Expr:
        x = _order(emit, x, letters, batch + "".join(groups))
        shape = [*(sizes[c] for c in batch), *(prod(sizes[c] for c in g) for g in groups)]
        return emit(R.reshape(x, shape))

    y = emit(R.matmul(matrix(a, own, rows, inner), matrix(b, other, inner, columns)))
    found = batch + rows + columns
    return _order(emit, emit(R.reshape(y, [sizes[c] for c in found])), found, output)
