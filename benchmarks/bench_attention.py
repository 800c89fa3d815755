"""Attention alone, 16 heads of 64, q, k and v as rows side by side: over the best f32 peer."""

from __future__ import annotations

from claims import Faster, Line
from harness import main
from peers import F32_PEERS
from transformer_cases import Attention

SHORT, LONG = (128, 256), (512, 1024, 2048)
OVER = {**dict.fromkeys(SHORT, 1.3), **dict.fromkeys(LONG, 1.05)}


def line(batch: int, length: int) -> Line:
    """Return the line of a shape."""
    goals = (Faster(OVER[length]),)
    return Line(f"{batch}x{length}", Attention(batch, length), goals, contenders=F32_PEERS)


if __name__ == "__main__":
    main([line(batch, length) for batch in (1, 8) for length in OVER], "Attention, 16 x 64, call")
