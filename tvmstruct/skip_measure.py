"""Which weights the attentions of a model skip on given inputs: their arguments, on the way."""

from __future__ import annotations

from collections import defaultdict, deque
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from tvmstruct import ops
from tvmstruct.arrays import to_numpy
from tvmstruct.errors import InputError
from tvmstruct.layers import Attention, Layer, MinimalAttention
from tvmstruct.model import Bucket, Runner
from tvmstruct.skip_analysis import SkipStatistics, analyse
from tvmstruct.skipping import Skip

if TYPE_CHECKING:
    from tvmstruct.compiler import Compiler

RUN = 0  # what an instrument answers to let the call go on


def compiler_that_skips(compiler: Compiler | None) -> tuple[Compiler, Skip]:
    """Return a model's compiler and what it skips; InputError where that is nothing."""
    if compiler is None:
        raise InputError("a loaded model does not know its attention; measure_skip() before save()")
    if compiler.session.skip is None:
        raise InputError("this model skips nothing; compile(..., skip=8), then measure_skip()")
    return compiler, compiler.session.skip


def measure_bucket(
    bucket: Bucket, arrays: Sequence[np.ndarray], compiler: Compiler, skip: Skip, threads: int
) -> dict[str, SkipStatistics]:
    """Run a bucket on arrays of its shapes and analyse each attention before its kernel runs.

    Arguments are not copied: memory is that of one head, and where the kernel makes queries, keys
    and values, of all of those. Later layers see what earlier ones made
    with skipping. Names are those in the report. Raises InputError where no attention is fused.
    """
    waiting: defaultdict[str, deque[tuple[str, Attention | MinimalAttention]]] = defaultdict(deque)
    found: dict[str, SkipStatistics] = {}
    for name, symbol, node in _attentions(bucket):
        waiting[symbol].append((name, node))  # equal attentions share a kernel: in order
    if not waiting:
        raise InputError("no attention of this model is a kernel that skips; report() says why")

    def look(symbol: str, args: Sequence[Any]) -> None:
        if symbol in waiting:
            name, node = waiting[symbol].popleft()
            arrays = [to_numpy(a) for a in args]
            makes_values = isinstance(node, MinimalAttention)
            if makes_values:
                arrays, node = made_operands(node, arrays), node.attention
            q, k, v, mask = operands(node, arrays)
            kernels = compiler.session.kernels
            chunk, tile, group = kernels.skip_grain(node, makes_values=makes_values)
            found[name] = analyse(
                q, k, v, scale=node.scale, mask=mask, causal=node.causal, skip=skip, chunk=chunk,
                tile=tile, group=group, threads=threads, makes_values=makes_values,
            )  # fmt: skip

    _run_watched(bucket, arrays, look)
    return found


def made_operands(node: MinimalAttention, args: Sequence[np.ndarray]) -> list[np.ndarray]:
    """Return the rows of q, k and v that a kernel makes of its arguments, and its mask if any.

    Arguments are the inputs of the three layers, their packed weights and biases, then the mask.
    """
    rows = [_multiplied(layer, x) for layer, x in zip(node.sources, args, strict=False)]
    before = 3 + sum(1 + (layer.bias is not None) for layer in node.sources)
    return rows if node.attention.mask == "none" else [*rows, args[before]]


def _multiplied(layer: Layer, x: np.ndarray) -> np.ndarray:
    assert isinstance(layer.op, ops.Dense)
    y = x @ layer.op.w.astype(np.float32, copy=False)
    return y if layer.bias is None else y + np.asarray(layer.bias, np.float32)


def operands(
    node: Attention, args: Sequence[np.ndarray]
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray | None]:
    """Return q, k and v of (q, k, v[, mask], out) row buffers as (batch, heads, length, dim) views.

    k and v have the heads they are stored with; the mask broadcasts to (batch, heads, queries,
    keys).
    """
    kv_heads, width = node.kv_heads or node.heads, node.value_dim or node.head_dim
    q = _by_head(args[0], node.q_layout, node.query_length, (node.heads, node.head_dim))
    k = _by_head(args[1], node.k_layout, node.key_length, (kv_heads, node.head_dim))
    v = _by_head(args[2], node.v_layout, node.key_length, (kv_heads, width))
    if node.mask == "none":
        return q, k, v, None
    return q, k, v, args[3][:, None, None] if node.mask == "keys" else args[3]


def _by_head(
    rows: np.ndarray, layout: tuple[int, int], length: int, heads: tuple[int, int]
) -> np.ndarray:
    """Cut (batch * length, width) rows into (batch, heads, length, dim)."""
    count, dim = heads
    columns = rows[:, layout[1] : layout[1] + count * dim]
    return columns.reshape(-1, length, count, dim).transpose(0, 2, 1, 3)


def _attentions(bucket: Bucket) -> Iterator[tuple[str, str, Attention | MinimalAttention]]:
    """Yield name in the report, symbol and node of each attention that is a kernel of its own."""
    assert bucket.lowered is not None
    number = 0
    for call in bucket.lowered.calls:
        if isinstance(call.node, Attention | MinimalAttention):
            yield f"attention.{number}", call.symbol, call.node
            number += 1


def _run_watched(
    bucket: Bucket, arrays: Sequence[np.ndarray], look: Callable[[str, Sequence[Any]], None]
) -> None:
    """Run a bucket once; ``look`` sees symbol and arguments of every call before it is made."""
    failed: list[Exception] = []

    def instrument(func: Any, symbol: str, before: bool, returned: Any, *args: Any) -> int:
        if before and not failed:
            try:
                look(symbol, args)
            except Exception as error:  # the virtual machine would make an error of its own of it
                failed.append(error)
        return RUN

    runner = Runner(bucket.executable, bucket.shapes, bucket.dtypes)
    runner.machine.set_instrument(instrument)
    runner.main(*(runner.tensor(i, a)[0] for i, a in enumerate(arrays)), *bucket.weights)
    if failed:
        raise failed[0]
