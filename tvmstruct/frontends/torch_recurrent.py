"""``nn.LSTM``, ``nn.GRU`` and ``nn.RNN`` of exported programs as recurrent layers.

torch.export keeps each as one operator; decomposed it would be a graph as long as the sequence.
PyTorch's gates are in our order already, as rows of (out, in) matrices; tensors hold them as
(in, out) under their state-dict names.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import tvm
from tvm import relax

from tvmstruct import compat
from tvmstruct.errors import UnsupportedOperatorError
from tvmstruct.frontends.recurrent import emit_recurrent
from tvmstruct.frontends.source import new_tensor, tensor_view
from tvmstruct.frontends.validate import SMALL
from tvmstruct.ops import Dense
from tvmstruct.recurrent import Activation, Cell, Recurrent

R = relax.op
KINDS = {"lstm": "lstm", "gru": "gru", "rnn_tanh": "rnn", "rnn_relu": "rnn"}
PARTS = ("input.weight", "hidden.weight", "input.bias", "hidden.bias")  # as PyTorch lists them
PROJECTED = "projection.weight"  # the last one, where there is one
FLOATS = ("float32", "float16", "bfloat16")
Convert = Callable[[Any, Any], Any]  # node and TVM's importer to its results


def decompose(torch: Any, program: Any) -> Any:
    """Return the program in core operators and recurrent layers."""
    table = torch.export.default_decompositions()
    for name in KINDS:
        packet = getattr(torch.ops.aten, name)
        for operator in (packet.input, packet.data):
            if operator in table:
                del table[operator]
    return program.run_decompositions(table)


class RecurrentLayers:
    """Converts the recurrent operators of the programs of one model; all share their tensors."""

    def __init__(
        self, read: Callable[[Any], np.ndarray], tensors: dict[str, tvm.runtime.Tensor]
    ) -> None:
        self.read, self.tensors = read, tensors
        self.taken: set[str] = set()  # parameters that nothing but these layers reads
        self.names: dict[tuple[str, str], str] = {}

    def converters(self, program: Any) -> dict[str, Convert]:
        """Return what TVM's importer is to call for each recurrent operator of a program."""
        signature = program.graph_signature
        names = {**signature.inputs_to_parameters, **signature.inputs_to_buffers}
        values = {k: program.state_dict[n] for k, n in names.items() if n in program.state_dict}
        made: dict[str, Convert] = {}
        for name, kind in KINDS.items():

            def convert(node: Any, importer: Any, name: str = name, kind: str = kind) -> Any:
                return self._convert(node, importer, name, kind, names, values)

            made[f"{name}.input"], made[f"{name}.data"] = convert, _refuse_packed
        for node in program.graph.nodes:
            if node.op == "placeholder" and node.name in names and node.users:
                if all(_is_recurrent(user) for user in node.users):
                    self.taken.add(names[node.name])
        return made

    def drop_sources(self) -> None:
        """Drop tensors of parameters that only made others: theirs in another layout, sums."""
        for name in self.taken - set(self.names.values()):
            self.tensors.pop(name, None)

    def _convert(
        self, node: Any, importer: Any, name: str, kind: str, names: Any, values: Any
    ) -> tuple[relax.Expr, ...]:
        """Return y and the last h (and c) of all layers, as PyTorch shapes them."""
        x, hx, params, biases, count, dropout, train, both, batch_first = node.args
        _check(node, params, biases, count * (1 + both), dropout and train)
        per = len(params) // (count * (1 + both))
        sides = [
            self._side(
                node, kind, name, params[i * per : (i + 1) * per], both and i % 2, names, values
            )
            for i in range(count * (1 + both))
        ]
        emit = importer.block_builder.emit
        x = importer.env[x]
        dtype = compat.dtype_of(x)
        if dtype not in FLOATS:
            raise UnsupportedOperatorError(
                f"{node.name} ({node.target}): it computes in {dtype}; recurrent layers compute in "
                "float32, convert the module with .float()"
            )
        states = [
            None if _is_zero(h) else importer.env[h] for h in (hx if kind == "lstm" else [hx])
        ]
        if dtype != "float32":
            x = emit(R.astype(x, "float32"))
            states = [None if s is None else emit(R.astype(s, "float32")) for s in states]
        if batch_first:
            x = emit(R.permute_dims(x, (1, 0, 2)))
        y, last = self._stack(importer.block_builder, x, sides, states, 1 + both)
        if batch_first:
            y = emit(R.permute_dims(y, (1, 0, 2)))
        results = (y, *last)
        return results if dtype == "float32" else tuple(emit(R.astype(r, dtype)) for r in results)

    def _stack(
        self,
        bb: relax.BlockBuilder,
        x: relax.Expr,
        sides: Sequence[tuple[Recurrent, dict[str, str]]],
        states: Sequence[relax.Expr | None],
        d: int,
    ) -> tuple[relax.Expr, list[relax.Expr]]:
        """Return y (s, b, d h) of layers one after the other, and the last states (l d, b, h)."""
        ends: list[list[relax.Expr]] = []
        for first in range(0, len(sides), d):
            layer = sides[first : first + d]

            def constant(array: np.ndarray, part: str, side: int, layer: Any = layer) -> relax.Expr:
                tensor = self.tensors.get(layer[side][1].get(part, ""))
                return relax.const(array) if tensor is None else relax.const(tensor)

            own = [
                s if s is None or len(sides) == d
                else bb.emit(R.strided_slice(s, [0], [first], [first + d]))
                for s in states
            ]  # fmt: skip
            h, c = [*own, None][:2]
            x, *last = emit_recurrent(bb, x, [r for r, _ in layer], h, c, None, constant)
            ends.append([s for s in last if s is not None])
        if len(ends) == 1:
            return x, ends[0]
        return x, [bb.emit(R.concat(list(parts), 0)) for parts in zip(*ends, strict=True)]

    def _side(
        self, node: Any, kind: str, name: str, params: Sequence[Any], reverse: bool,
        names: Any, values: Any,
    ) -> tuple[Recurrent, dict[str, str]]:  # fmt: skip
        """Return one direction of one layer, and the names of its tensors."""
        if missing := [str(p) for p in params if getattr(p, "name", None) not in values]:
            raise UnsupportedOperatorError(
                f"{node.name} ({node.target}): its weights {', '.join(missing)} are computed at "
                "run time; only parameters can be compiled"
            )
        parts = [*PARTS[: len(params) // 2 * 2], *[PROJECTED] * (len(params) % 2)]
        arrays = {
            part: np.asarray(self.read(values[p.name]), np.float32)
            for part, p in zip(parts, params, strict=True)
        }
        if kind != "gru" and "hidden.bias" in arrays:
            arrays["input.bias"] = arrays["input.bias"] + arrays.pop("hidden.bias")
        sources = {part: names[p.name] for part, p in zip(parts, params, strict=True)}
        held = {part: np.ascontiguousarray(array.T) for part, array in arrays.items()}
        found: dict[str, str] = {}
        for part, array in held.items():
            if array.size > SMALL:
                found[part] = self._tensor(sources[part], part, array)
                held[part] = tensor_view(self.tensors[found[part]])
        activations = (Activation("relu"),) if name == "rnn_relu" else ()
        layer = Recurrent(
            Cell(kind, activations, reverse=bool(reverse)),
            Dense(held["input.weight"]),
            Dense(held["hidden.weight"]),
            held.get("input.bias"),
            held.get("hidden.bias"),
            projection=Dense(held[PROJECTED]) if PROJECTED in held else None,
        )
        return layer, found

    def _tensor(self, name: str, part: str, array: np.ndarray) -> str:
        """Return the name of the tensor of a part of a layer, made on first use."""
        key = name, part
        if key not in self.names:
            own = name if name in self.taken else f"{name}.gates"
            self.names[key] = own
            self.tensors[own] = new_tensor(array)
        return self.names[key]


def _is_recurrent(node: Any) -> bool:
    return str(node.target).removeprefix("aten.").split(".")[0] in KINDS


def _is_zero(value: Any) -> bool:
    """Tell whether a state is the zeros that PyTorch makes where none is given."""
    return str(value.target) in ("aten.full.default", "aten.zeros.default") and (
        "zeros" in str(value.target) or value.args[1] == 0
    )


def _check(node: Any, params: Sequence[Any], biases: bool, sides: int, dropout: float) -> None:
    what = f"{node.name} ({node.target})"
    each = 4 if biases else 2
    if len(params) not in (sides * each, sides * (each + 1)):  # the last: with proj_size
        raise UnsupportedOperatorError(
            f"{what}: it has {len(params)} parameters for {sides} directions; want {each} or, with "
            f"a projection, {each + 1} for each"
        )
    if dropout:
        raise UnsupportedOperatorError(f"{what}: it drops out; export the module in eval() mode")


def _refuse_packed(node: Any, importer: Any) -> Any:
    raise UnsupportedOperatorError(
        f"{node.name} ({node.target}): packed sequences cannot be compiled; give padded ones"
    )
