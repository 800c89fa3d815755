"""VTA in name only: launches whose streams are hashes of integer steps, which numpy runs instead.

For tests of all that is around launches; those of the streams themselves are elsewhere.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, replace

import numpy as np

from tvmstruct.errors import VtaError
from tvmstruct.targets import TargetSpec, resolve
from tvmstruct.vta.config import Memory
from tvmstruct.vta.integer import IntLinear
from tvmstruct.vta.launch import Launch, Region, Tiles
from tvmstruct.vta.simulated_kernel import Kernel
from tvmstruct.vta.target import Accelerator

BASE, PAGE = 0x1000, 4096
STEPS: dict[bytes, IntLinear] = {}


def simulate(launch: Launch, image: np.ndarray) -> None:
    """Do on the memory of a launch what its step does, in the place of the simulator."""
    x, y = (
        launch.region(tiles.region).address - launch.base + tiles.offsets(launch.config)
        for tiles in (launch.x, launch.y)
    )
    image[y] = STEPS[launch.insn].run(image[x].view(np.int8)).view(np.uint8)


@dataclass(frozen=True)
class Numpy(Accelerator):
    """An accelerator for steps that yield at most ``most`` features."""

    most: int = 1 << 30

    def kernel(self, step: IntLinear, rows: int) -> Kernel:
        if step.n_out > self.most:
            raise VtaError(f"{step.n_out} features do not fit")
        arrays = [a.tobytes() for a in (*step.op.arrays(), step.bias, step.shift)]
        insn = hashlib.md5(b"".join(arrays)).digest()
        STEPS[insn] = step
        regions: list[Region] = []
        end = BASE
        sides = {"x": (Memory.INP, step.op.n_in), "y": (Memory.OUT, step.n_out)}
        for name, (memory, n) in sides.items():
            regions.append(Region(name, memory, end, rows * -(-n // 16) * 16))
            end += -(-regions[-1].size // PAGE) * PAGE
        regions.append(Region("wgt", Memory.WGT, end, len(arrays[0]), arrays[0]))
        size = end + len(arrays[0]) - BASE
        tiles = [Tiles(name, rows, n, (-(-n // 16), 1)) for name, (_, n) in sides.items()]
        return Kernel(Launch("numpy", self.config, insn, BASE, size, tuple(regions), *tiles))


def target(most: int = 1 << 30) -> TargetSpec:
    """Return the target whose launches numpy runs, once ``simulate`` is in place."""
    spec = resolve("vta")
    assert spec.accelerator is not None
    return replace(spec, accelerator=Numpy(spec.accelerator.config, most))
