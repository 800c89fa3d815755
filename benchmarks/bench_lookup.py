"""LookupFFN over the dense feed-forward block that it replaces, BH4 over a dense layer, the gather.

Tables of 128 x 256 x 512 in f32 are 64 MB. With one token or a few each call has other tokens, 1024
in turn, which name all rows: they come from memory where 64 MB do not fit a cache. With thousands
the slice of eight tables that they pass over stays in the second-level cache, which bounds those
lines: 256 KB for each of two threads, compared with reading as much in order with both.
"""

from __future__ import annotations

from claims import Faster, Line, OfRoofline
from harness import main
from lookup_cases import Bh4, Gather, LookupFfn
from peers import BF16_PEERS, F32_PEERS, OURS, OURS_BF16

MANY = 32768
PAPER = {"d": 512, "inner": 2048, "h": 128, "tau": 8, "block": 64}
ROBERTA = {"d": 768, "inner": 3072, "h": 170, "tau": 9, "block": 64}


def ffn(name: str, rows: int, sizes: dict[str, int], least: float | None = None) -> Line:
    """Return the line of a feed-forward block in f32."""
    goals = () if least is None else (Faster(least),)
    return Line(f"{name}, {rows} tokens", LookupFfn(rows, **sizes), goals, contenders=F32_PEERS)


def in_bf16(rows: int) -> Line:
    """Return the line with tables and projection in bf16."""
    case, goals = LookupFfn(rows, **PAPER), (Faster(1.2, BF16_PEERS),)
    name = f"h=128 tau=8 in bf16, {rows} tokens"
    return Line(name, case, goals, OURS_BF16, contenders=BF16_PEERS, bounded=False)


def bh4(block: int, least: float) -> Line:
    """Return the line of BH4 alone."""
    case = Bh4(MANY, 512, 1024, block)
    return Line(
        f"BH4-{block} 512x1024, {MANY} tokens", case, (Faster(least),), contenders=F32_PEERS
    )


def gather(rows: int, d: int, h: int, tau: int) -> list[Line]:
    """Return the lines of the gather, codes given, and of hash and gather: share of bandwidth."""
    name, sizes = f"gather h={h} tau={tau}", (rows, d, h, tau)
    alone = Line(
        f"{name}, {rows} tokens", Gather(*sizes, hashed=True), (OfRoofline(0.7),), OURS, ()
    )
    return [alone, Line(f"hash and {name}, {rows} tokens", Gather(*sizes), (), OURS, ())]


if __name__ == "__main__":
    main(
        [
            ffn("h=128 tau=8", MANY, PAPER, 2.5),
            in_bf16(MANY),
            ffn("h=128 tau=8", 1, PAPER, 3.0),
            ffn("h=128 tau=8", 64, PAPER),
            ffn("RoBERTa-base, h=170 tau=9", 8192, ROBERTA, 2.0),
            bh4(64, 1.5),
            bh4(16, 3.0),
            *gather(MANY, 512, 128, 8),
        ],
        "LookupFFN, call",
    )
