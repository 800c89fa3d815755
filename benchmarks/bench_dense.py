"""Dense layers in f32, 32 in a row: over the peers, or near the peak of multiply-adds."""

from __future__ import annotations

from cases import Stack
from claims import Faster, Line, OfPeak
from harness import main
from peers import F32_PEERS

SHAPES = ((384, 1536), (1024, 1024), (1024, 4096))  # (k, n)
MANY, OVER, OF_PEAK = 128, 1.05, 0.92  # rows, and two goals of which one is enough
OVER_AT_ONE = 1.0


def line(rows: int, k: int, n: int) -> Line:
    """Return the line of a shape."""
    goals = (Faster(OVER), OfPeak(OF_PEAK)) if rows > 1 else (Faster(OVER_AT_ONE),)
    case = Stack(rows, k, n)
    return Line(f"{rows}x{k}x{n}", case, goals, contenders=F32_PEERS, any_goal=True)


if __name__ == "__main__":
    main([line(rows, *shape) for rows in (MANY, 1) for shape in SHAPES], "Dense, f32, kernel")
