"""What a matrix product of int8 tiles computes, for accelerators with memories of their own.

``y[n, g, m] = clip((sum_k x[n, g, k] w[g, m, k]^T + bias[g, m]) >> shift[g, m])``, all operands
cut into tiles: x (batch, in) int8, w (out, in) int8, sums, bias and shift (batch, out) int32 and y
(batch, out) int8. Dense layers have one group g, block-diagonal ones several, which may share w.
The arguments x and y are strided, so that a permutation of whole tiles costs nothing.

Every step of the loops is an sblock of its own: ``load`` brings tiles into a local buffer,
``zero``, ``gemm`` and the ALU steps work there, ``store`` narrows to int8. Schedules tensorise
them; run as they are they compute the same on a CPU.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace

from tvm.script.ir_builder import tirx as T

from tvmstruct.schedules.builder import argument, block, i64, loops, prim_func

STEP = "tvmstruct.step"  # annotation of every sblock: its number among `Matmul.steps`
Axes = dict[str, tuple[int, object]]  # outer loop by dimension: its extent and variable


@dataclass(frozen=True)
class Tile:
    """Rows, outputs and inputs of the tiles."""

    batch: int
    out: int
    inp: int


@dataclass(frozen=True)
class TileEpilogue:
    """What happens to a sum: + bias, relu, right shifts (by numbers or by tiles), clip, int8.

    A bias is a tile for each output tile, or one number ``add`` for all.
    ``shifts`` are amounts one after the other; ``shift_tiles`` counts arguments that shift each
    channel by its own amount. ``low`` and ``high`` are None where nothing needs clipping.
    """

    bias: bool = False
    add: int = 0
    relu: bool = False
    shifts: tuple[int, ...] = ()
    shift_tiles: int = 0
    low: int | None = -128
    high: int | None = 127


@dataclass(frozen=True)
class TileShape:
    """Counts of tiles: rows n, groups g, outputs m and inputs k of a group."""

    n: int
    g: int
    m: int
    k: int
    shared: bool = False  # all groups have the same weights


@dataclass(frozen=True)
class TileNest:
    """How a product is cut: tiles of each dimension at a time, and places for each buffer.

    Sums are made for ``n x g x m`` tiles at a time, of ``columns`` outputs and ``k`` inputs in
    one step. ``rows_last`` goes over the rows in the innermost of the outer loops.
    """

    n: int
    g: int
    m: int
    columns: int
    k: int
    x_places: int = 2
    w_places: int = 2
    sums_places: int = 2
    rows_last: bool = False
    hoist: bool = True  # bias and shifts of all channels stay on chip

    def steps(self, shape: TileShape) -> int:
        """Return how many products of a few tiles it makes of a shape."""
        chunks = -(-shape.n // self.n) * (shape.g // self.g) * (shape.m // self.columns)
        return chunks * (shape.k // self.k)


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
                return {"from": (dims, self.dtype), "to": (dims, self.dtype)}
            case "store":
                return {"from": (dims, "int32"), "to": (dims, "int8")}
            case "alu" if self.operand:
                return {"operand": (dims.replace("n", ""), "int32"), **target}
            case _:
                return target

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
    reduced = {"k"} if step.kind == "gemm" else set()
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
                value = values[0]
        T.buffer_store(buffers[target], value, at[target])

    return emit


ALU: dict[str, Callable] = {
    "add": lambda a, b: a + b,
    "max": lambda a, b: T.max(a, b),
    "min": lambda a, b: T.min(a, b),
    "shr": lambda a, b: T.shift_right(a, b),
}


@dataclass(eq=False)
class Matmul:
    """A definition: the function, its steps, and the local buffers (name, tiles, places)."""

    shape: TileShape
    tile: Tile
    nest: TileNest
    epilogue: TileEpilogue
    x_strides: tuple[int, int, int]  # tiles between rows, groups and inputs
    y_strides: tuple[int, int, int]  # tiles between rows, groups and outputs

    def __post_init__(self) -> None:
        self.steps: list[Step] = []
        self.roles: list[dict[str, str]] = []  # of each step: buffers by role
        self.rows = self.height = min(self.nest.n, self.shape.n)
        self.base = 0
        self.func = prim_func(self._body)

    @property
    def arguments(self) -> tuple[str, ...]:
        """Names of the arguments of the function, in order."""
        extra = ["bias"] if self.epilogue.bias else []
        extra += [f"shift{i}" for i in range(self.epilogue.shift_tiles)]
        return ("x", "w", *extra, "y")

    def local(self) -> dict[str, tuple[int, int]]:
        """Return tiles and places of every local buffer, those of `arguments` but y, and sums."""
        nest, groups = self.nest, 1 if self.shape.shared else self.nest.g
        chunk = nest.g * nest.m
        found = {
            "x": (self.rows * nest.g * nest.k, nest.x_places),
            "w": (groups * nest.columns * nest.k, nest.w_places),
            "sums": (self.rows * chunk, nest.sums_places),
        }
        for name in self.operands:
            found[name] = (self.shape.g * self.shape.m, 1) if nest.hoist else (chunk, 2)
        return found

    @property
    def operands(self) -> tuple[str, ...]:
        """Names of the arguments that ALU steps read."""
        return self.arguments[2:-1]

    def _body(self) -> None:
        s, t, nest = self.shape, self.tile, self.nest
        groups = 1 if s.shared else s.g
        outs, inps = (t.batch, t.out), (t.batch, t.inp)

        def strides(tiles: tuple[int, ...], size: tuple[int, int]) -> list[int]:
            area = size[0] * size[1]
            return [*(step * area for step in tiles), size[1], 1]

        self.args: dict[str, object] = {
            "x": argument(
                "x", (s.n, s.g, s.k, *inps), "int8", strides=strides(self.x_strides, inps)
            ),
            "w": argument("w", (groups, s.m, s.k, t.out, t.inp), "int8"),
        }
        for name in self.operands:
            self.args[name] = argument(name, (s.g, s.m, *outs), "int32")
        self.args["y"] = argument(
            "y", (s.n, s.g, s.m, *outs), "int8", strides=strides(self.y_strides, outs)
        )
        whole, rest = divmod(s.n, self.rows)
        shapes = {
            "x": ((nest.g, nest.k, *inps), "int8"),
            "w": ((1 if s.shared else nest.g, nest.columns, nest.k, t.out, t.inp), "int8"),
            "sums": ((nest.g, nest.m, *outs), "int32"),
        }
        held = (s.g, s.m) if nest.hoist else (nest.g, nest.m)
        extra = {name: ((*held, *outs), "int32") for name in self.operands}
        self.here = {
            name: T.sblock_alloc_buffer(shape, dtype, scope="global")
            for name, (shape, dtype) in extra.items()
        }
        for name in self.operands if nest.hoist else ():
            self._load_operand(name, {}, held)
        for count, rows, base in ((whole, self.rows, 0), (int(rest > 0), rest, whole * self.rows)):
            if count:
                self.here |= {
                    name: T.sblock_alloc_buffer(
                        (rows, *shape) if name in ("x", "sums") else shape, dtype, scope="global"
                    )
                    for name, (shape, dtype) in shapes.items()
                }
                self._segment(count, rows, base)

    def _segment(self, count: int, rows: int, base: int) -> None:
        """Emit all steps for ``count`` times ``rows`` rows of tiles from ``base`` on."""
        s, nest = self.shape, self.nest
        self.base, self.height = base, rows
        extents = {"n": count, "g": s.g // nest.g, "m": s.m // nest.m}
        if nest.rows_last:
            extents = {name: extents[name] for name in "gmn"}
        with _named(extents) as outer:
            sums = (("n", rows), ("g", nest.g), ("m", nest.m))
            outs = (self.tile.batch, self.tile.out)
            self._emit(Step("zero", "zero", sums, outs), outer, to="sums")
            inner = {"c": nest.m // nest.columns, "k": s.k // nest.k}
            with _named(inner) as more:
                self._product(outer | more)
            self._finish(Step("alu", "", sums, outs), outer)
            self._emit(Step("store", "store", sums, outs), outer, to="y", **{"from": "sums"})

    def _product(self, outer: Axes) -> None:
        s, t, nest = self.shape, self.tile, self.nest
        n, g = ("n", self.height), ("g", nest.g)
        m, k = ("m", nest.columns), ("k", nest.k)
        x = Step("load", "load_x", (n, g, k), (t.batch, t.inp), "int8")
        self._emit(x, _only(outer, "ngk"), to="x", **{"from": "x"})
        weights = (m, k) if s.shared else (g, m, k)
        w = Step("load", "load_w", weights, (t.out, t.inp), "int8")
        self._emit(w, _only(outer, "mck" if s.shared else "gmck"), to="w", **{"from": "w"})
        tiles, elements = (k, n, g, m), (t.out, t.inp, t.batch)
        self._emit(Step("gemm", "gemm", tiles, elements, shared=s.shared), outer)

    def _finish(self, step: Step, outer: Axes) -> None:
        """Emit what happens to the sums before they are stored."""
        e = self.epilogue
        if e.bias:
            self._with_tiles("add", "bias", step, outer)
        if e.add:
            self._emit(replace(step, name="add", immediate=e.add), outer, to="sums")
        if e.relu:
            self._emit(replace(step, name="max"), outer, to="sums")
        for i in range(e.shift_tiles):
            self._with_tiles("shr", f"shift{i}", step, outer)
        for amount in e.shifts:
            self._emit(replace(step, name="shr", immediate=amount), outer, to="sums")
        if e.high is not None:
            self._emit(replace(step, name="min", immediate=e.high), outer, to="sums")
        if e.low is not None and not (e.relu and e.low <= 0):
            self._emit(replace(step, name="max", immediate=e.low), outer, to="sums")

    def _with_tiles(self, op: str, name: str, step: Step, outer: Axes) -> None:
        if not self.nest.hoist:
            self._load_operand(name, _only(outer, "gm"), (self.nest.g, self.nest.m))
        self._emit(replace(step, name=f"{op}_{name}", operand=name), outer, to="sums", operand=name)

    def _load_operand(self, name: str, outer: Axes, extents: tuple[int, int]) -> None:
        tiles = tuple(zip("gm", extents, strict=True))
        load = Step("load", f"load_{name}", tiles, (self.tile.batch, self.tile.out))
        self._emit(load, outer, to=name, **{"from": name})

    def _emit(self, step: Step, outer: Axes, **roles: str) -> None:
        """Emit a step between local buffers and arguments that ``roles`` name."""
        local = dict(roles)
        if step.kind == "gemm":
            local = {role: role for role in step.operands}
        elsewhere = {"load": "from", "store": "to"}.get(step.kind)
        buffers = {
            role: (self.args if role == elsewhere else self.here)[name]
            for role, name in local.items()
        }

        def places(role: str, index: dict) -> list:
            kept = self.nest.hoist and local[role] in self.operands
            return self._place(local[role], index, whole=kept or role == elsewhere, step=step)

        self.steps.append(step)
        self.roles.append(local)
        with step_block(step, outer, len(self.steps) - 1) as opened:
            emit_step(step, buffers, places)(opened)

    def _place(self, name: str, index: dict, *, whole: bool, step: Step) -> list:
        """Return the index of a tile in an argument (``whole``) or in a local buffer."""
        nest = self.nest
        dims = {"x": "ngk", "w": "gmk", "y": "ngm", "sums": "ngm"}.get(name, "gm")
        chunk = {"n": self.height, "g": nest.g, "m": nest.m, "k": nest.k}
        found = []
        for dim in dims:
            outer, inner = index[dim]
            if dim == "g" and name == "w" and self.shape.shared:
                found.append(i64(0))
                continue
            value = inner
            if dim == "m" and ((name == "w" and whole) or (name == "sums" and step.kind == "gemm")):
                value = index["c"][0] * nest.columns + inner
            if whole:
                value = outer * chunk[dim] + value
                value = value + self.base if dim == "n" else value
            found.append(value)
        return found


def _only(outer: Axes, names: str) -> Axes:
    return {name: outer[name] for name in names}


@contextmanager
def _named(extents: Mapping[str, int]) -> Iterator[Axes]:
    """Open a loop for every extent over one; yields extents and variables by name."""
    wanted = {name: extent for name, extent in extents.items() if extent > 1}
    with loops(*wanted.values()) as variables:
        opened = dict(zip(wanted, variables, strict=True))
        yield {name: (extent, opened.get(name, i64(0))) for name, extent in extents.items()}
