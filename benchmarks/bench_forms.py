"""Other forms: whether time falls as multiply-adds do, over our own dense layer and over peers."""

from __future__ import annotations

from cases import Stack
from claims import Faster, Line
from harness import main
from peers import F32_PEERS, OURS_DENSE

SIDES = {400: 0.8, 1024: 1.0, 4096: 1.0}  # goals of the ratio over the saving, by n
BATCHES = (1, 128)
KRONECKERS = 10  # over the f32 peers


def forms(n: int) -> dict[str, tuple[str, dict[str, int]]]:
    """Return the forms of an n x n layer by name, with their parameters."""
    return {
        "LGP-shuffle g=8": ("lgp_shuffle", {"g": 8}),
        "Monarch 8 blocks": ("monarch", {"b": 8}),
        f"low rank r={n // 8}": ("low_rank", {"r": n // 8}),
    }


def per_saving(rows: int, n: int, least: float) -> list[Line]:
    """Return a line for each form."""
    goals = (Faster(least, (OURS_DENSE,), per_saving=True), Faster(least, per_saving=True))
    return [
        Line(
            f"{name} {n}x{n} batch {rows}",
            Stack(rows, n, n, 32, family, parameters),
            goals,
            contenders=(OURS_DENSE, *F32_PEERS),
        )
        for name, (family, parameters) in forms(n).items()
    ]


def kroneckers() -> Line:
    """Return the line of a sum of four Kronecker products."""
    case = Stack(1, 1024, 1024, 32, "kronecker", {"r": 4})
    return Line("4 Kroneckers 1024x1024 batch 1", case, (Faster(KRONECKERS),), contenders=F32_PEERS)


if __name__ == "__main__":
    found = [
        line
        for n, least in SIDES.items()
        for rows in BATCHES
        for line in per_saving(rows, n, least)
    ]
    main([*found, kroneckers()], "Forms, f32, kernel")
