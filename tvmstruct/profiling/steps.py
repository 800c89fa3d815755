"""The kernel calls of a compiled module: what each reads, how much it computes and moves."""

from __future__ import annotations

import math
from collections import defaultdict, deque
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import tvm
from tvm import relax
from tvm.s_tir.analysis import estimate_tir_flops

from tvmstruct import compat
from tvmstruct.layers import Embedding, HashTables, Layer, Node
from tvmstruct.schedules.registry import WORK

if TYPE_CHECKING:
    from tvmstruct.pipeline import Lowered

GATHERS = frozenset({"take", "gather", "embedding"})
SOFTMAX_FLOPS = 5  # of an element: maximum, difference, exponential, sum, quotient
SIZES = {"bfloat16": 2, "bool": 1}  # bytes of the dtypes that numpy has no or another size for


@dataclass(frozen=True)
class Moved:
    """One argument or result of a call: ``bytes`` of the ``size`` that it has are moved."""

    bytes: int
    size: int
    weight: bool = False


@dataclass(frozen=True)
class Step:
    """One kernel call: ``reads[i]`` is the step that made argument i, None for input or weight.

    ``flops`` and ``bytes`` are those of the call, ``moved`` says of which arguments; ``rows`` are
    those of its first output. ``node`` is None for a generic kernel, which stands for operators
    that no kernel of ours knows.
    """

    symbol: str
    node: Node | None
    reads: tuple[int | None, ...]
    outputs: int
    flops: float
    bytes: int
    moved: tuple[Moved, ...] = ()
    rows: int = 0

    @property
    def words(self) -> tuple[str, ...]:
        """Operators of a generic kernel as its name lists them: ``fused_matmul1_add`` has two."""
        parts = (part.rstrip("0123456789") for part in self.symbol.split("_"))
        return () if self.node is not None else tuple(p for p in parts if p != "fused")

    @property
    def label(self) -> str:
        """Name of the call for people: its layers or tables, or its symbol."""
        if isinstance(self.node, Layer | HashTables | Embedding):
            return " + ".join(filter(None, self.node.names))
        return self.symbol


def read_steps(lowered: Lowered) -> list[Step]:
    """Return the kernel calls of a lowered module in the order in which they run.

    FLOPs are two for each multiply-add of the kernel's ``tvmstruct.work`` in each row of its
    output (every element of a layer normalisation counts as one multiply-add), and counted in
    the code of a generic kernel. Bytes are those of the arguments and outputs, each tensor once;
    of a table that rows are gathered from, at most as many as the output has.
    """
    nodes: Mapping[str, deque[Node]] = defaultdict(deque)
    for call in lowered.calls:
        nodes[call.symbol].append(call.node)
    functions = {g.name_hint: f for g, f in lowered.mod.functions_items()}
    params = list(lowered.mod["main"].params)
    weights = set(params[len(params) - len(lowered.weights) :])
    steps: list[Step] = []
    made: dict[Any, int | None] = {}
    for var, value in _bindings(lowered.mod["main"]):
        symbol = _symbol(value)
        if symbol is None:
            made[var] = _alias(value, made)
            continue
        args = list(value.args[1].fields)
        node = nodes[symbol].popleft() if nodes[symbol] else None
        outputs = _tensors(compat.type_of(value))
        flops = (
            _kernel_flops(lowered, symbol, outputs[-1])
            if symbol in lowered.kernels
            else _generic_flops(functions[symbol], outputs)
        )
        made[var] = len(steps)
        reads = tuple(_alias(a, made) for a in args)
        written = sum(map(_size, outputs))
        moved = [
            Moved(size, sum(map(_size, _tensors(compat.type_of(arg)))), arg in weights)
            for arg, size in _read_sizes(symbol, args, written).items()
        ]
        moved.append(Moved(written, written))
        total = sum(m.bytes for m in moved)
        rows = outputs[0][0][0] if outputs[0][0] else 1
        steps.append(Step(symbol, node, reads, len(outputs), flops, total, tuple(moved), rows))
    return steps


def working_set(lowered: Lowered) -> int:
    """Return the bytes of the inputs and weights that one run reads, and the largest result."""
    main = lowered.mod["main"]
    read, largest = dict.fromkeys(main.params, 0), 0
    for _, value in _bindings(main):
        if (symbol := _symbol(value)) is not None:
            written = sum(map(_size, _tensors(compat.type_of(value))))
            largest = max(largest, written)
            for arg, size in _read_sizes(symbol, list(value.args[1].fields), written).items():
                if arg in read:
                    read[arg] = max(read[arg], size)
    return largest + sum(read.values())


def _bindings(main: relax.Function) -> Iterator[tuple[Any, Any]]:
    for block in main.body.blocks:
        for binding in block.bindings:
            yield binding.var, binding.value


def _symbol(value: Any) -> str | None:
    """Return the kernel that an expression calls, None where it calls none."""
    name = compat.op_name(value)
    if name == "relax.call_tir":
        return value.args[0].name_hint
    return value.args[0].global_symbol if name == compat.DPS else None


def _alias(value: Any, made: Mapping[Any, int | None]) -> int | None:
    """Return the step behind a variable or a part of a tuple."""
    if isinstance(value, relax.TupleGetItem):
        value = value.tuple_value
    return made.get(value) if isinstance(value, relax.Var) else None


def _tensors(kind: Any) -> list[tuple[tuple[int, ...], str]]:
    """Return (shape, dtype) of a tensor type, or of every field of a tuple type."""
    if hasattr(kind, "fields"):
        return [tensor for field in kind.fields for tensor in _tensors(field)]
    sizes = getattr(getattr(kind, "shape", None), "values", None) or ()
    return [(tuple(int(n) for n in sizes), str(getattr(kind, "dtype", "")))]


def _size(tensor: tuple[tuple[int, ...], str]) -> int:
    """Return the bytes of a tensor."""
    shape, dtype = tensor
    return math.prod(shape) * (SIZES.get(dtype) or np.dtype(dtype).itemsize)


def _read_sizes(symbol: str, args: list[Any], written: int) -> dict[Any, int]:
    """Return the bytes that a call reads of each argument, which may come more than once."""
    gather = not GATHERS.isdisjoint(symbol.split("_"))
    sizes = {arg: sum(map(_size, _tensors(compat.type_of(arg)))) for arg in args}
    return {arg: min(size, written) if gather else size for arg, size in sizes.items()}


def _kernel_flops(lowered: Lowered, symbol: str, output: tuple[tuple[int, ...], str]) -> float:
    return 2.0 * int(lowered.kernels[symbol].func.attrs[WORK]) * output[0][0]


def _generic_flops(func: tvm.tirx.PrimFunc, outputs: list[tuple[tuple[int, ...], str]]) -> float:
    try:
        return float(estimate_tir_flops(tvm.IRModule({"main": func})))
    except (ValueError, RuntimeError, tvm.error.InternalError):  # it knows no let, as softmax has
        return float(SOFTMAX_FLOPS * sum(math.prod(shape) for shape, _ in outputs))
