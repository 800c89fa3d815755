"""LayerNorm over rows on x86, with residual additions fused in."""

from collections.abc import Callable

from tvm.script.ir_builder import tirx as T
from tvm.tirx import PrimFunc

from tvmstruct.schedules import builder
from tvmstruct.schedules.compute.layer_norm import emit_row
from tvmstruct.schedules.registry import KERNEL
from tvmstruct.targets import Isa

PARALLEL_ELEMENTS = 32_768  # below, waking a second thread costs more than it saves


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
                emit_row(isa.lanes, n, epsilon, buffers, [buffers[t] for t in terms], row)

        with T.If(rows * n < PARALLEL_ELEMENTS):
            with T.Then():
                loop(T.serial)
            with T.Else():
                loop(T.parallel)

    func = builder.prim_func(body).with_attr("global_symbol", "layer_norm")
    return func.with_attr("tirx.is_scheduled", True).with_attr(KERNEL, "layer_norm")
