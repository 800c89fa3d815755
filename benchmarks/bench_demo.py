"""The demo model, a real sentence encoder in ONNX: one call through the public API.

In f32 against the best f32 peer; in bf16 against OpenVINO's default, which is bf16 where the CPU
has it.
"""

from __future__ import annotations

from cases import Encoder
from claims import Faster, Line
from harness import main
from peers import OURS, OURS_BF16

SHAPES = ((1, 16), (1, 128), (8, 128))  # (batch, length)
F32, F32_OVER = ("onnxruntime", "openvino-f32"), 1.2
BF16, BF16_OVER = ("openvino-default",), 1.0


def line(batch: int, length: int, precision: str) -> Line:
    """Return the line of a shape of the input."""
    name, case = f"{batch}x{length} {precision}", Encoder(batch, length)
    if precision == "f32":
        return Line(name, case, (Faster(F32_OVER, F32),), contenders=(*F32, *BF16))
    return Line(name, case, (Faster(BF16_OVER, BF16),), OURS_BF16, (*BF16, OURS))


if __name__ == "__main__":
    main([line(*shape, p) for p in ("f32", "bf16") for shape in SHAPES], "MiniLM-L3, call")
