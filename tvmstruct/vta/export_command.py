"""``tvmstruct vta export``: one launch of a package as the files that ``vta run`` takes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from tvmstruct.errors import InputError

if TYPE_CHECKING:
    from tvmstruct.ops import Array
    from tvmstruct.vta.launch import Launch


def register(app: typer.Typer) -> None:
    """Add the command to ``tvmstruct vta``."""
    example = "Example: tvmstruct vta export model.zip --launch 0 --insn p.bin --dram p.dram"
    app.command("export", epilog=example)(command)


def command(
    package: Annotated[Path, typer.Argument(exists=True, metavar="PACKAGE")],
    launch: Annotated[
        int | None, typer.Option(min=0, help="Its number; without one, list all launches.")
    ] = None,
    insn: Annotated[Path | None, typer.Option(help="Where the program goes.")] = None,
    dram: Annotated[Path | None, typer.Option(help="Where the memory image goes.")] = None,
    given: Annotated[
        Path | None,
        typer.Option("--input", help="An .npy file of int8 rows; default: random ones."),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON on stdout.")] = False,
) -> None:
    """Write one launch of a compiled model as a program and a memory image, or list launches."""
    if launch is None:
        rows = listing(package)
        typer.echo(json.dumps({"launches": rows}, indent=2) if as_json else _table(rows))
        return
    if insn is None or dram is None:
        raise typer.BadParameter("--launch needs --insn FILE and --dram FILE to write to")
    for output in (insn, dram):
        if not output.resolve().parent.is_dir():
            raise typer.BadParameter(f"{output}: there is no folder {output.resolve().parent}")
    found = export(package, launch, insn, dram, given)
    typer.echo(json.dumps(found, indent=2) if as_json else text(found, insn, dram))


def export(
    package: Path, number: int, insn: Path, dram: Path, given: Path | None, seed: int = 0
) -> dict[str, Any]:
    """Write stream and memory of a launch; returns what to tell ``vta run`` and what it yields.

    ``given`` is an .npy file of int8 rows (rows, features), random ones where there is none.
    """
    from tvmstruct.vta.config import DEFAULT
    from tvmstruct.vta.package import package_launches

    launches = package_launches(package)
    if not 0 <= number < len(launches):
        raise InputError(f"--launch {number}: {package} has the launches 0 to {len(launches) - 1}")
    launch = launches[number]
    x = _random(launch, seed) if given is None else _read(launch, given)
    insn.write_bytes(launch.insn)
    dram.write_bytes(launch.image(x).tobytes())
    y = launch.region(launch.y.region)
    return {
        "launch": number,
        "name": launch.name,
        "config": launch.config.name,
        "option": "" if launch.config.name == DEFAULT.name else " --config FILE",
        "base": launch.base,
        "x": _described(launch, launch.x),
        "y": _described(launch, launch.y),
        "output": {"address": y.address, "bytes": y.size, "offset": y.address - launch.base},
    }


def listing(package: Path) -> list[dict[str, Any]]:
    """Return a row for each launch of a package."""
    from tvmstruct.vta.package import package_launches

    return [
        {
            "launch": i,
            "name": launch.name,
            "instructions": len(launch.insn) // 16,
            "bytes": launch.size,
            "x": _described(launch, launch.x),
            "y": _described(launch, launch.y),
        }
        for i, launch in enumerate(package_launches(package))
    ]


def text(found: dict[str, Any], insn: Path, dram: Path) -> str:
    """Return the result of ``export`` in words, with the command that runs the launch."""
    output = found["output"]
    return (
        f"launch {found['launch']}: {found['name']}, x {found['x']}, y {found['y']}, "
        f"for {found['config']}\n"
        f"output: {output['bytes']} bytes at {output['address']:#x}, "
        f"{output['offset']:#x} into the image\n"
        f"tvmstruct vta run --insn {insn} --dram {dram} --base {found['base']} --out after.bin"
        f"{found['option']}"
    )


def _table(rows: list[dict[str, Any]]) -> str:
    lines = [f"{'launch':>6} {'x':>12} {'y':>12} {'instructions':>12} {'bytes':>12}  name"]
    for r in rows:
        numbers = f"{r['instructions']:>12,} {r['bytes']:>12,}"
        lines.append(f"{r['launch']:>6} {r['x']:>12} {r['y']:>12} {numbers}  {r['name']}")
    return "\n".join(lines)


def _described(launch: Launch, tiles: Any) -> str:
    return f"{tiles.rows}x{tiles.features}"


def _random(launch: Launch, seed: int) -> Array:
    import numpy as np

    shape = launch.x.rows, launch.x.features
    return np.random.default_rng(seed).integers(-128, 128, shape, np.int8)


def _read(launch: Launch, path: Path) -> Array:
    import numpy as np

    try:
        x = np.load(path, allow_pickle=False)
    except (ValueError, EOFError, OSError) as error:
        raise InputError(f"--input: {path} is not an .npy file ({error})") from error
    want = launch.x.rows, launch.x.features
    if x.dtype != np.int8 or x.shape != want:
        raise InputError(f"--input: {path} has {x.dtype} {x.shape}; the launch takes int8 {want}")
    return x
