"""What a matrix product of int8 tiles computes, for accelerators with memories of their own.

``y[n, g, m] = clip((sum_k x[n, g, k] w[g, m, k]^T + bias[g, m]) >> shift[g, m])``, all operands
cut into tiles: x (batch, in) int8, w (out, in) int8, sums, bias and shift (batch, out) int32 and y
(batch, out) int8. Dense layers have one group g, block-diagonal ones several, which may share w.

Every step of the loops is an sblock of its own: ``load`` brings tiles into a local buffer,
``zero``, ``gemm`` and the ALU steps work there, ``store`` narrows to int8. Schedules tensorise
them; run as they are they compute the same on a CPU.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace

from tvm.script.ir_builder import tirx as T

from tvmstruct.schedules.builder import argument, i64, loops, prim_func
from tvmstruct.schedules.compute.tile_step import Axes, Step, emit_step, step_block


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

    @property
    def operands(self) -> tuple[str, ...]:
        """Names of the arguments that ALU steps read."""
        bias = ("bias",) if self.bias else ()
        return (*bias, *(f"shift{i}" for i in range(self.shift_tiles)))


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


@dataclass(eq=False)
class Matmul:
    """A definition: the function, its steps, and the local buffers (name, tiles, places)."""

    shape: TileShape
    tile: Tile
    nest: TileNest
    epilogue: TileEpilogue

    widens = False  # whether x and w become int32 as they are loaded

    def __post_init__(self) -> None:
        self.steps: list[Step] = []
        self.roles: list[dict[str, str]] = []  # of each step: buffers by role
        self.rows = self.height = min(self.nest.n, self.shape.n)
        self.base = 0
        self.func = prim_func(self._body)

    @property
    def arguments(self) -> tuple[str, ...]:
        """Names of the arguments of the function, in order."""
        return ("x", "w", *self.operands, "y")

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
        return self.epilogue.operands

    @property
    def _weights(self) -> tuple[int, int]:
        """The shape of a tile of w."""
        return self.tile.out, self.tile.inp

    def _body(self) -> None:
        s, t, nest = self.shape, self.tile, self.nest
        groups = 1 if s.shared else s.g
        outs, inps = (t.batch, t.out), (t.batch, t.inp)

        self.args: dict[str, object] = {
            "x": argument("x", (s.n, s.g, s.k, *inps), "int8"),
            "w": argument("w", (groups, s.m, s.k, *self._weights), "int8"),
        }
        for name in self.operands:
            self.args[name] = argument(name, (s.g, s.m, *outs), "int32")
        self.args["y"] = argument("y", (s.n, s.g, s.m, *outs), "int8")
        whole, rest = divmod(s.n, self.rows)
        dtype = "int32" if self.widens else "int8"
        shapes = {
            "x": ((nest.g, nest.k, *inps), dtype),
            "w": ((1 if s.shared else nest.g, nest.columns, nest.k, *self._weights), dtype),
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
                        (rows, *shape) if name in ("x", "sums") else shape, kind, scope="global"
                    )
                    for name, (shape, kind) in shapes.items()
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
            self.emit(Step("zero", "zero", sums, outs), outer, to="sums")
            inner = {"c": nest.m // nest.columns, "k": s.k // nest.k}
            with _named(inner) as more:
                self.product(outer | more)
            self._finish(Step("alu", "", sums, outs), outer)
            self.emit(Step("store", "store", sums, outs), outer, to="y", **{"from": "sums"})

    def product(self, outer: Axes) -> None:
        """Emit the loads of x and w and their product, added to the sums."""
        s, t, nest = self.shape, self.tile, self.nest
        n, g = ("n", self.height), ("g", nest.g)
        m, k = ("m", nest.columns), ("k", nest.k)
        weights = (m, k) if s.shared else (g, m, k)
        w = Step("load", "load_w", weights, (t.out, t.inp), "int8")
        self.emit(w, only(outer, "mck" if s.shared else "gmck"), to="w", **{"from": "w"})
        # After w, which is there already where x is the result of a product before.
        x = Step("load", "load_x", (n, g, k), (t.batch, t.inp), "int8")
        self.emit(x, only(outer, "ngk"), to="x", **{"from": "x"})
        tiles, elements = (k, n, g, m), (t.out, t.inp, t.batch)
        self.emit(Step("gemm", "gemm", tiles, elements, shared=s.shared), outer)

    def _finish(self, step: Step, outer: Axes) -> None:
        """Emit what happens to the sums before they are stored."""
        e = self.epilogue
        if e.bias:
            self._with_tiles("add", "bias", step, outer)
        if e.add:
            self.emit(replace(step, name="add", immediate=e.add), outer, to="sums")
        if e.relu:
            self.emit(replace(step, name="max"), outer, to="sums")
        for i in range(e.shift_tiles):
            self._with_tiles("shr", f"shift{i}", step, outer)
        for amount in e.shifts:
            self.emit(replace(step, name="shr", immediate=amount), outer, to="sums")
        if e.high is not None:
            self.emit(replace(step, name="min", immediate=e.high), outer, to="sums")
        if e.low is not None and not (e.relu and e.low <= 0):
            self.emit(replace(step, name="max", immediate=e.low), outer, to="sums")

    def _with_tiles(self, op: str, name: str, step: Step, outer: Axes) -> None:
        if not self.nest.hoist:
            self._load_operand(name, only(outer, "gm"), (self.nest.g, self.nest.m))
        self.emit(replace(step, name=f"{op}_{name}", operand=name), outer, to="sums", operand=name)

    def _load_operand(self, name: str, outer: Axes, extents: tuple[int, int]) -> None:
        tiles = tuple(zip("gm", extents, strict=True))
        load = Step("load", f"load_{name}", tiles, (self.tile.batch, self.tile.out))
        self.emit(load, outer, to=name, **{"from": name})

    def emit(self, step: Step, outer: Axes, **roles: str) -> None:
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


def only(outer: Axes, names: str) -> Axes:
    return {name: outer[name] for name in names}


@contextmanager
def _named(extents: Mapping[str, int]) -> Iterator[Axes]:
    """Open a loop for every extent over one; yields extents and variables by name."""
    wanted = {name: extent for name, extent in extents.items() if extent > 1}
    with loops(*wanted.values()) as variables:
        opened = dict(zip(wanted, variables, strict=True))
        yield {name: (extent, opened.get(name, i64(0))) for name, extent in extents.items()}
