"""What ``tvmstruct vta export`` does: one launch of a package as the files of ``vta run``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from tvmstruct.errors import InputError
from tvmstruct.ops import Array
from tvmstruct.vta.launch import Launch
from tvmstruct.vta.package import package_launches


def export(
    package: Path, number: int, insn: Path, dram: Path, given: Path | None, seed: int = 0
) -> dict[str, Any]:
    """Write stream and memory of a launch; returns what to tell ``vta run`` and what it yields.

    ``given`` is an .npy file of int8 rows (rows, features), random ones where there is none.
    """
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
        "base": launch.base,
        "x": _described(launch, launch.x),
        "y": _described(launch, launch.y),
        "output": {"address": y.address, "bytes": y.size, "offset": y.address - launch.base},
    }


def listing(package: Path) -> list[dict[str, Any]]:
    """Return a row for each launch of a package."""
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
    )


def _described(launch: Launch, tiles: Any) -> str:
    return f"{tiles.rows}x{tiles.features}"


def _random(launch: Launch, seed: int) -> Array:
    shape = launch.x.rows, launch.x.features
    return np.random.default_rng(seed).integers(-128, 128, shape, np.int8)


def _read(launch: Launch, path: Path) -> Array:
    try:
        x = np.load(path, allow_pickle=False)
    except (ValueError, EOFError, OSError) as error:
        raise InputError(f"--input: {path} is not an .npy file ({error})") from error
    want = launch.x.rows, launch.x.features
    if x.dtype != np.int8 or x.shape != want:
        raise InputError(f"--input: {path} has {x.dtype} {x.shape}; the launch takes int8 {want}")
    return x
