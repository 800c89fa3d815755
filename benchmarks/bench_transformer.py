"""One BERT layer of Table IV of NLP-Fast and its S/H/F-4x variants: over the peers and the peak.

And partitioned attention and feed-forward over our own graph that keeps scores, probabilities
and hidden features in memory.
"""

from __future__ import annotations

from claims import Faster, Line, OfPeak
from harness import main
from peers import F32_PEERS, OURS_BASELINE, OURS_MINIMAL
from transformer_cases import EncoderLayer

OVER, OF_PEAK, OVER_OWN = 1.2, 0.85, 1.05
SHAPES = {
    "base": EncoderLayer(1),
    "S-4x": EncoderLayer(1, length=1024),
    "H-4x": EncoderLayer(1, hidden=4096, heads=64),
    "F-4x": EncoderLayer(1, inner=16384),
    "base x 8": EncoderLayer(8),
}


def line(name: str, case: EncoderLayer) -> Line:
    """Return the line of a configuration."""
    goals = (Faster(OVER), OfPeak(OF_PEAK), Faster(OVER_OWN, (OURS_BASELINE,)))
    return Line(name, case, goals, contenders=(*F32_PEERS, OURS_BASELINE, OURS_MINIMAL))


if __name__ == "__main__":
    main([line(*item) for item in SHAPES.items()], "BERT layer of Table IV, f32, call")
