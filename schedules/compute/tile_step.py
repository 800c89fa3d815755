"""One step of a product of tiles: an sblock that a schedule tensorises as a whole."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

from tvm.script.ir_builder import tirx as T

from tvmstruct.schedules.builder import block, i64, loops

STEP = "tvmstruct.step"  # annotation of every sblock: its number among `Matmul.steps`
Axes = dict[str, tuple[int, object]]  # outer loop by dimension: its extent and variable


@dataclass(frozen=True)
class Step:
    """One tensorisable step: what it does, over how many tiles of each dimension."""

    kind: str  # load, zero, gemm, alu or store
    name: str
    tiles: tuple[tuple[str, int], ...]  # extents of n, g, m, k as far as the step has them
    elements: tuple[int, ...]  # of a tile; out, in and batch for gemm
    dtype: str = "int32"  # of what it moves
    operand: str = ""  # of alu: a buffer, or
    immediate: int = 0
    shared: bool = False  # of gemm: w has no groups
    widen: bool = False  # of load: int8 becomes int32
    dims: tuple[tuple[str, str], ...] = ()  # of alu: those of its operands, where not the usual

    @property
    def operands(self) -> dict[str, tuple[str, str]]:
        """Its buffers by role, the target last: their dimensions and type."""
        dims = "".join(name for name, _ in self.tiles)
        target = {"to": (dims, "int32")}
        match self.kind:
            case "gemm":
                w = "mk" if self.shared else "gmk"
                return {"x": ("ngk", "int8"), "w": (w, "int8"), "sums": ("ngm", "int32")}
            case "load":
                return {
                    "from": (dims, self.dtype),
                    "to": (dims, "int32" if self.widen else self.dtype),
                }
            case "store":
                return {"from": (dims, "int32"), "to": (dims, "int8")}
            case "alu" if self.dims:
                return {role: (each, "int32") for role, each in self.dims}
            case "alu" if self.operand:
                return {"operand": (dims.replace("n", ""), "int32"), **target}
            case _:
                return target

    @property
    def reduced(self) -> set[str]:
        """The dimensions that its target lacks: it adds up over them."""
        *_, target = self.operands.values()
        return {name for name, _ in self.tiles if name not in target[0]}

    def inside(self, role: str) -> tuple[int, ...]:
        """Return which of `elements` index a tile of an operand."""
        of_gemm = {"x": (2, 1), "w": (0, 1), "sums": (2, 0)}
        return of_gemm[role] if self.kind == "gemm" else tuple(range(len(self.elements)))


Emit = Callable[[Sequence[object]], None]


@contextmanager
def step_block(step: Step, outer: Axes, number: int | None = None) -> Iterator[tuple[dict, list]]:
    """Open the loops and the sblock of a step; yields indices by dimension and in the tile.

    An index is (outer, inner). A loop of extent one would be simplified away while scheduling,
    so it is left out.
    """
    inner = [(name, extent) for name, extent in step.tiles if extent > 1]
    elements = [(i, extent) for i, extent in enumerate(step.elements) if extent > 1]
    reduced = step.reduced
    with loops(*(e for _, e in inner), *(e for _, e in elements)) as variables:
        axes: list[tuple[object, int, object, bool]] = []
        for name, (extent, variable) in outer.items():
            if extent > 1:
                axes.append((("outer", name), extent, variable, name in reduced))
        for (name, extent), variable in zip(inner, variables, strict=False):
            axes.append((("inner", name), extent, variable, name in reduced))
        for (i, extent), variable in zip(elements, variables[len(inner) :], strict=True):
            axes.append((i, extent, variable, step.kind == "gemm" and i == 1))
        spatial = [(key, e, v) for key, e, v, reduce in axes if not reduce]
        reduction = [(key, e, v) for key, e, v, reduce in axes if reduce]
        notes = {} if number is None else {"step": number}
        with block(
            step.name, [a[1:] for a in spatial], [a[1:] for a in reduction], **notes
        ) as bound:
            keys = [a[0] for a in spatial] + [a[0] for a in reduction]
            at = dict(zip(keys, bound, strict=True))
            index = {
                name: (at.get(("outer", name), i64(0)), at.get(("inner", name), i64(0)))
                for name in "ngmkc"
            }
            yield index, [at.get(i, i64(0)) for i in range(len(step.elements))]


def emit_step(step: Step, buffers: Mapping[str, object], places: Callable) -> Emit:
    """Return the code of a step; ``places(name, index)`` says where its tile is in a buffer."""

    def emit(opened: Sequence) -> None:
        index, element = opened
        at = {
            role: [*places(role, index), *(element[i] for i in step.inside(role))]
            for role in step.operands
        }
        *sources, target = step.operands
        values = [buffers[role][tuple(at[role])] for role in sources]
        old = buffers[target][tuple(at[target])]
        match step.kind:
            case "gemm":
                x, w = values
                value = old + T.cast(x, "int32") * T.cast(w, "int32")
            case "zero":
                value = T.int32(0)
            case "alu":
                other = values[0] if values else T.int32(step.immediate)
                value = ALU[step.name.split("_")[0]](old, other)
            case "store":
                value = T.cast(values[0], "int8")
            case _:
                value = T.cast(values[0], "int32") if step.widen else values[0]
        T.buffer_store(buffers[target], value, at[target])

    return emit


ALU: dict[str, Callable] = {
    "add": lambda a, b: a + b,
    "max": lambda a, b: T.max(a, b),
    "min": lambda a, b: T.min(a, b),
    "mul": lambda a, b: a * b,
    "shr": lambda a, b: T.shift_right(a, b),
}
