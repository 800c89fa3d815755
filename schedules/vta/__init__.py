"""Kernels for VTA: int8 products, alone or in chains, whose schedules record streams."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from tvmstruct import ops
from tvmstruct.errors import InputError, VtaError
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

# Cycles that one more launch is worth: 10 us at 100 MHz to start it and to move int8 rows between,
# an assumption, for no board was measured.
LAUNCH = 1000


@dataclass(frozen=True, eq=False)
class VtaKernel:
    """One launch. What features a CPU must move is ``before`` and ``after`` it, if anything."""

    launch: Launch
    before: Reorder | None = None
    after: Reorder | None = None
    portable: bool = True  # whether hardware without MUL runs it too

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
        image, strict = launch.image(x), self.portable
        run = simulate(launch.insn, image, launch.base, launch.config, strict=strict)
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
    steps: Sequence[Step],
    rows: int,
    config: Config = DEFAULT,
    pick: Pick = pick_default,
    *,
    portable: bool = True,
) -> VtaKernel:
    """Return one launch for the steps of an integer program on ``rows`` rows, as `Program.run`.

    Between linear steps int8 results go through DRAM. A `Reorder` at either end is where features
    lie in memory; between a dense step and another it is in the weights; elsewhere it must move
    whole tiles or be a transposition of tiles. Where it need not be ``portable``, the diagonals of
    VVMA may go through the vector ALU, which only some versions of VTA let multiply: the cycle
    model says which way is faster.

    Raises VtaError for features that move in another way, or where launches of their own, with
    their cost, are faster: small blocks fill tiles only if they need not meet.
    """
    products, last = _products(steps)
    mixed = None if portable else _in_alu(products, last, config)
    if mixed is None:
        return _kernel(products, last, rows, config, pick)
    in_alu = replace(_kernel(*mixed, rows, config, pick), portable=False)
    try:
        in_matrix_unit = _kernel(products, last, rows, config, pick)
    except VtaError:
        return in_alu
    return min(in_matrix_unit, in_alu, key=lambda kernel: kernel.predict().cycles)


def vta_kernels(
    steps: Sequence[Step], rows: int, config: Config = DEFAULT, pick: Pick = pick_default
) -> tuple[VtaKernel | Reorder, ...]:
    """Return the steps in as few launches as they can be, first come first served.

    Raises VtaError for a step that VTA cannot have.
    """
    found: list[VtaKernel | Reorder] = []
    rest = list(steps)
    while rest:
        if all(isinstance(step, Reorder) for step in rest):
            return (*found, *(step for step in rest if isinstance(step, Reorder)))
        shortest = next(i for i, step in enumerate(rest) if isinstance(step, IntLinear)) + 1
        for end in range(len(rest), shortest - 1, -1):
            try:
                found.append(vta_chain(rest[:end], rows, config, pick))
            except VtaError:
                if end == shortest:
                    raise
                continue
            rest = rest[end:]
            break
    return tuple(found)


def _products(steps: Sequence[Step]) -> tuple[list[Product], Array | None]:
    """Return the linear steps, each with the order that it reads in, and the order at the end."""
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
    return products, index


def _kernel(
    products: Sequence[Product], last: Array | None, rows: int, config: Config, pick: Pick
) -> VtaKernel:
    first, *others = products
    chain = Chain(fold([replace(first, index=None), *others]), rows, config, pick)
    x_columns, before = _inputs(chain, first.index)
    y_columns, after = _outputs(chain, last)
    name = f"{'linear' if not others else 'chain'}_{rows}x{len(x_columns)}x{len(y_columns)}"
    kernel = VtaKernel(chain.launch(name, x_columns, y_columns), before, after)
    if not chain.joined:
        _check_pays(kernel, products, rows, config)
    return kernel


def _check_pays(kernel: VtaKernel, products: Sequence[Product], rows: int, config: Config) -> None:
    """Raise VtaError where blocks padded each to meet in one launch cost more than launches."""
    cycles = kernel.predict().cycles
    single = sum(
        _kernel([replace(p, index=None)], None, rows, config, pick_default).predict().cycles
        for p in products
    )
    most = single + LAUNCH * (len(products) - 1)
    if cycles > most:
        raise VtaError(
            f"VTA chain: one launch takes {cycles} cycles, but {len(products)} launches {single} "
            f"and about {LAUNCH} for each more that a CPU starts"
        )


def _in_alu(
    products: Sequence[Product], last: Array | None, config: Config
) -> tuple[list[Product], Array | None] | None:
    """Return the products with diagonals in the vector ALU, None where there are none.

    They are blocks between a transposition of what they read and one of what they yield.
    """
    found = list(products)
    following = [*(p.index for p in found[1:]), last]
    for n, product in enumerate(found):
        if not isinstance(product.op, ops.BlockDiag):
            continue
        lanes, j, i = product.op.w.shape
        before, after = ops.swap(j, lanes), ops.swap(lanes, i)
        if lanes % config.block_out or not _is(product.index, before):
            continue
        if not _is(following[n], after):
            continue
        order = _order(after)
        requantise = replace(
            product.after, bias=product.after.bias[order], shift=product.after.shift[order]
        )
        diagonals = product.op.w.transpose(1, 2, 0)
        found[n] = replace(product, after=requantise, index=None, diagonals=diagonals)
        if n + 1 < len(found):
            found[n + 1] = replace(found[n + 1], index=None)
        else:
            last = None
    return (found, last) if any(p.diagonals is not None for p in found) else None


def _is(index: Array | None, order: ops.Op) -> bool:
    return index is not None and np.array_equal(index, _order(order))


def _order(op: ops.Op) -> Array:
    return op.apply(np.arange(op.n_in)[None])[0]


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
