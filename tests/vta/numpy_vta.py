"""VTA in name only: launches of empty streams, in whose place numpy runs their integer steps.

For tests of all that is around launches; those of the streams themselves are elsewhere.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from tvmstruct.errors import VtaError
from tvmstruct.targets import TargetSpec, resolve
from tvmstruct.vta.config import Memory
from tvmstruct.vta.instructions import Finish
from tvmstruct.vta.integer import IntLinear
from tvmstruct.vta.isa import encode_stream
from tvmstruct.vta.launch import Launch, Region, Tiles
from tvmstruct.vta.simulated_kernel import Kernel
from tvmstruct.vta.target import Accelerator

BASE, PAGE = 0x1000, 4096
STEPS: dict[bytes, IntLinear] = {}  # by their constants


def simulate(launch: Launch, program: list, image: np.ndarray, checked: bool = False):
    """Do on the memory of a launch what its step does, in the place of the simulator."""
    x, y = (
        launch.region(tiles.region).address - launch.base + tiles.offsets(launch.config)
        for tiles in (launch.x, launch.y)
    )
    data = launch.region("wgt").data
    assert data is not None
    image[y] = STEPS[data].run(image[x].view(np.int8)).view(np.uint8)
    return image


@dataclass(frozen=True)
class Numpy(Accelerator):
    """An accelerator for steps that yield at most ``most`` features."""

    most: int = 1 << 30

    def kernels(self, steps, rows: int):
        if len(steps) != 1 or not isinstance(steps[0], IntLinear):
            raise VtaError("one linear step at a time")
        (step,) = steps
        if step.n_out > self.most:
            raise VtaError(f"{step.n_out} features do not fit")
        data = b"".join(a.tobytes() for a in (*step.op.arrays(), step.bias, step.shift))
        STEPS[data] = step
        regions: list[Region] = []
        end = BASE
        sides = {"x": (Memory.INP, step.op.n_in), "y": (Memory.OUT, step.n_out)}
        for name, (memory, n) in sides.items():
            regions.append(Region(name, memory, end, rows * -(-n // 16) * 16))
            end += -(-regions[-1].size // PAGE) * PAGE
        regions.append(Region("wgt", Memory.WGT, end, len(data), data))
        size = end + len(data) - BASE
        tiles = [Tiles(name, rows, n, (-(-n // 16), 1)) for name, (_, n) in sides.items()]
        insn = encode_stream([Finish()], self.config)
        return [Kernel(Launch("numpy", self.config, insn, BASE, size, tuple(regions), *tiles))]


def target(most: int = 1 << 30) -> TargetSpec:
    """Return the target whose launches numpy runs, once ``simulate`` is in place."""
    spec = resolve("vta")
    assert spec.accelerator is not None
    return replace(spec, accelerator=Numpy(spec.accelerator.config, most))
