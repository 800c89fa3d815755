"""LayerNorm over rows on x86, with residual additions fused in.

Two passes, as ONNX Runtime does it: the mean first, then the variance of what is left, which
loses nothing where the mean is far from zero. The row is in the first-level cache by then.
"""

from collections.abc import Callable

from tvm import tirx
from tvm.ir import Expr
from tvm.script.ir_builder import tirx as T
from tvm.tirx import PrimFunc

from tvmstruct.schedules import builder, vector_math
from tvmstruct.schedules.registry import KERNEL
from tvmstruct.targets import Isa

PARALLEL_ELEMENTS = 32_768  # below, waking a second thread costs more than it saves
PARTIAL_SUMS = 4  # independent vector sums: an addition takes three to four cycles

Term = Callable[[Expr | int, int], Expr]  # (first column, lanes) -> what is summed there


def layer_norm(
    isa: Isa,
    *,
    n: int,
    epsilon: float,
    residuals: int = 0,
    scale: bool = True,
    bias: bool = True,
    keep_sum: bool = False,
) -> PrimFunc:
    """Return ``out = (s - mean(s)) / sqrt(var(s) + epsilon) * gamma + beta`` for rows of ``n``.

    The arguments are ``(x, residual_0, ..., [gamma], [beta], out, [sum])``, rows are symbolic,
    ``s`` is x plus all residuals, left to right; ``keep_sum`` writes it to ``sum``.
    """

    def body() -> None:
        rows = builder.symbol("rows")
        terms = ["x", *(f"residual_{i}" for i in range(residuals))]
        vectors = [name for name, used in (("gamma", scale), ("beta", bias)) if used]
        results = ["out", *(["sum"] if keep_sum else [])]
        buffers = {
            name: builder.argument(name, (n,) if name in vectors else (rows, n))
            for name in [*terms, *vectors, *results]
        }

        def loop(kind: Callable) -> None:
            with kind(T.int64(0), rows) as row:
                _emit_row(isa, n, epsilon, buffers, [buffers[t] for t in terms], row)

        with T.If(rows * n < PARALLEL_ELEMENTS):
            with T.Then():
                loop(T.serial)
            with T.Else():
                loop(T.parallel)

    func = builder.prim_func(body).with_attr("global_symbol", "layer_norm")
    return func.with_attr("tirx.is_scheduled", True).with_attr(KERNEL, "layer_norm")


def _emit_row(
    isa: Isa, n: int, epsilon: float, buffers: dict, terms: list[tirx.Buffer], row: Expr
) -> None:
    """Emit mean, centred variance and the normalised row."""
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

    T.buffer_store(mean, _emit_sum(isa, n, add_terms, squared=False) / T.float32(n), [0])
    variance = _emit_sum(isa, n, centred, squared=True) / T.float32(n)
    T.buffer_store(factor, T.float32(1) / T.sqrt(variance + T.float32(epsilon)), [0])
    with T.serial(T.int64(0), T.int64(n // isa.lanes)) as i:
        normalise(i * isa.lanes, isa.lanes)
    for first, lanes in _tail(n, isa.lanes):
        normalise(first, lanes)


def _emit_sum(isa: Isa, n: int, term: Term, *, squared: bool) -> Expr:
    """Emit the sum of ``term`` (or of its square) over ``n`` columns and return it."""
    lanes, parts = isa.lanes, PARTIAL_SUMS
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
