"""VVMA: every ``k x k`` block of the weight is one shared matrix times its own diagonal.

In the paper's column form ``y = W x`` the blocks are ``W_ij = M diag(v_ij)``; the transposed
form ``diag(v_ij) M`` is cheaper where there are more outputs than inputs.  The rank is not
bounded by ``k``, as the paper has it: random factors of n = 256, k = 16 have rank 256.
"""

from __future__ import annotations

import numpy as np

from tvmstruct.fit import Fit, Solver, as_stored, as_weight, complete, relative_error, truncate
from tvmstruct.ops import Array, BlockDiag, Op, SharedBlockDiag, crop, pad, product, swap, zeros


def vvma(m: Array, v: Array, *, transposed: bool = False) -> Op:
    """Return the operator of ``m`` (k, k) and ``v`` (out blocks i, in blocks j, k).

    ``y_i = M sum_j v_ij * x_j``, so ``M`` is applied once per output block; transposed,
    ``y_i = sum_j v_ij * (M x_j)``, once per input block.  Column vectors, as in the paper.
    """
    i, j, k = v.shape
    if m.shape != (k, k):
        raise ValueError(f"vvma: m has shape {m.shape} and v {v.shape}; want m of shape {(k, k)}")
    mix = swap(j, k) @ BlockDiag(v.transpose(2, 1, 0)) @ swap(k, i)
    if transposed:
        return SharedBlockDiag(m.T, j) @ mix
    return mix @ SharedBlockDiag(m.T, i)


def nearest_vvma(
    w: Array, *, k: int, transposed: bool | None = None, solver: Solver = truncate
) -> Fit:
    """Return the VVMA of block size ``k`` nearest to ``w`` (n_in, n_out).

    Row p of every block of ``w`` is ``v_ij[p]`` times row p of ``M^T``: k separate rank-1
    problems of (blocks x k) matrices, so the optimum is exact.  Where k does not divide the
    side that ``M`` faces, the entries beyond the weight are free and alternating least
    squares fills them in.  ``transposed`` left out takes the form with fewer multiply-adds.
    """
    target = as_weight(w)
    transposed = cheaper_form(*target.shape) if transposed is None else transposed
    check_block(*target.shape, k=k)
    oriented = target.T if transposed else target
    m, v, approximation = _rank_one(oriented, k, solver)
    if transposed:  # W^T = M-form of the mirrored layer: swap the block axes, transpose M
        m, v, approximation = m.T, v.swapaxes(0, 1), approximation.T
    n_in, n_out = (-(-side // k) * k for side in target.shape)
    op = product(
        *pad(target.shape[0], n_in),
        vvma(m, v, transposed=transposed),
        *crop(n_out, target.shape[1]),
    )
    error = relative_error(approximation, target)
    return Fit(as_stored(op, w), error, "vvma", {"k": k, "transposed": transposed})


def _rank_one(w: Array, k: int, solver: Solver) -> tuple[Array, Array, Array]:
    """Return ``m``, ``v`` and the fit for blocks ``diag(v_ij) m^T`` of ``w`` (row form)."""
    j, i = (-(-side // k) for side in w.shape)
    full = np.zeros((j * k, i * k))
    full[: w.shape[0], : w.shape[1]] = w
    stack = full.reshape(j, k, i, k).transpose(1, 0, 2, 3).reshape(k, j * i, k)
    known = np.ones((i * k,), bool)
    known[w.shape[1] :] = False
    known = np.tile(known.reshape(i, k), (j, 1))  # (j i, k): input rows beyond w are zero rows
    left, right = complete(stack, known, 1, solver=solver)
    left, right = _balance(left, right)
    fitted = (left @ right).reshape(k, j, i, k).transpose(1, 0, 2, 3).reshape(full.shape)
    v = left.reshape(k, j, i).transpose(2, 1, 0)
    return right[:, 0, :].T, v, fitted[: w.shape[0], : w.shape[1]]


def _balance(left: Array, right: Array) -> tuple[Array, Array]:
    """Give the rows of ``M`` the norm that makes both factors equally large (float32 range)."""
    size_left = np.linalg.norm(left, axis=(1, 2), keepdims=True) / np.sqrt(left.shape[1])
    size_right = np.linalg.norm(right, axis=(1, 2), keepdims=True) / np.sqrt(right.shape[2])
    usable = (size_left > 0) & (size_right > 0)
    ratio = np.sqrt(np.divide(size_left, size_right, out=np.ones_like(size_left), where=usable))
    return left / ratio, right * ratio


def vvma_template(n_in: int, n_out: int, *, k: int, transposed: bool | None = None) -> Op:
    """Return a member of zeros: the shapes that training starts from."""
    check_block(n_in, n_out, k=k)
    transposed = cheaper_form(n_in, n_out) if transposed is None else transposed
    j, i = -(-n_in // k), -(-n_out // k)
    core = vvma(zeros(k, k), zeros(i, j, k), transposed=transposed)
    return product(*pad(n_in, j * k), core, *crop(i * k, n_out))


def cheaper_form(n_in: int, n_out: int) -> bool:
    """Return whether the transposed form takes fewer multiply-adds."""
    return n_out > n_in


def check_block(n_in: int, n_out: int, *, k: int) -> None:
    """Raise unless ``k`` is a block size for the weight."""
    if not 1 <= k <= max(n_in, n_out):
        raise ValueError(
            f"vvma: k={k} for a {n_in}x{n_out} weight; want 1 <= k <= {max(n_in, n_out)}"
        )


def vvma_params(n_in: int, n_out: int, *, k: int, transposed: bool | None = None) -> int:
    """Return ``k^2 + n_in n_out / k`` with both sides rounded up to multiples of k."""
    return k * k + -(-n_in // k) * -(-n_out // k) * k


def vvma_macs(n_in: int, n_out: int, *, k: int, transposed: bool | None = None) -> int:
    """Return ``n_in n_out / k + n_out k`` (transposed ``+ n_in k``), sides rounded up."""
    transposed = cheaper_form(n_in, n_out) if transposed is None else transposed
    j, i = -(-n_in // k), -(-n_out // k)
    return j * i * k + (j if transposed else i) * k * k
