"""word2ketXS, order 2, rank 10, 30,522 x 384: our lookup over PyTorch's and over a dense gather.

Goals are those of 512 ids, kernel against PyTorch's calls: 7 times the faster of einsum and bmm on
the same factors, and at most 3 times the time of a gather from the dense table, which is 160
times as large. A model that is called as a whole adds its checks of ids; fewer and more ids are
for comparison.
"""

from __future__ import annotations

from claims import Faster, Line
from embedding_cases import DENSE_ROWS, OURS_CALL, TORCH_ROWS, Lookup
from harness import main

OVER_TORCH, OVER_GATHER, SMALLER = 7.0, 1 / 3, 160
OTHERS = (16, 8192)


def lines() -> list[Line]:
    """Return the line of the claim, and those for comparison."""
    goals = Faster(OVER_TORCH, TORCH_ROWS), Faster(OVER_GATHER, DENSE_ROWS)
    contenders = (*TORCH_ROWS, *DENSE_ROWS, OURS_CALL)
    case = Lookup()
    assert case.saving > SMALLER, case.saving
    bytes_of = case.vocabulary * case.dimension * 4, case.table().params * 4
    name = f"512 ids, {bytes_of[1] / 1e3:.0f} kB for {bytes_of[0] / 1e6:.1f} MB"
    rest = [Line(f"{n} ids", Lookup(n), contenders=contenders) for n in OTHERS]
    return [Line(f"{name} ({case.saving:.0f}x)", case, goals, contenders=contenders), *rest]


if __name__ == "__main__":
    main(lines(), "word2ketXS of order 2, rank 10, 30,522 x 384, kernel")
