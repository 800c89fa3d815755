"""The command line of the VTA target: ``tvmstruct vta run | dis | asm | timeline | ...``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from tvmstruct.errors import VtaError, VtaRunError
from tvmstruct.vta import clocks_command, explore_command, export_command, timeline_command

if TYPE_CHECKING:
    from collections.abc import Sequence

    from tvmstruct.vta.config import Config
    from tvmstruct.vta.isa import Instruction

vta = typer.Typer(
    help="Run, read and write programs of the VTA accelerator.",
    epilog="Example: tvmstruct vta run --insn p.bin --dram p.dram.gz --base 0x100000 --out p.out",
    no_args_is_help=True,
)

File = Annotated[Path, typer.Argument(exists=True, dir_okay=False)]
ConfigOption = Annotated[
    Path | None,
    typer.Option(exists=True, dir_okay=False, help="JSON of the bitstream; default: stock VTA."),
]


def _address(text: str) -> int:
    try:
        return int(text, 0)
    except ValueError as error:
        raise typer.BadParameter(f"{text} is no integer such as 1048576 or 0x100000") from error


def _level(text: str) -> str:
    if text not in ("rtl", "hls"):
        raise typer.BadParameter(f"{text} is unknown; want rtl or hls")
    return text


@vta.command(
    epilog="Example: tvmstruct vta run --insn p.insn.bin --dram p.dram.gz --base 0x100000 "
    "--out p.out --json"
)
def run(
    insn: Annotated[
        Path,
        typer.Option(exists=True, dir_okay=False, help="The program, 16 bytes an instruction."),
    ],
    dram: Annotated[
        Path, typer.Option(exists=True, dir_okay=False, help="The DRAM image; may be gzip.")
    ],
    base: Annotated[
        int, typer.Option(parser=_address, metavar="ADDRESS", help="Physical address of the image.")
    ],
    out: Annotated[Path, typer.Option(help="Where the image after goes; .gz is compressed.")],
    config: ConfigOption = None,
    level: Annotated[
        str,
        typer.Option(callback=_level, help="Who must agree with us: rtl, or hls (stricter)."),
    ] = "rtl",
    strict: Annotated[
        bool,
        typer.Option(help="Refuse programs that hardware and simulator treat differently."),
    ] = True,
    limit: Annotated[
        int | None, typer.Option(min=0, help="Refuse programs with more tile operations.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON on stdout.")] = False,
) -> None:
    """Run a program in the functional simulator: the image after, counters, predicted cycles."""
    if not out.resolve().parent.is_dir():
        raise typer.BadParameter(f"--out: no folder {out.resolve().parent}")
    from tvmstruct.vta.files import read_bytes, write_bytes
    from tvmstruct.vta.isa import decode_stream
    from tvmstruct.vta.simulator import TILE_OP_LIMIT, Level, simulate

    design = _design(config)
    program = decode_stream(read_bytes(insn), design, ignore_unused=not strict)
    done = simulate(
        program,
        read_bytes(dram),
        base,
        design,
        strict=strict,
        level=Level[level.upper()],
        limit=TILE_OP_LIMIT if limit is None else limit,
    )
    write_bytes(out, done.dram.tobytes())
    result = {
        "out": str(out),
        "config": design.name,
        "strict": strict,
        "level": level,
        "instructions": len(program),
        "counters": done.counters.to_dict(),
        **_cycles(program, design),
    }
    _show(result, as_json=as_json)


@vta.command(epilog="Example: tvmstruct vta dis program.insn.bin")
def dis(file: File, config: ConfigOption = None) -> None:
    """Print the instructions of a program as text that ``asm`` reads."""
    from tvmstruct.vta.assembly import disassemble
    from tvmstruct.vta.files import read_bytes
    from tvmstruct.vta.isa import decode_stream

    program = decode_stream(read_bytes(file), _design(config))
    typer.echo(disassemble(program), nl=False)


@vta.command(epilog="Example: tvmstruct vta asm program.vta -o program.insn.bin")
def asm(
    file: File,
    output: Annotated[Path, typer.Option("-o", "--output", help="The program to write.")],
    config: ConfigOption = None,
) -> None:
    """Turn text, one instruction a line, into the bytes of a program."""
    from tvmstruct.vta.assembly import assemble
    from tvmstruct.vta.files import read_bytes, write_bytes
    from tvmstruct.vta.isa import encode_stream

    design = _design(config)
    try:
        text = read_bytes(file).decode("utf-8")
    except UnicodeDecodeError as error:
        raise VtaError(f"{file}: not text ({error})") from error
    program = assemble(text, design)
    write_bytes(output, encode_stream(program, design))
    typer.echo(f"{output}: {len(program)} instructions")


def _design(path: Path | None) -> Config:
    from tvmstruct.vta.config import DEFAULT, Config

    return DEFAULT if path is None else Config.from_json(path)


def _cycles(program: Sequence[Instruction], config: Config) -> dict[str, int | None]:
    """Return the predicted cycles; None where hardware would not end as the simulator did."""
    from tvmstruct.vta.cycles import predict

    try:
        return {"cycles": predict(program, config).cycles}
    except VtaRunError:
        return {"cycles": None}


def _show(result: dict[str, Any], *, as_json: bool) -> None:
    if as_json:
        typer.echo(json.dumps(result, indent=2))
        return
    typer.echo(f"{result['out']}: image after {result['instructions']} instructions")
    rows = dict(result["counters"])
    if result.get("cycles") is not None:
        rows["predicted cycles"] = result["cycles"]
    for name, value in rows.items():
        typer.echo(f"{name:<18}{value:>14,}")


for more in (export_command, timeline_command, explore_command, clocks_command):
    more.register(vta)
