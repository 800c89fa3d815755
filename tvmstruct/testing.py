"""What tests share: tolerances from one table, keyed by dtype and reduction length."""

from __future__ import annotations

import numpy as np

# Relative error that a sum of products of that many terms may reach: the unit roundoff times
# a safety factor of about 8 sqrt(length), measured against the norm of the terms.
_LENGTHS = (16, 256, 4096, 65536, 1 << 24)
_TABLE = {
    "float64": (1e-14, 5e-14, 2e-13, 1e-12, 1e-11),
    "float32": (2e-6, 1e-5, 5e-5, 2e-4, 2e-3),
    "float16": (2e-2, 8e-2, 3e-1, 3e-1, 3e-1),
    "bfloat16": (1e-1, 3e-1, 3e-1, 3e-1, 3e-1),
}


def tolerance(dtype: object, length: int = 1, *, scale: float = 1.0) -> dict[str, float]:
    """Return ``rtol`` and ``atol`` for sums of ``length`` products computed in ``dtype``.

    ``scale`` is the typical size of the result, which is ``sqrt(length)`` for products of
    standard normal entries; pass it where entries are much larger or smaller than one.
    """
    name = dtype if isinstance(dtype, str) else np.dtype(dtype).name  # pyright: ignore[reportArgumentType, reportCallIssue]
    if name not in _TABLE:
        raise ValueError(f"tolerance: no row for {name}; want one of {', '.join(_TABLE)}")
    column = next((i for i, most in enumerate(_LENGTHS) if length <= most), len(_LENGTHS) - 1)
    relative = _TABLE[name][column]
    return {"rtol": relative, "atol": relative * scale * max(1.0, float(length)) ** 0.5}


def error_bound(dtype: object, length: int = 1) -> float:
    """Return the relative Frobenius error that rounding may cause."""
    return tolerance(dtype, length)["rtol"]
