"""BH4 (LookupFFN): four pairs of a block-diagonal matrix and a Hadamard transform.

The public code computes ``0.7 bh4(x) + 0.3 repeat(x)`` on features padded to a power of
two, with unscaled Hadamard matrices on CUDA; that convention is ours.
"""

from __future__ import annotations

import numpy as np

from tvmstruct.fit import Fit, as_stored, as_weight, fit
from tvmstruct.ops import (
    Array,
    BlockDiag,
    Op,
    Pad,
    Permute,
    WalshHadamard,
    add,
    crop,
    next_power_of_two,
    pad,
    product,
    scaling,
    zeros,
)

PAIRS = 4
DECAY = 0.7


def bh4(w: Array, n_in: int, n_out: int, *, decay: float = DECAY) -> Op:
    """Return ``y = decay bh4(x) + (1 - decay) repeat(x)``, cropped to ``n_out``.

    ``w`` has shape (repeats, 4, blocks, b, b) with the code's axes (output, input) last.
    All repeats run as one chain: the first factor fans out to ``repeats b`` per block, and
    features lie in the order (block, repeat, b) until the end. There the transform is that over
    the blocks times that within them: ``H_width = H_blocks (x) H_b``.
    """
    repeats, pairs, blocks, b, _ = w.shape
    width = blocks * b
    _check_shape(w, n_in, n_out)
    rows = w.swapaxes(-1, -2).transpose(1, 2, 0, 3, 4)  # (pair, block, repeat, input, output)
    fan = np.ascontiguousarray(rows[0].swapaxes(1, 2)).reshape(blocks, b, repeats * b)
    within = _hadamards(b, blocks * repeats)
    across = _hadamards(blocks, 1, inner=repeats * b)
    chain: list[Op] = [BlockDiag(fan)]
    for pair in range(1, pairs):
        stacked = np.ascontiguousarray(rows[pair]).reshape(blocks * repeats, b, b)
        chain += [*across, *within, BlockDiag(stacked)]
    chain += [*within, *across]
    if repeats > 1:
        chain.append(Permute((blocks, repeats, b), (1, 0, 2)))
    chain.append(scaling(width * repeats, decay))
    total = add(product(*chain), *_residual(width, repeats, decay))
    return product(*pad(n_in, width), total, *crop(width * repeats, n_out))


def nearest_bh4(w: Array, *, b: int, decay: float = DECAY, sweeps: int = 20, seed: int = 0) -> Fit:
    """Return a BH4 operator near ``w``; a local optimum, so read ``Fit.error``.

    The repeats write separate outputs and are fitted one by one: alternating least squares
    from random blocks of the public code's scale.
    """
    target = as_weight(w)
    n_in, n_out = target.shape
    width = check_blocks(n_in, n_out, b=b)
    rng = np.random.default_rng(seed)
    weights: list[Array] = []
    for start in range(0, n_out, width):
        stop = min(start + width, n_out)
        blocks = rng.normal(size=(1, PAIRS, width // b, b, b)) / np.sqrt(b * width)
        weights.append(_fit_repeat(blocks, target[:, start:stop], decay, sweeps))
    op = bh4(np.concatenate(weights), n_in, n_out, decay=decay)
    error = float(np.linalg.norm(op.to_dense() - target) / max(np.linalg.norm(target), 1e-300))
    parameters = {"b": b, "decay": decay, "sweeps": sweeps, "seed": seed}
    return Fit(as_stored(op, w), error, "bh4", parameters)


def bh4_template(
    n_in: int, n_out: int, *, b: int, decay: float = DECAY, sweeps: int = 20, seed: int = 0
) -> Op:
    """Return a member of zeros; ``sweeps`` and ``seed`` are options of fits, unused here."""
    del sweeps, seed
    width = check_blocks(n_in, n_out, b=b)
    w = zeros(-(-n_out // width), PAIRS, width // b, b, b)
    return bh4(w, n_in, n_out, decay=decay)


def check_blocks(n_in: int, n_out: int, *, b: int) -> int:
    """Return the padded width after checking that ``b`` divides it."""
    width = next_power_of_two(n_in)
    if b < 1 or width % b:
        raise ValueError(
            f"bh4: b={b} for a {n_in}x{n_out} weight, padded to {width} inputs; "
            f"want a power of two up to {width}"
        )
    return width


def bh4_params(
    n_in: int, n_out: int, *, b: int, decay: float = DECAY, sweeps: int = 20, seed: int = 0
) -> int:
    """Return ``4 d' b`` for each of ``ceil(n_out / d')`` repeats, ``d'`` being ``n_in`` padded."""
    width = check_blocks(n_in, n_out, b=b)
    return PAIRS * width * b * -(-n_out // width)


def _fit_repeat(blocks: Array, target: Array, decay: float, sweeps: int) -> Array:
    """Return the weights (1, 4, blocks, b, b) of one repeat fitted to ``target``."""
    n_in, n_out = target.shape
    found = fit(bh4(blocks, n_in, n_out, decay=decay), target, sweeps=sweeps).op
    fitted = np.stack([a.reshape(blocks.shape[2:]) for a in found.arrays()])
    return fitted.swapaxes(-1, -2)[None]


def _hadamards(n: int, blocks: int, inner: int = 1) -> list[Op]:
    return [WalshHadamard(n, blocks=blocks, inner=inner)] if n > 1 else []


def _residual(width: int, repeats: int, decay: float) -> list[Op]:
    if decay == 1:
        return []
    scale = scaling(width, 1 - decay)
    if repeats == 1:
        return [scale]
    copies = [Pad(width, repeats * width, start=r * width) for r in range(repeats)]
    return [product(scale, add(*copies))]


def _check_shape(w: Array, n_in: int, n_out: int) -> None:
    repeats, pairs, blocks, b, other = w.shape
    width = next_power_of_two(n_in)
    if pairs != PAIRS or b != other or blocks * b != width or repeats != -(-n_out // width):
        raise ValueError(
            f"bh4: w has shape {w.shape} for {n_in} inputs and {n_out} outputs; want "
            f"({-(-n_out // width)}, {PAIRS}, {width}/b, b, b)"
        )
