"""Dense layers in bf16, 32 in a row, over OpenVINO's default and PyTorch's bfloat16."""

from __future__ import annotations

from bench_dense import MANY, SHAPES
from cases import Stack
from claims import Faster, Line
from harness import main
from peers import BF16_PEERS, OURS_BF16

OVER = 1.0


def line(rows: int, k: int, n: int) -> Line:
    """Return the line of a shape."""
    goals = (Faster(OVER, BF16_PEERS),)
    return Line(f"{rows}x{k}x{n}", Stack(rows, k, n), goals, OURS_BF16, BF16_PEERS)


if __name__ == "__main__":
    main([line(rows, *shape) for rows in (MANY, 1) for shape in SHAPES], "Dense, bf16, kernel")
