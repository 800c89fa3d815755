"""Kernels: the launches of linear steps, run in the simulator."""

from __future__ import annotations

from dataclasses import dataclass

from tvmstruct.ops import Array
from tvmstruct.schedules.vta import vta_linear
from tvmstruct.vta.config import Config
from tvmstruct.vta.integer import IntLinear
from tvmstruct.vta.launch import Launch


def make_kernel(step: IntLinear, rows: int, config: Config) -> Kernel:
    """Return the kernel of a linear step.

    Raises VtaError where its buffers do not fit.
    """
    return Kernel(vta_linear(step.op, step.bias, step.shift, step.relu, rows, config).launch)


def simulate(launch: Launch, image: Array) -> None:
    """Run a launch on its memory."""
    raise NotImplementedError


@dataclass(frozen=True, eq=False)
class Kernel:
    """A launch that runs in the simulator."""

    launch: Launch

    @property
    def n_out(self) -> int:
        """Features that it yields."""
        return self.launch.y.features

    def run(self, x: Array) -> Array:
        """Return int8 rows for int8 rows."""
        image = self.launch.image(x)
        simulate(self.launch, image)
        return self.launch.result(image)
