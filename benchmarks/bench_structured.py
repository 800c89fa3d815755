"""Structured layers against the dense layer that they stand for, kernel and call."""

from __future__ import annotations

from harness import Line, main
from peers import Case

STACK = 32
VVMA = {"family": "vvma", "parameters": {"k": 32}}


def _vvma_macs(k: int, n: int, block: int) -> int:
    return k * n // block + min(k, n) * block


def vvma(rows: int, stack: int, goal: float) -> Line:
    """VVMA 1024x1024, k = 32; a stack of one is a call through the public API."""
    case = Case("stack", {"rows": rows, "k": 1024, "n": 1024, "stack": stack, **VVMA})
    macs = _vvma_macs(1024, 1024, 32)
    what = "call" if stack == 1 else "kernel"
    stored = 4.0 * (32 * 32 + 1024 * 1024 / 32)
    return Line(f"VVMA 1024 k=32 batch {rows} {what}", case, goal, 2.0 * rows * macs, stored, stack)


def other(name: str, rows: int, n: int, macs: int, goal: float, **family) -> Line:
    """Any other family on a square layer."""
    case = Case("stack", {"rows": rows, "k": n, "n": n, "stack": STACK, **family})
    return Line(f"{name} {n} batch {rows}", case, goal, 2.0 * rows * macs, 4.0 * macs, STACK)


def lines() -> list[Line]:
    """Return every line; the goal of the other families is the saving in multiply-adds."""
    found = [vvma(rows, STACK, goal) for rows, goal in ((1, 25), (8, 20), (128, 12))]
    found += [vvma(rows, 1, goal) for rows, goal in ((1, 15), (8, 15), (128, 12))]
    for n in (400, 1024, 4096):
        for rows in (1, 128):
            lgp = {"family": "lgp_shuffle", "parameters": {"g": 8}}
            low = {"family": "low_rank", "parameters": {"r": n // 8}}
            monarch = {"family": "monarch", "parameters": {"b": 8}}
            found.append(other("LGP-shuffle g=8", rows, n, n * n // 8, 8, **lgp))
            found.append(other("low rank n/8", rows, n, n * n // 4, 4, **low))
            found.append(other("Monarch 8 blocks", rows, n, n * n // 4, 4, **monarch))
    kronecker = {"family": "kronecker", "parameters": {"r": 4}}
    found.append(other("4 Kroneckers", 1, 1024, 4 * 2 * 1024 * 32, 10, **kronecker))
    return found


if __name__ == "__main__":
    main(lines(), "Structured layers, f32")
