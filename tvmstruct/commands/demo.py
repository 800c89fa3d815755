"""``tvmstruct demo``: a real sentence encoder."""

from __future__ import annotations

from tvmstruct.commands.options import AsJson
from tvmstruct.commands.output import print_json

EXAMPLE = "Example: tvmstruct demo --json > demo.json"


def demo(as_json: AsJson = False) -> None:
    """Compile a real sentence encoder, check it and compare its speed with ONNX Runtime."""
    from tvmstruct.demo import run_demo, show

    result = run_demo()
    if as_json:
        print_json(result.to_dict())
    else:
        show(result)
