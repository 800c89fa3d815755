"""Table 8 of AntMan: an LSTM layer of one row and 100 steps over dense peers, form by form.

The paper measures one thread; run it with ``--threads 1`` and then without. Goals are the
theoretical factors at 400 units and more, anything over 1 at 100, and 1.1 for our dense layer.
A factor is that of the stacked gates: 4 d x d matrices with inner rank d / r. Then the real
models of two PyPI packages against ONNX Runtime, the second in int8 with equal results.
"""

from __future__ import annotations

from dataclasses import replace

from claims import Faster, Line
from harness import main
from peers import F32_PEERS
from recurrent_cases import DKSPLIT, SILERO, LstmCase

DIMS = (100, 400, 800, 1200, 1600)
FORMS = {
    "LGP-shuffle 2x": ("lgp_shuffle", {"g": 2}),
    "LGP-shuffle 10x": ("lgp_shuffle", {"g": 10}),
    "LowRank-LGP 2.66x": ("low_rank_lgp", {"g": 2, "r": 2}),
    "LowRank-LGP 8x": ("low_rank_lgp", {"g": 10, "r": 2}),
}
SMALL, DENSE, SAME = 100, 1.1, 1.0
ORT = ("onnxruntime",)  # dksplit has operators that only it runs
PACKAGED = {
    "silero-vad, a chunk of 32 ms": SILERO,
    "dksplit, 22 letters": DKSPLIT,
    "dksplit, 32 strings": replace(DKSPLIT, feeds={"chars": ((32, 22), "int64")}, rows=32),
}


def lines() -> list[Line]:
    """Return a line for each size and form."""
    found = []
    for dim in DIMS:
        goals = (Faster(DENSE),)
        found.append(Line(f"dense {dim}", LstmCase(dim), goals, contenders=F32_PEERS))
        for name, (form, sizes) in FORMS.items():
            case = LstmCase(dim, form, sizes)
            least = 1.0 if dim == SMALL else case.saving
            line = Line(f"{name} {dim}", case, (Faster(least),), contenders=F32_PEERS)
            found.append(line)
    for name, case in PACKAGED.items():
        goals = (Faster(SAME, ORT),)
        found.append(Line(name, case, goals, contenders=ORT, bounded=False))
    return found


if __name__ == "__main__":
    main(lines(), "LSTM, 100 steps of one row, against dense peers")
