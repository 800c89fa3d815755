"""From an operator expression to the few loops that run it: numpy only, no target but lanes.

``lower(op)`` walks an expression once and returns a `Program`: a list of stages over flat
feature buffers. Permutations, slices and paddings at the end of a buffer cost nothing: a
`Value` carries them as a strided view, and the next stage reads through it. What is left:

* `MatMul`: ``dst[g, q] = sum_p src[g, p] * w[g, p, q]``, vectorised over q or over g, reading
  through any view whose groups are one stride and whose p are at most two;
* `Round`: the features that a product reads, rounded to words of low precision (`rounding`);
* `Copy`: a strided copy, with an optional elementwise weight, where no view can serve;
* `Hadamard`: butterflies between vectors, in place where nothing else reads the features.

Constants are folded into weights first (`folding`).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import singledispatchmethod

import numpy as np

from tvmstruct import ops
from tvmstruct.folding import fold, hadamard
from tvmstruct.rounding import (
    BYTES,
    EACH,
    HALVES,
    MORE,
    TYPES,
    Round,
    Source,
    ordered,
    pays,
    words_of,
)

X, Y = 0, 1  # buffers of every program; scratch buffers follow
Dim = tuple[int, int]  # extent, stride
NEIGHBOURS = 16  # features side by side that one product transforms: a vector of the widest


@dataclass(frozen=True)
class MatMul:
    """``groups`` products of p by q; ``vector`` says which axis the lanes run along.

    Weights are packed ``[groups][q / (lanes tile)][p][lanes tile]`` for "column" (one group if
    ``shared``) and ``[groups / lanes][q / tile][p][tile][lanes]`` for "group" (without groups
    and lanes if ``shared``: one number serves all lanes). The ``form`` of a number is "float", or
    "pairs": then the tile is even, so that a word can hold two bfloat16, the entries of vectors
    2i and 2i + 1 of a tile. In the forms of `rounding` p counts words and a number is an entry for
    each neighbour in a word, innermost; strides of src are those of neighbours.
    """

    src: int
    dst: int
    groups: int
    depth: tuple[Dim, ...]  # extents and strides in src, whose product is p
    q: int  # padded to whole tiles
    src_offset: int
    src_group: int  # strides
    dst_offset: int
    dst_group: int
    dst_q: int
    weight: int
    shared: bool
    vector: str
    lanes: int
    tile: int
    accumulate: bool = False
    form: str = "float"
    scale: int | None = None  # buffer with the scales of the rows of src, in int8

    @property
    def words(self) -> int:
        """Steps of the depth."""
        return math.prod(extent for extent, _ in self.depth)

    @property
    def p(self) -> int:
        """Products in a sum, those with padding included."""
        return self.words * EACH.get(self.form, 1)

    @property
    def width(self) -> int:
        """Numbers of a panel for each step of the depth."""
        return self.tile * (1 if self.shared and self.vector == "group" else self.lanes)

    @property
    def macs(self) -> int:
        """Multiply-adds for one row, those with padding included."""
        return self.groups * self.p * self.q

    @property
    def steps(self) -> int:
        """The same in multiply-adds of float32 that take as long."""
        return self.groups * self.words * self.q


@dataclass(frozen=True)
class Copy:
    """``dst[i] (+)= src[i] * weight[i]`` over a nest of ``(extent, src stride)``, dst in order."""

    src: int
    dst: int
    dims: tuple[Dim, ...]
    src_offset: int
    dst_offset: int
    weight: int | None = None
    accumulate: bool = False


@dataclass(frozen=True)
class Hadamard:
    """``dst[.., i, ..] (+)= scale * sum_j H[i, j] src[.., j, ..]`` along an axis of ``n`` features.

    ``axis`` holds its strides in src and dst, ``loops`` extent and strides of the other axes;
    src may be overwritten where ``owned``.
    """

    src: int
    dst: int
    n: int
    axis: tuple[int, int]
    loops: tuple[tuple[int, int, int], ...]
    scale: float
    owned: bool
    src_offset: int = 0
    accumulate: bool = False

    @property
    def in_place(self) -> bool:
        """Whether the features stay where they are."""
        strides = (self.axis, *((src, dst) for _, src, dst in self.loops))
        return self.src == self.dst and all(src == dst for src, dst in strides)


@dataclass(frozen=True)
class Zero:
    """Clear ``dst`` from ``start`` to ``stop``."""

    dst: int
    start: int
    stop: int


Stage = MatMul | Round | Copy | Hadamard | Zero


@dataclass(frozen=True)
class Value:
    """Features as a strided view: ``dims`` is a row-major nest of ``(extent, stride)``."""

    buffer: int
    dims: tuple[Dim, ...]
    offset: int = 0

    @property
    def size(self) -> int:
        """Number of features."""
        return math.prod(extent for extent, _ in self.dims)

    @property
    def contiguous(self) -> bool:
        """Whether the features lie in order from the start of the buffer."""
        return self.offset == 0 and merge(self.dims) in ((), ((self.size, 1),))


@dataclass
class Program:
    """Stages, the number of features of every buffer, and the packed weights.

    ``types`` are those of the buffers that do not hold float32. The stages run once for each of
    ``parts`` with weights of its own, and the outputs lie side by side.
    """

    sizes: list[int]
    stages: list[Stage] = field(default_factory=list)
    weights: list[np.ndarray] = field(default_factory=list)
    types: dict[int, str] = field(default_factory=dict)
    parts: int = 1

    @property
    def n_out(self) -> int:
        """Outputs of all parts."""
        return self.sizes[Y] * self.parts

    @property
    def key(self) -> tuple[object, ...]:
        """Everything that the code depends on: equal keys, equal kernels."""
        sizes = tuple(w.size for w in self.weights)
        return (tuple(self.sizes), tuple(self.stages), sizes, *([self.parts] * (self.parts > 1)))

    @property
    def products(self) -> list[MatMul]:
        """The stages that multiply."""
        return [stage for stage in self.stages if isinstance(stage, MatMul)]

    def steps(self, macs: int) -> int:
        """Return how many multiply-adds in float32 take as long as ``macs`` of this program."""
        all_macs = sum(product.macs for product in self.products)
        return macs * sum(product.steps for product in self.products) // max(1, all_macs)

    def product(self, weight: int) -> MatMul | None:
        """Return the product that a weight belongs to, or None for a diagonal."""
        return next((stage for stage in self.products if stage.weight == weight), None)

    def type(self, weight: int) -> str:
        """Return the type of the stored elements of a weight."""
        stage = self.product(weight)
        return "float32" if stage is None or stage.form == "float" else "int32"

    def words(self, weight: int) -> int:
        """Return the number of stored elements of a weight, those of one part."""
        stage, size = self.product(weight), self.weights[weight].size // self.parts
        if stage is None or stage.form == "float":
            return size
        if stage.form == "pairs":
            return size // 2
        words = size // EACH[stage.form]
        return words // stage.words * (stage.words + MORE[stage.form])

    def stored(
        self, weight: int, pack: Callable[[np.ndarray, str, int, int], np.ndarray]
    ) -> np.ndarray:
        """Return a weight as kernels read it: ``pack(w, form, words, width)`` makes its words."""
        stage = self.product(weight)
        if stage is None or stage.form == "float":
            return self.weights[weight]
        each = stage.width // stage.tile
        width = each if stage.form == "pairs" else stage.width
        return pack(self.weights[weight], stage.form, stage.words, width)


def lower(op: ops.Op, lanes: int, dtype: str = "float32", *, form: str = "float") -> Program:
    """Return the program that computes ``x @ op`` with vectors of at most ``lanes``.

    Products that are worth it have the ``form``, of which `MatMul` tells; others stay "float".
    """
    lowering = _Lowering(Program([op.n_in, op.n_out]), lanes, np.dtype(dtype), form)
    value = lowering.visit(fold(op), Value(X, ((op.n_in, 1),)))
    lowering.store(value, Y, accumulate=False)
    return lowering.program


def merge(dims: tuple[Dim, ...]) -> tuple[Dim, ...]:
    """Join neighbours that are one run of memory and drop extents of one."""
    out: list[Dim] = []
    for extent, stride in dims:
        if extent == 1:
            continue
        if out and out[-1][1] == extent * stride:
            out[-1] = (out[-1][0] * extent, stride)
        else:
            out.append((extent, stride))
    return tuple(out)


def split(dims: tuple[Dim, ...], sizes: tuple[int, ...]) -> list[tuple[Dim, ...]] | None:
    """Cut a nest into consecutive nests of ``sizes`` features, or None where it cannot be."""
    rest = list(reversed(merge(dims)))  # outermost last, so that pop takes it
    parts = []
    for size in sizes:
        part: list[Dim] = []
        while size > 1:
            extent, stride = rest.pop()
            if size % extent == 0:
                part.append((extent, stride))
                size //= extent
            elif extent % size == 0:
                part.append((size, stride * (extent // size)))
                rest.append((extent // size, stride))
                size = 1
            else:
                return None
        parts.append(merge(tuple(part)))
    return parts


def _output_tiles(q: int, *, even: bool) -> list[tuple[int, int, int]]:
    """Cut q outputs into (first, outputs, tile): equal tiles where there are any, else a rest."""
    tile = next((t for t in ((4, 2) if even else (4, 3)) if q % t == 0), None)
    if tile is not None or q < 4:
        return [(0, q, tile or q)]
    whole = q // 4 * 4
    return [(0, whole, 4), (whole, q - whole, q - whole)]


def separable(a: MatMul, b: MatMul) -> bool:
    """Return whether each group of ``b`` reads only outputs of ``a`` that no other group reads.

    Then equal shares of the outputs of ``a`` and of the groups of ``b`` belong together.
    """
    if a.vector != "group" or a.dst != b.src or a.accumulate or a.dst_offset or b.src_offset:
        return False
    span = sum((extent - 1) * stride for extent, stride in b.depth) + 1
    each, rest = divmod(b.src_group, a.dst_q)
    return rest == 0 and each * b.groups == a.q and span <= b.src_group


class _Lowering:
    def __init__(self, program: Program, lanes: int, dtype: np.dtype, form: str) -> None:
        self.program, self.lanes, self.dtype, self.form = program, lanes, dtype, form
        self.shared = [X, Y]  # buffers that more than one term of a sum reads
        self.rounded: dict[Source, Round] = {}  # features of x

    def new_buffer(self, size: int, dtype: str | None = None) -> int:
        self.program.sizes.append(size)
        number = len(self.program.sizes) - 1
        if dtype is not None:
            self.program.types[number] = dtype
        return number

    def add_weight(self, array: np.ndarray) -> int:
        self.program.weights.append(np.ascontiguousarray(array, self.dtype).reshape(-1))
        return len(self.program.weights) - 1

    def emit(self, stage: Stage) -> None:
        self.program.stages.append(stage)

    def materialise(self, value: Value) -> Value:
        """Copy a view into a buffer of its own, in order."""
        dst = self.new_buffer(value.size)
        self.emit(Copy(value.buffer, dst, merge(value.dims), value.offset, 0))
        return Value(dst, ((value.size, 1),))

    def store(self, value: Value, dst: int, *, accumulate: bool, keep: int = X) -> None:
        """Bring a value into ``dst``; its buffer, unless ``keep``, becomes ``dst`` where it can."""
        own = value.buffer > Y and value.buffer != keep and value.contiguous
        whole = own and self.program.sizes[value.buffer] == value.size
        writers = [i for i, stage in enumerate(self.program.stages) if stage.dst == value.buffer]
        if whole and not accumulate:
            self._rename(value.buffer, dst)
        elif whole and len(writers) == 1 and isinstance(self.program.stages[writers[0]], MatMul):
            only = self.program.stages[writers[0]]
            self.program.stages[writers[0]] = replace(only, dst=dst, accumulate=True)
            self.program.sizes[value.buffer] = 0
        elif (stage := self._written_elsewhere(value, dst, accumulate=accumulate)) is not None:
            self.program.stages[-1] = stage
        else:
            dims = merge(value.dims)
            self.emit(Copy(value.buffer, dst, dims, value.offset, 0, accumulate=accumulate))

    def _written_elsewhere(self, value: Value, dst: int, *, accumulate: bool) -> Hadamard | None:
        """Return the transform that ends in ``value``, writing to ``dst`` instead, if it can."""
        last = self.program.stages[-1] if self.program.stages else None
        if not isinstance(last, Hadamard) or last.dst != value.buffer or value.offset:
            return None
        if value.size != last.n * math.prod(extent for extent, _, _ in last.loops):
            return None
        if not last.in_place:  # one pass only: the passes before the last would be in dst
            single = last.n == 1 and value.contiguous
            return replace(last, dst=dst, accumulate=accumulate) if single else None
        stride, span = last.axis[0], last.n * last.axis[0]
        loops, target, found = [], value.size, None
        for extent, step in merge(value.dims):
            target //= extent  # features of dst that a step along this dimension passes
            if step <= stride and span <= step * extent:
                if stride % step or step * extent % span:
                    return None
                inner = stride // step
                found = (stride, target * inner)
                loops += [(extent * step // span, span, target * inner * last.n)]
                loops += [(inner, step, target)]
            else:
                loops.append((extent, step, target))
        if found is None:
            return None
        kept = tuple(loop for loop in loops if loop[0] > 1)
        return replace(last, dst=dst, axis=found, loops=kept, accumulate=accumulate)

    def _rename(self, old: int, new: int) -> None:
        for i, stage in enumerate(self.program.stages):
            if isinstance(stage, Round) and stage.src == old:
                stage = replace(stage, source=replace(stage.source, buffer=new))
            elif getattr(stage, "src", None) == old:
                stage = replace(stage, src=new)
            if stage.dst == old:
                stage = replace(stage, dst=new)
            self.program.stages[i] = stage
        self.program.sizes[old] = 0

    @singledispatchmethod
    def visit(self, op: ops.Op, x: Value) -> Value:
        raise TypeError(f"lower: {type(op).__name__} has no stages; add it to tvmstruct/stages.py")

    @visit.register
    def _(self, op: ops.Product, x: Value) -> Value:
        for factor in op.factors:
            x = self.visit(factor, x)
        return x

    @visit.register
    def _(self, op: ops.Sum, x: Value) -> Value:
        dst = self.new_buffer(op.n_out)
        self.shared.append(x.buffer)
        for i, term in enumerate(op.terms):
            self.store(self.visit(term, x), dst, accumulate=i > 0, keep=x.buffer)
        self.shared.pop()
        return Value(dst, ((op.n_out, 1),))

    @visit.register
    def _(self, op: ops.Permute, x: Value) -> Value:
        parts = split(x.dims, op.dims)
        if parts is None:
            x = self.materialise(x)
            parts = split(x.dims, op.dims)
            assert parts is not None
        dims = tuple(dim for axis in op.axes for dim in parts[axis])
        return replace(x, dims=merge(dims) or ((1, 1),))

    @visit.register
    def _(self, op: ops.Slice, x: Value) -> Value:
        if len(merge(x.dims)) > 1:
            x = self.materialise(x)
        stride = x.dims[0][1] if merge(x.dims) == () else merge(x.dims)[0][1]
        return replace(x, dims=((op.n_out, stride),), offset=x.offset + op.start * stride)

    @visit.register
    def _(self, op: ops.Pad, x: Value) -> Value:
        dst = self.new_buffer(op.n_out)
        stop = op.start + op.n_in
        for start, end in ((0, op.start), (stop, op.n_out)):
            if start < end:
                self.emit(Zero(dst, start, end))
        self.emit(Copy(x.buffer, dst, merge(x.dims), x.offset, op.start))
        return Value(dst, ((op.n_out, 1),))

    @visit.register
    def _(self, op: ops.Diag, x: Value) -> Value:
        dst = self.new_buffer(op.n_out)
        self.emit(Copy(x.buffer, dst, merge(x.dims), x.offset, 0, self.add_weight(op.d)))
        return Value(dst, ((op.n_out, 1),))

    @visit.register
    def _(self, op: ops.WalshHadamard, x: Value) -> Value:
        if op.inner == 1 and op.n > 1:
            return self._transform_neighbours(op, x)
        parts = split(x.dims, (op.blocks, op.n, op.inner))
        if parts is None or len(parts[1]) > 1:
            x = self.materialise(x)
            parts = split(x.dims, (op.blocks, op.n, op.inner))
            assert parts is not None
        blocks, axis, inner = parts
        owned = x.buffer not in self.shared
        to = x if owned else Value(self.new_buffer(op.n_out), ((op.n_out, 1),))
        stride = axis[0][1] if axis else 0
        strides = [s for _, s in (*blocks, *inner)] if owned else self._strides(blocks, op, inner)
        loops = tuple(
            (extent, src, dst)
            for (extent, src), dst in zip((*blocks, *inner), strides, strict=True)
        )
        self.emit(
            Hadamard(
                x.buffer, to.buffer, op.n, (stride, stride if owned else op.inner), loops,
                op.scale, owned, x.offset,
            )
        )  # fmt: skip
        return to

    def _strides(
        self, blocks: tuple[Dim, ...], op: ops.WalshHadamard, inner: tuple[Dim, ...]
    ) -> list[int]:
        """Return how far a step along each loop of a transform goes in features laid in order."""
        strides, place = [], 1
        for extent, _ in reversed(inner):
            strides.append(place)
            place *= extent
        place = op.n * op.inner
        for extent, _ in reversed(blocks):
            strides.append(place)
            place *= extent
        return strides[::-1]

    def _transform_neighbours(self, op: ops.WalshHadamard, x: Value) -> Value:
        """Transform features that lie side by side: a product with a small matrix, then vectors."""
        t = min(op.n, NEIGHBOURS)
        blocks = op.n_in // t
        x = self.matmul(hadamard(t)[None] * op.scale, blocks, x, shared=True, signs=True)
        return x if t == op.n else self.visit(replace(op, n=op.n // t, scale=1.0, inner=t), x)

    @visit.register
    def _(self, op: ops.Dense, x: Value) -> Value:
        return self.matmul(op.w[None], 1, x, shared=True)

    @visit.register
    def _(self, op: ops.SharedBlockDiag, x: Value) -> Value:
        return self.matmul(op.w[None], op.blocks, x, shared=True)

    @visit.register
    def _(self, op: ops.BlockDiag, x: Value) -> Value:
        return self.matmul(op.w, op.w.shape[0], x, shared=op.w.shape[0] == 1)

    def matmul(
        self, w: np.ndarray, groups: int, x: Value, *, shared: bool, signs: bool = False
    ) -> Value:
        """Multiply blocks (p, q); features that meet nothing but ``signs`` are not rounded."""
        _, p, q = w.shape
        form = self.form
        if form in EACH and (signs or not pays(form, p, q)):
            form = "pairs" if form == HALVES else "float"
        found = self._source(x, groups, p)
        near = found is not None and 1 in (found.groups[1], *(s for _, s in found.depth))
        if found is None or (form in EACH and not near):
            found = self._source(self.materialise(x), groups, p)
        assert found is not None
        along = next((v for v in (16, 8, 4) if v <= self.lanes and groups % v == 0), 0)
        over_groups = found.groups[1] == 1 and bool(along) and p * q > 1
        numbers = w[..., None]
        if form in EACH:
            found, numbers = self._round(w, found, form)
        if over_groups:
            return self._matmul_over_groups(numbers, found, along, shared, form)
        return self._matmul_over_columns(numbers, found, shared, form)

    def _source(self, x: Value, groups: int, p: int) -> Source | None:
        """Return a view as groups of p features, or None where its strides are too many."""
        parts = split(x.dims, (groups, p))
        if parts is None or len(parts[0]) > 1 or len(parts[1]) > 2:
            return None
        stride = parts[0][0][1] if parts[0] else 0
        return Source(x.buffer, x.offset, (groups, stride), parts[1] or ((1, 0),))

    def _round(self, w: np.ndarray, source: Source, form: str) -> tuple[Source, np.ndarray]:
        """Return where the features of ``source`` lie as words, and the weights in their order."""
        inner = ordered(source)
        gathered = inner.depth[-1][1] != 1
        chosen = source if gathered else inner
        stage = self.rounded.get(chosen)
        if stage is None:
            scale = self.new_buffer(1) if form == BYTES else None
            stage = Round(chosen, len(self.program.sizes), scale, form, gathered)
            self.new_buffer(stage.size, TYPES[form])
            self.emit(stage)
            if source.buffer == X:  # which nothing overwrites
                self.rounded[chosen] = stage
        order = tuple(source.depth.index(dim) for dim in chosen.depth)
        return stage.target, words_of(w, source.depth, order, EACH[form])

    def _matmul_over_groups(
        self, w: np.ndarray, x: Source, lanes: int, shared: bool, form: str
    ) -> Value:
        """Lanes along the groups: loads of x, w and stores of y are all contiguous."""
        (count, p, q, e), (groups, stride) = w.shape, x.groups
        each, paired = 1 if shared else lanes, form == "pairs"
        padded = self._padded(w, q + q % 2 if paired else q)
        dst = self.new_buffer(groups * padded.shape[2])
        for first, outputs, tile in _output_tiles(padded.shape[2], even=paired):
            part = padded[:, :, first : first + outputs]
            packed = part.reshape(count // each, each, p, outputs // tile, tile, e)
            self.emit(
                MatMul(
                    x.buffer, dst, groups, x.depth, outputs, x.offset, stride, first * groups, 1,
                    groups, self.add_weight(packed.transpose(0, 3, 2, 4, 1, 5)),
                    shared, "group", lanes, tile, form=form, scale=x.scale,
                )
            )  # fmt: skip
        return Value(dst, ((groups, 1), (q, groups)))

    def _matmul_over_columns(self, w: np.ndarray, x: Source, shared: bool, form: str) -> Value:
        """Lanes along the outputs; q is padded to whole vectors, so rows of dst are too."""
        (count, p, q, e), (groups, stride) = w.shape, x.groups
        lanes, paired = next(v for v in (4, 8, 16) if v >= min(q, self.lanes)), form == "pairs"
        vectors = -(-q // lanes)
        if paired:
            vectors += vectors % 2
        tile = next(t for t in ((2,) if paired else (3, 2, 1)) if vectors % t == 0)
        width = vectors * lanes
        packed = self._padded(w, width).reshape(count, p, vectors // tile, tile * lanes, e)
        dst = self.new_buffer(groups * width)
        self.emit(
            MatMul(
                x.buffer, dst, groups, x.depth, width, x.offset, stride, 0, width, 1,
                self.add_weight(packed.transpose(0, 2, 1, 3, 4)),
                shared, "column", lanes, tile, form=form, scale=x.scale,
            )
        )  # fmt: skip
        return Value(dst, ((groups, width), (q, 1)))

    def _padded(self, w: np.ndarray, width: int) -> np.ndarray:
        padded = np.zeros((*w.shape[:2], width, w.shape[3]), self.dtype)
        padded[:, :, : w.shape[2]] = w
        return padded
