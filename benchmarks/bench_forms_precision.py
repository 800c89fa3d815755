"""Forms in bf16 and int8 over their own f32 and over bf16 peers on the dense weight."""

from __future__ import annotations

from bench_forms import forms
from cases import Stack
from claims import Faster, Line
from harness import main
from peers import BF16_PEERS, OURS, OURS_BF16, OURS_INT8

SIDE, BATCHES = 1024, (1, 8, 128)
OVER = {OURS_BF16: 1.3, OURS_INT8: 1.8}  # the same form in f32


def line(name: str, form: tuple[str, dict[str, int]], rows: int, ours: str) -> Line:
    """Return the line of a form in a precision."""
    precision = ours.rpartition("-")[2]
    return Line(
        f"{name} batch {rows} {precision}",
        Stack(rows, SIDE, SIDE, 32, *form),
        (Faster(OVER[ours], (OURS,)), Faster(1.0, BF16_PEERS)),
        ours,
        contenders=(OURS, *BF16_PEERS),
    )


if __name__ == "__main__":
    found = {
        "VVMA k=32": ("vvma", {"k": 32}),
        **forms(SIDE),
        "4 Kroneckers": ("kronecker", {"r": 4}),
    }
    lines = [line(*form, rows, ours) for form in found.items() for rows in BATCHES for ours in OVER]
    main(lines, f"Forms {SIDE}x{SIDE} in bf16 and int8, kernel")
