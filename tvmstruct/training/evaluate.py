"""Operator expressions on tensors: what `Op.apply` is to numpy arrays."""

from __future__ import annotations

from collections.abc import Sequence
from functools import reduce
from typing import Any

import torch
from torch import Tensor


def evaluate(text: Any, x: Tensor, arrays: Sequence[Tensor]) -> Tensor:
    """Return ``x @ op`` (..., n_out) of x (..., n_in) for an expression from `op_text.to_json`."""
    rows = x.reshape(-1, x.shape[-1]) if x.numel() else x.new_zeros(0, x.shape[-1])
    y = _apply(text, rows, arrays)
    return y.reshape(*x.shape[:-1], y.shape[-1])


def _apply(text: Any, x: Tensor, arrays: Sequence[Tensor]) -> Tensor:
    """Return (rows, n_out) of x (rows, n_in)."""
    match text:
        case ["Product", factors]:
            return reduce(lambda y, factor: _apply(factor, y, arrays), factors, x)
        case ["Sum", terms]:
            return reduce(torch.add, (_apply(term, x, arrays) for term in terms))
        case ["Dense", w]:
            return x @ arrays[w]
        case ["BlockDiag", w]:
            g, p, q = arrays[w].shape
            blocks = torch.bmm(x.reshape(-1, g, p).transpose(0, 1), arrays[w])
            return blocks.transpose(0, 1).reshape(-1, g * q)
        case ["SharedBlockDiag", w, blocks]:
            p, q = arrays[w].shape
            return (x.reshape(-1, p) @ arrays[w]).reshape(-1, blocks * q)
        case ["Diag", d]:
            return x * arrays[d]
        case _:
            return _apply_fixed(text, x)


def _apply_fixed(text: Any, x: Tensor) -> Tensor:
    """Do the same for a node without arrays."""
    match text:
        case ["Permute", dims, axes]:
            order = (0, *(axis + 1 for axis in axes))
            return x.reshape(-1, *dims).permute(order).reshape(x.shape)
        case ["WalshHadamard", n, scale, blocks, inner]:
            return _hadamard(x * scale, n, blocks, inner)
        case ["Slice", _, stop, start]:
            return x[:, start:stop]
        case ["Pad", size, width, start]:
            return torch.nn.functional.pad(x, (start, width - size - start))
        case _:
            raise TypeError(f"evaluate: {str(text)[:200]} is not an operator")


def _hadamard(x: Tensor, n: int, blocks: int, inner: int) -> Tensor:
    y = x.reshape(-1, n, inner)
    half = 1
    while half < n:
        a, b = y.reshape(-1, n // (2 * half), 2, half, inner).unbind(2)
        y = torch.stack((a + b, a - b), dim=2).reshape(-1, n, inner)
        half *= 2
    return y.reshape(-1, blocks * n * inner)
