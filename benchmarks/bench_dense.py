"""Dense layers in f32: 32 in a row, so that the time is that inside compiled code."""

from __future__ import annotations

from harness import Line, main
from peers import Case

SHAPES = ((384, 1536), (1024, 1024), (1024, 4096))  # (k, n)
STACK = 32


def _line(rows: int, k: int, n: int, goal: float) -> Line:
    case = Case("stack", {"rows": rows, "k": k, "n": n, "stack": STACK})
    return Line(f"{rows}x{k}x{n}", case, goal, 2.0 * rows * k * n, 4.0 * k * n, STACK)


if __name__ == "__main__":
    lines = [_line(128, k, n, 1.05) for k, n in SHAPES] + [_line(1, k, n, 1.0) for k, n in SHAPES]
    main(lines, "Dense, f32, kernel")
