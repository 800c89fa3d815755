"""Kernels for VTA: int8 products, alone or in chains, whose schedules record streams."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from tvmstruct import ops
from tvmstruct.errors import InputError
from tvmstruct.ops import Array
from tvmstruct.schedules.registry import Pick, pick_default
from tvmstruct.schedules.vta.chain import Chain, Product, fold
from tvmstruct.schedules.vta.requantise import Requantise
from tvmstruct.vta.config import DEFAULT, Config
from tvmstruct.vta.cycles import Prediction, predict
from tvmstruct.vta.integer import IntLinear, Reorder, Step
from tvmstruct.vta.isa import decode_stream
from tvmstruct.vta.launch import Launch
from tvmstruct.vta.simulator import simulate


@dataclass(frozen=True, eq=False)
class VtaKernel:
    """One launch. What features a CPU must move is ``before`` and ``after`` it, if anything."""

    launch: Launch
    before: Reorder | None = None
    after: Reorder | None = None

    def run(self, x: Array) -> Array:
        """Return what the simulator makes of int8 rows ``x`` (rows, n_in), int8 too."""
        launch = self.launch
        if x.dtype != np.int8 or x.ndim != 2 or len(x) != launch.x.rows:
            raise InputError(
                f"VTA kernel {launch.name}: x is {x.dtype} {x.shape}; want int8 rows, "
                f"{launch.x.rows} of them"
            )
        x = x if self.before is None else self.before.run(x)
        if x.shape[1] != launch.x.features:
            raise InputError(
                f"VTA kernel {launch.name}: x has {x.shape[1]} features; want {launch.x.features}"
            )
        run = simulate(launch.insn, launch.image(x), launch.base, launch.config)
        y = launch.result(run.dram)
        return y if self.after is None else self.after.run(y)

    def predict(self) -> Prediction:
        """Return what the cycle model says of the launch."""
        config = self.launch.config
        return predict(decode_stream(self.launch.insn, config), config)


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
    with 0, and ``shift``, one number or one for each output channel, 0 to 30, is an arithmetic
    right shift, which rounds towards minus infinity: for rounding to nearest, halves up, the
    caller adds ``1 << (shift - 1)`` to the bias. The result is clipped to [-128, 127].

    Raises VtaError where op, shifts or sizes are not what VTA can do.
    """
    whole = np.broadcast_to(np.asarray(shift, np.int32), (op.n_out,))
    added = np.zeros(op.n_out, np.int32) if bias is None else np.asarray(bias, np.int32)
    return vta_chain([IntLinear(op, added, whole, relu)], rows, config, pick)


def vta_chain(
    steps: Sequence[Step], rows: int, config: Config = DEFAULT, pick: Pick = pick_default
) -> VtaKernel:
    """Return one launch for the steps of an integer program on ``rows`` rows, as `Program.run`.

    Between linear steps int8 results go through DRAM. A `Reorder` at either end is where features
    lie in memory; between a dense step and another it is in the weights; elsewhere it must move
    whole tiles or be a transposition of tiles.

    Raises VtaError for features that move in another way: those steps want launches of their own.
    """
    products: list[Product] = []
    index: Array | None = None
    for step in steps:
        if isinstance(step, Reorder):
            index = step.index if index is None else _then(index, step.index)
        else:
            after = Requantise(step.bias, step.shift, step.relu)
            products.append(Product(step.op, after, index))
            index = None
    if not products:
        raise InputError("VTA chain: no linear step; want at least one")
    first, products[0] = products[0].index, Product(products[0].op, products[0].after)
    chain = Chain(fold(products), rows, config, pick)
    x_columns, before = _inputs(chain, first)
    y_columns, after = _outputs(chain, index)
    name = f"{'linear' if len(products) == 1 else 'chain'}_{rows}x{len(x_columns)}"
    launch = chain.launch(f"{name}x{len(y_columns)}", x_columns, y_columns)
    return VtaKernel(launch, before, after)


def _then(first: Array, second: Array) -> Array:
    return np.where(second < 0, -1, first[second])


def _inputs(chain: Chain, index: Array | None) -> tuple[Array, Reorder | None]:
    """Return where each feature of x lies, and what a CPU must move first."""
    columns = chain.packed[0].x_columns
    if index is None:
        return columns, None
    if not np.array_equal(np.sort(index), np.arange(index.size)):
        return columns, Reorder(index)
    placed = np.empty_like(columns)
    placed[index] = columns
    return placed, None


def _outputs(chain: Chain, index: Array | None) -> tuple[Array, Reorder | None]:
    """Return where each feature of y lies, and what a CPU must move at the end."""
    columns = chain.packed[-1].y_columns
    if index is None:
        return columns, None
    if (index < 0).any():
        return columns, Reorder(index)
    return columns[index], None
