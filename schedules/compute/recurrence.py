"""What a recurrent kernel depends on, how its weights are packed, and what a step computes.

Units are cut into vectors. A dense hidden matrix is packed ``[block][k][gate][vector][lanes]``,
blocks of a few vectors of units one after the other: what a step streams in order, and all gates
of a unit are sums of one tile, so that a unit is updated while they are in registers.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from tvm.ir import Expr
from tvm.script.ir_builder import tirx as T

from tvmstruct.recurrent import Activation, Cell
from tvmstruct.schedules.compute.low_precision import quantize
from tvmstruct.schedules.vector_math import tanh_fraction

Emit = Callable[[Expr], Expr]
LEAST = 4  # lanes of a vector
SUMS = 12  # vectors of sums of a block to which others may come: registers of AVX2, less operands
OFFSET = 128  # makes bytes of the state unsigned


@dataclass(frozen=True)
class Side:
    """One direction: its cell, and which vectors it has beside its matrices.

    ``hidden`` is the precision of its hidden matrices. Where ``groups`` is g > 1 unit
    k * h / g + i of the kernel is unit i * g + k of its state arguments and results.
    """

    cell: Cell
    hidden_bias: bool
    peepholes: bool
    groups: int = 0
    hidden: str = "f32"


@dataclass(frozen=True)
class Recurrence:
    """The static side of a recurrent kernel: directions of ``h`` units for ``batch`` rows a step.

    With ``lengths`` each row of the batch has a number of steps of its own.
    """

    sides: tuple[Side, ...]
    h: int
    batch: int
    lengths: bool

    @property
    def lstm(self) -> bool:
        """Whether there is a cell state."""
        return self.sides[0].cell.kind == "lstm"


def hidden_parts(cell: Cell) -> tuple[tuple[int, int], ...]:
    """Return the hidden products of a step: (first gate, gates) each."""
    return ((0, 2), (2, 1)) if cell.split_reset else ((0, cell.gates),)


Block = tuple[tuple[int, int, int], ...]  # of vectors alike: first unit, lanes, how many


@dataclass(frozen=True)
class Layout:
    """Where the state lies: ``groups`` of ``each`` units, every group in whole vectors.

    Unit i of group k is feature ``i * groups + k`` outside: with one group the natural order.
    """

    groups: int
    each: int
    lanes: int

    @property
    def vectors(self) -> list[tuple[int, int]]:
        """First unit and lanes of the vectors of a group: whole ones, then 8 and 4."""
        found, first = [], 0
        for size in (n for n in (16, 8, 4) if n <= self.lanes):
            while -(-self.each // LEAST) * LEAST - first >= size:
                found.append((first, size))
                first += size
        return found

    @property
    def padded(self) -> int:
        """Units of a group with those that fill its last vector."""
        return sum(lanes for _, lanes in self.vectors)

    @property
    def size(self) -> int:
        """Length of a row of the state."""
        return self.groups * self.padded

    def blocks(self, width: int, gates: int = 0) -> list[Block]:
        """Cut a group into blocks of up to ``width`` equal vectors.

        All blocks but the last few are alike. With ``gates`` the narrow vectors at the end of a
        group join the block before them, where those of all gates fill whole vectors.
        """
        found: list[Block] = []
        for first, lanes in self.vectors:
            before = found[-1][-1] if found else (0, 0, 0)
            if before[1] == lanes and before[2] < width:
                found[-1] = (*found[-1][:-1], (*before[:2], before[2] + 1))
            elif gates and found and lanes < self.lanes and self._fill(found[-1], lanes, gates):
                found[-1] = (*found[-1], (first, lanes, 1))
            else:
                found.append(((first, lanes, 1),))
        return found

    def _fill(self, block: Block, lanes: int, gates: int) -> bool:
        """Return whether a block and a vector of ``lanes`` after it are sums of whole vectors."""
        sizes = [*(size * count for _, size, count in block), lanes]
        whole = all(gates * size % self.lanes == 0 for size in sizes)
        return whole and gates * sum(sizes) <= SUMS * self.lanes

    def pad(self, array: np.ndarray) -> np.ndarray:
        """Return (..., groups * each), group after group, each group padded with zeros."""
        apart = array.reshape(*array.shape[:-1], self.groups, self.each)
        widths = [(0, 0)] * (apart.ndim - 1) + [(0, self.padded - self.each)]
        return np.ascontiguousarray(np.pad(apart, widths))


def pack_units(
    w: np.ndarray, gates: int, layout: Layout, width: int, *, joined: bool = True
) -> np.ndarray:
    """Return w (groups, k, gates * each) as ``[group][block][k][gate][vector][lanes]``, flat.

    Where vectors of two sizes are ``joined`` in a block, those of one size come after the others.
    """
    groups, k, _ = w.shape
    apart = w.reshape(groups, k, gates, layout.each)
    widths = [(0, 0)] * 3 + [(0, layout.padded - layout.each)]
    padded = np.pad(apart, widths)
    found = []
    for block in layout.blocks(width, gates if joined else 0):
        parts = [padded[..., first : first + lanes * count] for first, lanes, count in block]
        rows = [part.reshape(groups, k, -1) for part in parts]
        found.append(np.concatenate(rows, axis=-1).reshape(groups, -1))
    return np.concatenate(found, axis=1).reshape(-1)


def pack_bytes(w: np.ndarray, gates: int, layout: Layout, width: int) -> dict[str, np.ndarray]:
    """Return w (k, gates * h) in int8: words of four k each, where sums start, and scales.

    The state's bytes are kept with 128 added, which ``start`` takes away.
    """
    q, scale = quantize(w)
    four = np.pad(q, ((0, -len(q) % 4), (0, 0))).reshape(-1, 4, q.shape[1])
    words = np.ascontiguousarray(four.swapaxes(1, 2)).view(np.int32)[..., 0]
    start = -OFFSET * q.sum(axis=0, dtype=np.int32)
    apart = {"start": start, "scale": scale.astype(np.float32)}
    padded = {k: layout.pad(v.reshape(gates, -1)).reshape(-1) for k, v in apart.items()}
    return {"words": pack_units(words[None], gates, layout, width, joined=False), **padded}


@dataclass(frozen=True)
class Units:
    """``count`` units in a vector of ``lanes``: their places in a row of state, and of z.

    Outside they are features ``natural + i * stride``.
    """

    place: Expr
    column: Expr
    lanes: int
    count: int
    natural: Expr
    stride: int


@dataclass(frozen=True)
class Vectors:
    """Expressions of one vector of units: ``lanes`` of them, kept in registers by ``keep``."""

    lanes: int
    keep: Emit

    def splat(self, value: float) -> Expr:
        """Return a vector of one number."""
        return T.float32(value) if self.lanes == 1 else T.broadcast(T.float32(value), self.lanes)

    def activate(self, activation: Activation, x: Expr, clip: float | None = None) -> Expr:
        """Return the activation of ``x``, which is cut to [-clip, clip] first; NaN passes."""
        if clip is not None:
            x = self.keep(T.min(self.splat(clip), T.max(self.splat(-clip), x)))
        return self.keep(_ACTIVATIONS[activation.name](self, x, *activation.parameters))

    def fraction(self, activation: Activation, x: Expr, clip: float | None) -> tuple[Expr, Expr]:
        """Return numerator and denominator of a sigmoid or a tanh of ``x``, cut to the clip.

        Products of activations then share a division; one that is cut at 1 may be over it by the
        error of its fit, 5e-7.
        """
        if clip is not None:
            x = T.min(self.splat(clip), T.max(self.splat(-clip), x))
        x = self.keep(x)
        if activation.name == "sigmoid":
            return self.splat(1), self.keep(self.splat(1) + T.exp(self.splat(0) - x))
        top, bottom = tanh_fraction(x)
        return self.keep(top), self.keep(bottom)

    def select(self, condition: Expr, a: Expr, b: Expr) -> Expr:
        """Return a where the condition holds, else b."""
        return T.Select(condition, a, b)


def _softplus(v: Vectors, x: Expr) -> Expr:
    """``max(x, 0) + log(1 + exp(-|x|))``; log1p by the atanh series of u / (2 + u), u <= 1."""
    u = v.keep(T.exp(T.min(x, v.splat(0) - x)))
    s = v.keep(u / (v.splat(2) + u))
    square = v.keep(s * s)
    total = v.splat(0)
    for power in range(15, 0, -2):
        total = total * square + v.splat(2.0 / power)
    return T.max(v.splat(0), x) + s * total


def _elu(v: Vectors, x: Expr, alpha: float) -> Expr:
    """``alpha expm1(x)`` below 0; expm1 through tanh(x / 2), which loses no digits near 0."""
    low = v.keep(T.min(x, v.splat(0)))
    t = v.keep(T.tanh(low * v.splat(0.5)))
    grown = v.splat(2 * alpha) * t / (v.splat(1) - t)
    return v.select(x < v.splat(0), grown, x)


_ACTIVATIONS: dict[str, Callable[..., Expr]] = {
    "sigmoid": lambda v, x: T.sigmoid(x),
    "tanh": lambda v, x: T.tanh(x),
    "relu": lambda v, x: T.max(v.splat(0), x),
    "softsign": lambda v, x: x / (v.splat(1) + T.max(x, v.splat(0) - x)),
    "softplus": _softplus,
    "affine": lambda v, x, a, b: v.splat(a) * x + v.splat(b),
    "leakyrelu": lambda v, x, a: v.select(x < v.splat(0), v.splat(a) * x, x),
    "thresholdedrelu": lambda v, x, a: v.select(x > v.splat(a), x, x * v.splat(0)),
    "scaledtanh": lambda v, x, a, b: v.splat(a) * T.tanh(v.keep(v.splat(b) * x)),
    "hardsigmoid": lambda v, x, a, b: T.min(
        v.splat(1), T.max(v.splat(0), v.splat(a) * x + v.splat(b))
    ),
    "elu": _elu,
}


@dataclass(frozen=True)
class Reads:
    """What a vector of units reads in a step beside the sums of its gates."""

    z: Callable[[int], Expr]  # of a gate
    h: Callable[[], Expr]
    c: Callable[[], Expr]
    bias: Callable[[int], Expr] | None  # of a gate
    peephole: Callable[[int], Expr] | None


def lstm_step(cell: Cell, v: Vectors, at: Reads, u: Sequence[Expr]) -> tuple[Expr, Expr]:
    """Return the new h and c of sums ``u`` of gates i, f, g, o."""
    act, c = cell.activations, v.keep(at.c())

    def total(gate: int, hole: int | None = None, state: Expr | None = None) -> Expr:
        value = at.z(gate) + u[gate]
        if at.bias is not None:
            value = value + at.bias(gate)
        if at.peephole is not None and hole is not None:
            value = value + at.peephole(hole) * (c if state is None else state)
        return v.keep(value)

    if not cell.coupled and [a.name for a in act] == ["sigmoid", "tanh", "tanh"]:
        _, i = v.fraction(act[0], total(0, 0), cell.clip)
        _, f = v.fraction(act[0], total(1, 1), cell.clip)
        top, g = v.fraction(act[1], total(2), cell.clip)
        new = v.keep(c / f + top / v.keep(i * g))
        _, o = v.fraction(act[0], total(3, 2, new), cell.clip)
        top, bottom = v.fraction(act[2], new, None)
        return v.keep(top / v.keep(o * bottom)), new
    i = v.activate(act[0], total(0, 0), cell.clip)
    f = v.splat(1) - i if cell.coupled else v.activate(act[0], total(1, 1), cell.clip)
    g = v.activate(act[1], total(2), cell.clip)
    new = v.keep(f * c + i * g)
    o = v.activate(act[0], total(3, 2, new), cell.clip)
    return v.keep(o * v.activate(act[2], new)), new


def gate_step(cell: Cell, v: Vectors, at: Reads, gate: int, u: Expr) -> Expr:
    """Return the activated gate r or z of a GRU."""
    value = at.z(gate) + u
    if at.bias is not None:
        value = value + at.bias(gate)
    return v.activate(cell.activations[0], v.keep(value), cell.clip)


def gru_step(cell: Cell, v: Vectors, at: Reads, z: Expr, inner: Expr) -> Expr:
    """Return the new h of the gate z and ``inner``, what meets the input in the candidate."""
    n = v.activate(cell.activations[1], v.keep(at.z(2) + inner), cell.clip)
    return v.keep(n + z * (at.h() - n))


def rnn_step(cell: Cell, v: Vectors, at: Reads, u: Expr) -> Expr:
    """Return the new h."""
    value = at.z(0) + u
    if at.bias is not None:
        value = value + at.bias(0)
    return v.activate(cell.activations[0], v.keep(value), cell.clip)
