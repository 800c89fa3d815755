"""Arguments and options that several commands take."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from tvmstruct.model_argument import ModelArgument, parse_model

BUILT_IN = "or a built-in model such as 'random:bert?layers=2' (see tvmstruct models)"

Model = Annotated[
    ModelArgument,
    typer.Argument(
        metavar="MODEL",
        parser=parse_model,
        help=f"An .onnx file, a Hugging Face folder, a .tvms file or VTA package, {BUILT_IN}.",
    ),
]
SourceModel = Annotated[
    ModelArgument,
    typer.Argument(
        metavar="MODEL",
        parser=parse_model,
        help=f"An .onnx file, a Hugging Face folder, {BUILT_IN}.",
    ),
]
Target = Annotated[
    str, typer.Option(help="Where the model will run: host, llvm -mcpu=<name>, vta -config=<file>.")
]
Plan = Annotated[
    Path | None,
    typer.Option(exists=True, dir_okay=False, help="JSON: which layer becomes what."),
]
ShapeOption = Annotated[
    list[str] | None,
    typer.Option(
        "--shape",
        metavar="NAME=AxB",
        help="Shape to compile for; naming an input again starts the next shape bucket.",
    ),
]
Precision = Annotated[
    str,
    typer.Option(
        help="Of dense and structured layers: f32, bf16, bf16-weights or int8; the last three lose."
    ),
]
Measure = Annotated[
    bool,
    typer.Option(
        "--measure", help="Time each layer on random data; with --skip, say what it does."
    ),
]
EnergyOption = Annotated[
    bool, typer.Option("--energy", help="Estimate the bytes that a call moves and their energy.")
]
CachesOption = Annotated[
    str | None,
    typer.Option(
        metavar="L1,L2,L3", help="With --energy, such as 48K,2M,32M; default: this CPU's."
    ),
]
Threads = Annotated[int | None, typer.Option(min=1, help="Threads; default: all cores.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON on stdout.")]
