"""AntMan's localised group projections: block diagonal, shuffled, mixed and of low rank."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from tvmstruct.fit import Fit, Solver, as_stored, as_weight, fit, relative_error, truncate
from tvmstruct.ops import Array, BlockDiag, Dense, Op, crop, pad, product, swap, zeros


def block_diagonal(w: Array) -> Op:
    """Return ``y = D_g x`` for the blocks ``w`` (g, p, q)."""
    return BlockDiag(w)


def lgp_shuffle(w: Array) -> Op:
    """Return ``y = S D_g x``: blocks ``w`` (g, p, q), then the shuffle (g, q) -> (q, g)."""
    return BlockDiag(w) @ swap(w.shape[0], w.shape[2])


def lgp_dense(w: Array, m: Array, *, mix_first: bool) -> Op:
    """Return ``y = D_g M x`` where the mixing comes first, else ``y = M D_g x``."""
    return Dense(m) @ BlockDiag(w) if mix_first else BlockDiag(w) @ Dense(m)


def low_rank_lgp(w_in: Array, m: Array, w_out: Array) -> Op:
    """Return ``y = D_out M D_in x``; groups that do not divide the rank are cropped or padded."""
    rank = m.shape[0]
    first, last = BlockDiag(w_in), BlockDiag(w_out)
    return product(first, *crop(first.n_out, rank), Dense(m), *pad(rank, last.n_in), last)


def nearest_block_diagonal(w: Array, *, g: int) -> Fit:
    """Return the ``g`` diagonal blocks of ``w``: the exact optimum."""
    return _take_blocks(w, g, "block_diagonal", shuffled=False)


def nearest_lgp_shuffle(w: Array, *, g: int) -> Fit:
    """Return the ``g`` blocks of ``w`` that LGP-shuffle keeps: the exact optimum."""
    return _take_blocks(w, g, "lgp_shuffle", shuffled=True)


def nearest_lgp_dense(w: Array, *, g: int, solver: Solver = truncate) -> Fit:
    """Return the LGP-dense operator nearest to ``w``: ``M D_g`` or ``D_g M`` in column form.

    ``M`` is square of the smaller side, so each group owns a slab of ``w`` and its own rows
    (or columns) of ``M``: ``g`` truncated singular value decompositions, the exact optimum.
    """
    target = as_weight(w)
    mix_first = target.shape[0] <= target.shape[1]
    _check_groups("lgp_dense", *target.shape, g=g)
    tall = target.T if mix_first else target
    blocks, mixing, fitted = _slab_factors(tall, g, solver)
    core = lgp_dense(blocks, mixing, mix_first=False)
    if mix_first:
        fitted = fitted.T
        core = lgp_dense(blocks.swapaxes(1, 2), mixing.T, mix_first=True)
    n_in, n_out = target.shape
    op = product(*pad(n_in, core.n_in), core, *crop(core.n_out, n_out))
    return Fit(as_stored(op, w), relative_error(fitted, target), "lgp_dense", {"g": g})


def nearest_low_rank_lgp(
    w: Array, *, g: int, r: int, g_out: int | None = None, sweeps: int = 20
) -> Fit:
    """Return a LowRank-LGP operator near ``w``, of inner rank ``min(n_in, n_out) / r``.

    Starts from the leading singular vectors of every group's slab, which settles exact
    members, and goes on with alternating least squares; the optimum may be a local one.
    """
    target = as_weight(w)
    g_out = g if g_out is None else g_out
    rank = inner_rank(*target.shape, r=r)
    _check_groups("low_rank_lgp", rank, max(target.shape), g=max(g, g_out))
    w_in = _slab_bases(target, g, -(-rank // g))
    w_out = _slab_bases(target.T, g_out, -(-rank // g_out)).swapaxes(1, 2)
    core = _mixed_core(w_in, w_out, rank, target)
    template = product(*pad(target.shape[0], core.n_in), core, *crop(core.n_out, target.shape[1]))
    found = fit(template, target, sweeps=sweeps)
    parameters = {"g": g, "r": r, "g_out": g_out}
    return Fit(as_stored(found.op, w), found.error, "low_rank_lgp", parameters)


def inner_rank(n_in: int, n_out: int, *, r: int) -> int:
    """Return AntMan's inner rank ``min(n_in, n_out) / r`` (its Table 7), rounded up."""
    if not 1 <= r <= min(n_in, n_out):
        raise ValueError(
            f"low_rank_lgp: r={r} for a {n_in}x{n_out} weight; want 1 <= r <= {min(n_in, n_out)}"
        )
    return -(-min(n_in, n_out) // r)


def block_diagonal_template(n_in: int, n_out: int, *, g: int) -> Op:
    """Return a block diagonal of zeros: the shapes that training starts from."""
    return _blocks_template(n_in, n_out, g, "block_diagonal", block_diagonal)


def lgp_shuffle_template(n_in: int, n_out: int, *, g: int) -> Op:
    """Return an LGP-shuffle of zeros: the shapes that training starts from."""
    return _blocks_template(n_in, n_out, g, "lgp_shuffle", lgp_shuffle)


def lgp_dense_template(n_in: int, n_out: int, *, g: int) -> Op:
    """Return an LGP-dense of zeros, the mixing on the smaller side."""
    _check_groups("lgp_dense", n_in, n_out, g=g)
    p, q = -(-n_in // g), -(-n_out // g)
    mix_first = n_in <= n_out
    mixing = zeros(n_in, g * p) if mix_first else zeros(g * q, n_out)
    core = lgp_dense(zeros(g, p, q), mixing, mix_first=mix_first)
    return product(*pad(n_in, core.n_in), core, *crop(core.n_out, n_out))


def low_rank_lgp_template(
    n_in: int, n_out: int, *, g: int, r: int, g_out: int | None = None, sweeps: int = 20
) -> Op:
    """Return a LowRank-LGP of zeros; ``sweeps`` is an option of fits and means nothing here."""
    del sweeps
    g_out = g if g_out is None else g_out
    rank = inner_rank(n_in, n_out, r=r)
    _check_groups("low_rank_lgp", rank, max(n_in, n_out), g=max(g, g_out))
    w_in = zeros(g, -(-n_in // g), -(-rank // g))
    w_out = zeros(g_out, -(-rank // g_out), -(-n_out // g_out))
    core = low_rank_lgp(w_in, zeros(rank, rank), w_out)
    return product(*pad(n_in, core.n_in), core, *crop(core.n_out, n_out))


def block_params(n_in: int, n_out: int, *, g: int) -> int:
    """Return ``n_in n_out / g`` with both sides rounded up to multiples of g."""
    return g * -(-n_in // g) * -(-n_out // g)


def lgp_dense_params(n_in: int, n_out: int, *, g: int) -> int:
    """Return ``n_in n_out / g + min(n_in, n_out)^2``, sides rounded up to multiples of g."""
    mixing = -(-min(n_in, n_out) // g) * g
    return block_params(n_in, n_out, g=g) + mixing * min(n_in, n_out)


def low_rank_lgp_params(n_in: int, n_out: int, *, g: int, r: int, g_out: int | None = None) -> int:
    """Return ``n_in s / g + s^2 + s n_out / g_out`` with ``s = min(n_in, n_out) / r``."""
    rank, g_out = inner_rank(n_in, n_out, r=r), g if g_out is None else g_out
    return block_params(n_in, rank, g=g) + rank * rank + block_params(rank, n_out, g=g_out)


def _blocks_template(
    n_in: int, n_out: int, g: int, family: str, build: Callable[[Array], Op]
) -> Op:
    _check_groups(family, n_in, n_out, g=g)
    p, q = -(-n_in // g), -(-n_out // g)
    return product(*pad(n_in, g * p), build(zeros(g, p, q)), *crop(g * q, n_out))


def _take_blocks(w: Array, g: int, family: str, *, shuffled: bool) -> Fit:
    target = as_weight(w)
    (n_in, n_out) = target.shape
    _check_groups(family, n_in, n_out, g=g)
    p, q = -(-n_in // g), -(-n_out // g)
    full = np.zeros((g * p, g * q))
    full[:n_in, :n_out] = target
    columns = full.reshape(g, p, q, g).swapaxes(2, 3) if shuffled else full.reshape(g, p, g, q)
    diagonal = np.arange(g)
    blocks = columns[diagonal, :, diagonal, :]
    core = lgp_shuffle(blocks) if shuffled else block_diagonal(blocks)
    op = product(*pad(n_in, g * p), core, *crop(g * q, n_out))
    columns[diagonal, :, diagonal, :] = 0  # a view of full: what is left is the residual
    norm = float(np.linalg.norm(target))
    error = float(np.linalg.norm(full)) / norm if norm > 0 else 0.0
    return Fit(as_stored(op, w), error, family, {"g": g})


def _slab_factors(tall: Array, g: int, solver: Solver) -> tuple[Array, Array, Array]:
    """Return blocks (g, p, q) and mixing (g q, n) of the row slabs' best rank-q factors."""
    rows, n = tall.shape
    p, q = -(-rows // g), -(-n // g)
    slabs = np.zeros((g, p, n))
    slabs.reshape(g * p, n)[:rows] = tall
    left, right = solver(slabs, q)
    blocks, mixing = np.zeros((g, p, q)), np.zeros((g, q, n))
    blocks[..., : left.shape[-1]], mixing[:, : right.shape[-2]] = left, right
    return blocks, mixing.reshape(g * q, n), (left @ right).reshape(g * p, n)[:rows]


def _slab_bases(w: Array, g: int, q: int) -> Array:
    """Return orthonormal bases (g, p, q) of the column spaces of the ``g`` row slabs of ``w``."""
    p = -(-w.shape[0] // g)
    slabs = np.zeros((g, p, w.shape[1]))
    slabs.reshape(g * p, w.shape[1])[: w.shape[0]] = w
    left, _ = truncate(slabs, min(q, p))
    bases = np.zeros((g, p, q))
    bases[..., : left.shape[-1]] = np.linalg.qr(left)[0]
    return bases


def _mixed_core(w_in: Array, w_out: Array, rank: int, target: Array) -> Op:
    """Return ``low_rank_lgp`` with the best mixing for bases whose columns are orthonormal."""
    n_in, n_out = target.shape
    first, last = BlockDiag(w_in), BlockDiag(w_out)
    reduced = product(*pad(n_in, first.n_in), first, *crop(first.n_out, rank)).to_dense()
    expanded = product(*pad(rank, last.n_in), last, *crop(last.n_out, n_out)).to_dense()
    return low_rank_lgp(w_in, reduced.T @ target @ expanded.T, w_out)


def _check_groups(family: str, n_in: int, n_out: int, *, g: int) -> None:
    if not 1 <= g <= min(n_in, n_out):
        raise ValueError(
            f"{family}: g={g} groups for a {n_in}x{n_out} weight; want 1 <= g <= {min(n_in, n_out)}"
        )
