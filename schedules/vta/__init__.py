"""Kernels for VTA: int8 products whose schedules record instruction streams."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from tvmstruct import ops
from tvmstruct.ops import Array
from tvmstruct.schedules.registry import Pick, pick_default
from tvmstruct.schedules.vta.launches import Requantise, linear_launch
from tvmstruct.schedules.vta.pack import pack
from tvmstruct.vta.config import DEFAULT, Config
from tvmstruct.vta.launch import Launch


@dataclass(frozen=True, eq=False)
class VtaKernel:
    """One launch."""

    launch: Launch

    @property
    def n_in(self) -> int:
        """Features that it reads."""
        return self.launch.x.features

    @property
    def n_out(self) -> int:
        """Features that it yields."""
        return self.launch.y.features


def vta_linear(
    op: ops.Op,
    bias: Array | None,
    shift: int | Array,
    relu: bool,
    rows: int,
    config: Config = DEFAULT,
    pick: Pick = pick_default,
) -> VtaKernel:
    """Return the kernel of ``y = clip(relu(x @ op + bias) >> shift, -128, 127)`` on ``rows`` rows.

    ``op`` is a `Dense`, `BlockDiag` or `SharedBlockDiag` of int8; x and y are int8. Sums are
    int32 and wrap around; ``bias`` (n_out,) int32 is added, ReLU (if ``relu``) takes the maximum
    with 0, and ``shift``, one number or one for each output channel, 0 to 31, is an arithmetic
    right shift, which rounds towards minus infinity: for rounding to nearest, halves up, the
    caller adds ``1 << (shift - 1)`` to the bias. The result is clipped to [-128, 127].

    Raises VtaError where op, shifts or sizes are not what VTA can do.
    """
    whole = np.broadcast_to(np.asarray(shift, np.int32), (op.n_out,))
    added = np.zeros(op.n_out, np.int32) if bias is None else np.asarray(bias, np.int32)
    after = Requantise(added, whole, relu)
    name = f"linear_{rows}x{op.n_in}x{op.n_out}"
    return VtaKernel(linear_launch(name, pack(op, config), after, rows, config, pick))
