"""One question, and 32, of a memory of 4 million keys: over the peers, and of the read bandwidth.

With zero skipping over our own exact attention: scores are drawn so that 95% of the probability
lies in 5% of the keys, and the threshold so that the output is wrong by less than 1%.
"""

from __future__ import annotations

from claims import Faster, Line, OfRoofline
from harness import main
from peers import F32_PEERS, OURS, OURS_SKIP
from transformer_cases import Question

KEYS = 4_000_000
ONE, MANY = Question(1, KEYS), Question(32, KEYS)
OVER, OVER_MANY, OF_BANDWIDTH, OVER_EXACT = 1.0, 1.5, 0.85, 1.6

if __name__ == "__main__":
    main(
        [
            Line("1 query", ONE, (Faster(OVER), OfRoofline(OF_BANDWIDTH)), contenders=F32_PEERS),
            Line("32 queries", MANY, (Faster(OVER_MANY),), contenders=F32_PEERS),
            Line(
                "1 query, skip", ONE, (Faster(OVER_EXACT, (OURS,)),), OURS_SKIP, (OURS,),
                bounded=False,
            ),
        ],
        "Memory network, 4 million keys of 64, call",
    )  # fmt: skip
