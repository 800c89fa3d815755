"""VVMA: over dense peers in f32 and bf16, inside compiled code and called; ragged sizes."""

from __future__ import annotations

from cases import Stack
from claims import Faster, Goal, Line, RateOf
from harness import main
from peers import BF16_PEERS, OURS, OURS_BF16

KERNEL = {1: 25, 8: 20, 128: 12}  # goals over the f32 peers by batch; 32 layers in a row
CALL = {1: 15, 8: 15, 128: 12}  # one layer through the public API
OVER_BF16, BF16_OVER_BF16 = 2, 4  # at batch 128
RAGGED = ((1000, 400, 32), (768, 3072, 48))  # k, n, side of a block
RAGGED_ROWS, RAGGED_SHARE = (1, 17), 0.8  # of the rate of 1024 x 1024


def vvma(rows: int, k: int = 1024, n: int = 1024, block: int = 32, layers: int = 32) -> Stack:
    """Return a stack of VVMA layers."""
    return Stack(rows, k, n, layers, "vvma", {"k": block})


def even(rows: int, what: str) -> str:
    """Return the name of the line at 1024 x 1024."""
    return f"1024x1024 k=32 batch {rows} {what}"


def over_dense(what: str, goals: dict[int, int], layers: int) -> list[Line]:
    """Return the lines at 1024 x 1024 over dense peers."""
    found = []
    for rows, least in goals.items():
        wanted: list[Goal] = [Faster(least)]
        if rows == 128:
            wanted.append(Faster(OVER_BF16, BF16_PEERS))
        found.append(Line(even(rows, what), vvma(rows, layers=layers), tuple(wanted)))
    goal = Faster(BF16_OVER_BF16, BF16_PEERS)
    name = f"{even(128, what)} bf16"
    bf16 = Line(name, vvma(128, layers=layers), (goal,), OURS_BF16, (*BF16_PEERS, OURS))
    return [*found, bf16]


def ragged() -> list[Line]:
    """Return the ragged lines, and the even ones whose rate they are held to."""
    named = {even(rows, "kernel") for rows in KERNEL}
    found = [
        Line(even(rows, "kernel"), vvma(rows), contenders=())
        for rows in RAGGED_ROWS
        if even(rows, "kernel") not in named
    ]
    for k, n, block in RAGGED:
        for rows in RAGGED_ROWS:
            name = f"{k}x{n} k={block} batch {rows} kernel"
            goal = RateOf(RAGGED_SHARE, even(rows, "kernel"))
            found.append(Line(name, vvma(rows, k, n, block), (goal,)))
    return found


if __name__ == "__main__":
    main([*over_dense("kernel", KERNEL, 32), *over_dense("call", CALL, 1), *ragged()], "VVMA")
