"""Layer normalisation of a row, for the kernel of its own and for the end of any other kernel.

Two passes, as ONNX Runtime does it: the mean first, then the variance of what is left, which
loses nothing where the mean is far from zero. The row is in the first-level cache by then.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from tvm import tirx
from tvm.ir import Expr
from tvm.script.ir_builder import tirx as T

from tvmstruct.schedules import vector_math
from tvmstruct.schedules.builder import argument, i64, loops

PARTIAL_SUMS = 4  # independent vector sums: an addition takes three to four cycles

Term = Callable[[Expr | int, int], Expr]  # (first column, lanes) -> what is summed there


@dataclass(frozen=True)
class RowNorm:
    """What other kernels do to rows of y that they have just finished, in place."""

    lanes: int
    n: int
    epsilon: float
    gamma: tirx.Buffer
    beta: tirx.Buffer

    @classmethod
    def declare(cls, lanes: int, n: int, epsilon: float | None) -> RowNorm | None:
        """Declare the arguments gamma and beta, or nothing where there is no ``epsilon``."""
        if epsilon is None:
            return None
        return cls(lanes, n, epsilon, *(argument(name, (i64(n),)) for name in ("gamma", "beta")))

    def emit(self, y: tirx.Buffer, first: Expr | int, count: Expr | int, *, parallel: bool) -> None:
        """Emit the normalisation of ``count`` rows of y from ``first``."""
        buffers = {"out": y, "gamma": self.gamma, "beta": self.beta}
        with loops(count, kind=T.parallel if parallel else None) as (row,):
            emit_row(self.lanes, self.n, self.epsilon, buffers, [y], first + row)


def emit_row(
    lanes: int, n: int, epsilon: float, buffers: dict, terms: list[tirx.Buffer], row: Expr
) -> None:
    """Emit mean, centred variance and the normalised row.

    Buffers by name are out, [gamma], [beta] and [sum], where the sum of ``terms`` is kept; the
    only term may be ``out`` itself.
    """
    out = buffers["out"]
    total = buffers.get("sum", out if len(terms) > 1 else terms[0])
    mean, factor = _scalar(), _scalar()

    def add_terms(first: Expr | int, lanes: int) -> Expr:
        if total is terms[0]:
            return total[row, _ramp(first, lanes)]
        value = terms[0][row, _ramp(first, lanes)]
        for term in terms[1:]:
            value = value + term[row, _ramp(first, lanes)]
        T.buffer_store(total, value, [row, _ramp(first, lanes)])
        return total[row, _ramp(first, lanes)]

    def centred(first: Expr | int, lanes: int) -> Expr:
        return total[row, _ramp(first, lanes)] - _spread(mean[0], lanes)

    def normalise(first: Expr | int, lanes: int) -> None:
        value = centred(first, lanes) * _spread(factor[0], lanes)
        if "gamma" in buffers:
            value = value * buffers["gamma"][_ramp(first, lanes)]
        if "beta" in buffers:
            value = value + buffers["beta"][_ramp(first, lanes)]
        T.buffer_store(out, value, [row, _ramp(first, lanes)])

    T.buffer_store(mean, emit_sum(lanes, n, add_terms, squared=False) / T.float32(n), [0])
    variance = emit_sum(lanes, n, centred, squared=True) / T.float32(n)
    T.buffer_store(factor, T.float32(1) / T.sqrt(variance + T.float32(epsilon)), [0])
    with T.serial(T.int64(0), T.int64(n // lanes)) as i:
        normalise(i * lanes, lanes)
    for first, width in _tail(n, lanes):
        normalise(first, width)


def emit_sum(lanes: int, n: int, term: Term, *, squared: bool) -> Expr:
    """Emit the sum of ``term`` (or of its square) over ``n`` columns and return it."""
    parts = PARTIAL_SUMS
    groups, single = divmod(n // lanes, parts)
    sums = [_vector(lanes) for _ in range(min(parts, n // lanes))]
    for vector in sums:
        T.buffer_store(vector, _spread(T.float32(0), lanes), [_ramp(0, lanes)])

    def add(part: int, first: Expr | int) -> None:
        value, before = term(first, lanes), sums[part][_ramp(0, lanes)]
        after = vector_math.fma(value, value, before) if squared else before + value
        T.buffer_store(sums[part], after, [_ramp(0, lanes)])

    if groups:
        with T.serial(T.int64(0), T.int64(groups)) as i:
            for part in range(parts):
                add(part, (i * parts + part) * lanes)
    for part in range(single):
        add(part, (groups * parts + part) * lanes)
    result = _scalar()
    T.buffer_store(result, T.float32(0), [0])
    if sums:
        for vector in sums[1:]:
            both = sums[0][_ramp(0, lanes)] + vector[_ramp(0, lanes)]
            T.buffer_store(sums[0], both, [_ramp(0, lanes)])
        T.buffer_store(result, _across(sums[0], lanes), [0])
    for first, width in _tail(n, lanes):
        rest = _vector(width)
        value = term(first, width)
        T.buffer_store(rest, value * value if squared else value, [_ramp(0, width)])
        T.buffer_store(result, result[0] + _across(rest, width), [0])
    return result[0]


def _across(vector: tirx.Buffer, lanes: int) -> Expr:
    """Emit the sum over the lanes of a vector, halving it, and return it."""
    while lanes > 1:
        whole, lanes = vector[_ramp(0, lanes)], lanes // 2
        halves = [tirx.Shuffle([whole], list(range(i, i + lanes))) for i in (0, lanes)]
        vector = _vector(lanes)
        T.buffer_store(vector, halves[0] + halves[1], [_ramp(0, lanes)])
    return vector[0]


def _tail(n: int, lanes: int) -> list[tuple[int, int]]:
    """Return the columns after the last whole vector as (first, lanes) pieces of 8, 4 and 1."""
    pieces, first = [], n // lanes * lanes
    for size in (s for s in (8, 4, 1) if s < lanes):
        while n - first >= size:
            pieces.append((first, size))
            first += size
    return pieces


def _vector(lanes: int) -> tirx.Buffer:
    """Return a vector that LLVM keeps in a register."""
    return T.alloc_buffer((lanes,), "float32", scope="global")


def _scalar() -> tirx.Buffer:
    return _vector(1)


def _ramp(first: Expr | int, lanes: int) -> Expr | int:
    return first if lanes == 1 else T.ramp(first, 1, lanes)


def _spread(value: Expr, lanes: int) -> Expr:
    return value if lanes == 1 else T.broadcast(value, lanes)
