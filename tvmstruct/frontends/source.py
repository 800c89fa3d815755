"""A ``Source``: a model with named inputs and symbolic dimensions, before any shape is chosen."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property

import numpy as np
import tvm

from tvmstruct.embeddings import TensorTable
from tvmstruct.errors import InputError, ModelError

WEIGHTS_ATTR = "tvmstruct.weights"
STORED_ATTR = "tvmstruct.stored_dtypes"
SCALES_ATTR = "tvmstruct.scales"

MASK_NAMES = frozenset({"attention_mask", "input_mask", "attn_mask", "mask"})
SEGMENT_NAMES = frozenset({"token_type_ids", "segment_ids"})

Dim = int | str | None
Shape = tuple[int, ...]
Shapes = Mapping[str, Sequence[int]]


@dataclass(frozen=True)
class TensorSpec:
    """Name, numpy dtype and shape of a tensor; a ``str`` is a symbol, ``None`` unknown."""

    name: str
    dtype: str
    shape: tuple[Dim, ...]


@dataclass(frozen=True, eq=False)
class Source:
    """A model whose input dimensions may be symbols; ``at`` folds it at fixed shapes.

    ``token_inputs`` are the inputs that look up rows, with their number; ``length_inputs`` those
    that say how many steps of each row count, with the dimension that bounds them. ``scales`` are
    those of weights that the model multiplies as integers by rounded activations, one for each
    column.
    """

    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    tensors: Mapping[str, tvm.runtime.Tensor]
    build: Callable[[dict[str, Shape]], tvm.IRModule] = field(repr=False)
    token_inputs: Mapping[str, int] = field(default_factory=dict)
    find_limits: Callable[[], dict[str, int]] = field(default=dict, repr=False)
    stored_dtypes: Mapping[str, str] = field(default_factory=dict)
    name: str = "model"
    tables: Mapping[str, TensorTable] = field(default_factory=dict)
    length_inputs: Mapping[str, Dim] = field(default_factory=dict)
    scales: Mapping[str, np.ndarray] = field(default_factory=dict)

    @cached_property
    def dims(self) -> dict[str, tuple[tuple[str, int], ...]]:
        """Return each symbol with the places ``(input name, axis)`` where it stands."""
        return symbol_places(self.inputs)

    @cached_property
    def limits(self) -> dict[str, int]:
        """Return the largest size of each symbol that the model bounds (found on first use)."""
        return self.find_limits()

    @cached_property
    def default_ones(self) -> tuple[str, ...]:
        """Return the inputs that mean all ones when they are left out: attention masks."""
        return tuple(s.name for s in self.inputs if s.name in MASK_NAMES)

    @property
    def mask_inputs(self) -> tuple[str, ...]:
        """Return the attention masks among the inputs."""
        return self.default_ones

    @cached_property
    def default_zeros(self) -> tuple[str, ...]:
        """Return the inputs that mean all zeros when they are left out: token types."""
        return tuple(s.name for s in self.inputs if s.name in SEGMENT_NAMES)

    @cached_property
    def weights(self) -> dict[str, np.ndarray]:
        """Return read-only views of the weights under their source names."""
        return {name: tensor_view(t) for name, t in self.tensors.items()}

    def with_tables(self, tables: Mapping[str, TensorTable]) -> Source:
        """Return the model with embedding tables replaced: weight name to tensor products.

        Only the shapes of the weights matter then. A tied output layer goes through the factors
        of a ``Word2KetXS`` too. Raises ModelError where a name or a shape does not fit.
        """
        for name, table in tables.items():
            weight = self.tensors.get(name)
            if weight is None:
                known = ", ".join(sorted(self.tensors)[:20])
                raise ModelError(f"tables: no weight is called {name!r}; the weights are: {known}")
            shape = tuple(int(side) for side in weight.shape)
            if shape != (table.vocabulary, table.dimension):
                raise ModelError(
                    f"tables: {name!r} has the shape {shape}, its table is "
                    f"{table.vocabulary}x{table.dimension}"
                )
        return replace(self, tables={**self.tables, **tables})

    def bind(self, shapes: Shapes) -> dict[str, int]:
        """Return the value of each symbol at ``shapes`` or say which shape does not fit."""
        missing = [s.name for s in self.inputs if s.name not in shapes]
        unknown = [name for name in shapes if name not in {s.name for s in self.inputs}]
        if missing or unknown:
            known = ", ".join(s.name for s in self.inputs)
            raise InputError(
                f"shapes: missing {missing}, unknown {unknown}; give a shape for each of: {known}"
            )
        sizes: dict[str, int] = {}
        for spec in self.inputs:
            _bind_spec(spec, tuple(shapes[spec.name]), sizes)
        return sizes

    def at(self, shapes: Shapes | None = None) -> tvm.IRModule:
        """Return the model folded at ``shapes``: ``main`` of the inputs, weights as constants."""
        if shapes is None:
            shapes = self._fixed_shapes()
        self.bind(shapes)
        fixed = {s.name: tuple(int(d) for d in shapes[s.name]) for s in self.inputs}
        mod = with_weights(self.build(fixed), self.tensors, self.stored_dtypes)
        return mod.with_attr(SCALES_ATTR, {n: new_tensor(a) for n, a in self.scales.items()})

    def _fixed_shapes(self) -> dict[str, Shape]:
        if self.dims:
            raise InputError(
                f"at(): the dimensions {', '.join(self.dims)} are symbols; pass a shape per input"
            )
        return {s.name: tuple(d for d in s.shape if isinstance(d, int)) for s in self.inputs}


def symbol_places(inputs: Iterable[TensorSpec]) -> dict[str, tuple[tuple[str, int], ...]]:
    """Return symbol -> places in order of first appearance."""
    places: dict[str, tuple[tuple[str, int], ...]] = {}
    for spec in inputs:
        for axis, dim in enumerate(spec.shape):
            if isinstance(dim, str):
                places[dim] = (*places.get(dim, ()), (spec.name, axis))
    return places


def _bind_spec(spec: TensorSpec, shape: tuple[int, ...], sizes: dict[str, int]) -> None:
    if len(shape) != len(spec.shape):
        raise InputError(
            f"{spec.name}: shape {shape} has rank {len(shape)}, the model wants rank "
            f"{len(spec.shape)} {spec.shape}"
        )
    for axis, (size, dim) in enumerate(zip(shape, spec.shape, strict=True)):
        if not isinstance(size, (int, np.integer)) or size < 1:
            raise InputError(f"{spec.name}: axis {axis} of {shape} must be an integer of 1 or more")
        want = sizes.setdefault(dim, int(size)) if isinstance(dim, str) else dim
        if size != want:
            raise InputError(
                f"{spec.name}: axis {axis} of {shape} is {size} but {dim!r} must be {want} here"
            )


def with_weights(
    mod: tvm.IRModule,
    tensors: Mapping[str, tvm.runtime.Tensor],
    stored: Mapping[str, str],
) -> tvm.IRModule:
    """Attach name -> Tensor (and the stored dtype where it differs) to the module."""
    mod = mod.with_attr(WEIGHTS_ATTR, dict(tensors))
    return mod.with_attr(STORED_ATTR, dict(stored))


def new_tensor(array: np.ndarray) -> tvm.runtime.Tensor:
    """Return a 64-byte aligned TVM tensor holding a copy of ``array``."""
    tensor = tvm.runtime.empty(array.shape, array.dtype.name)
    if array.size == 0:
        return tensor
    if array.dtype.name == "bfloat16":
        tensor.copyfrom(np.ascontiguousarray(array))
        return tensor
    np.copyto(np.from_dlpack(tensor), array, casting="no")
    return tensor


def tensor_view(tensor: tvm.runtime.Tensor) -> np.ndarray:
    """Return a read-only view of a tensor (a copy for bfloat16, which DLPack cannot show)."""
    array = tensor.numpy() if tensor.dtype == "bfloat16" else np.from_dlpack(tensor)
    array.flags.writeable = False
    return array
