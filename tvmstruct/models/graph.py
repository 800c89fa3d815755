"""Writes ONNX graphs with random weights: declared first, counted, and drawn only at the end."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import prod, sqrt

import numpy as np
from onnx import ModelProto, NodeProto, TensorProto, ValueInfoProto, helper, numpy_helper

from tvmstruct.errors import InputError, ModelError
from tvmstruct.models.form import Form

OPSET, IR_VERSION = 20, 9  # the first opset with Gelu
MOST_BYTES = (1 << 31) - (1 << 20)  # what a protobuf message can hold, less a little for nodes

Dims = Sequence[int | str]


@dataclass(frozen=True)
class Weight:
    """A float32 weight that is not made yet; ``fill`` returns its values.

    What is ``computed`` from a formula, and not trained, is no parameter of the model.
    """

    shape: tuple[int, ...]
    fill: Callable[[np.random.Generator], np.ndarray]
    computed: bool = False


class GraphBuilder:
    """Collects nodes, inputs and declared weights; ``finish`` returns the ONNX model."""

    def __init__(self, name: str, form: Form | None = None) -> None:
        self.name, self.form = name, form or Form()
        self.nodes: list[NodeProto] = []
        self.inputs: list[ValueInfoProto] = []
        self.outputs: list[ValueInfoProto] = []
        self.weights: dict[str, Weight] = {}
        self.constants: dict[str, np.ndarray] = {}

    @property
    def params(self) -> int:
        """Return the number of weights declared so far."""
        return sum(prod(weight.shape) for weight in self.weights.values())

    def input(self, name: str, dims: Dims, dtype: str) -> None:
        """Declare an input; a ``str`` among ``dims`` is a dimension that varies."""
        self.inputs.append(_value(name, dims, dtype))

    def output(self, value: str, name: str, dims: Dims) -> None:
        """Declare ``value`` as the float32 output ``name``."""
        self.op("Identity", value, output=name)
        self.outputs.append(_value(name, dims, "float32"))

    def weight(self, name: str, *shape: int, std: float | None = None, mean: float = 0.0) -> str:
        """Declare a normal weight.

        Without ``std`` it is ``1 / sqrt(shape[0])``: ``x @ w`` then varies as much as ``x``.
        """
        scale = np.float32(1 / sqrt(shape[0]) if std is None else std)

        def fill(rng: np.random.Generator) -> np.ndarray:
            array = rng.standard_normal(shape, dtype=np.float32)
            array *= scale
            array += np.float32(mean)
            return array

        return self.table(name, Weight(shape, fill))

    def table(self, name: str, weight: Weight) -> str:
        """Declare a weight with values of its own."""
        assert name not in self.weights, name
        self.weights[name] = weight
        return name

    def constant(self, value: float | Sequence[int], dtype: str = "int64") -> str:
        """Return the name of a small constant, one for equal values."""
        array = np.array(value, dtype)
        name = f"constant_{dtype}_{'_'.join(map(str, array.reshape(-1).tolist()))}_{array.ndim}"
        self.constants[name] = array
        return name

    def op(self, kind: str, *inputs: str, output: str | None = None, **attributes: object) -> str:
        """Add a node and return the name of its output."""
        name = output or f"{kind}_{len(self.nodes)}"
        self.nodes.append(helper.make_node(kind, list(inputs), [name], name=name, **attributes))
        return name

    def finish(self, seed: int, shrink: str) -> ModelProto:
        """Draw the weights and return the model; ``shrink`` says how to make it smaller.

        A weight depends on ``seed`` and its own name only: the first layer of a deep model is
        that of a shallow one.
        """
        if (size := 4 * self.params) > MOST_BYTES:
            raise ModelError(
                f"{self.name}: {size / 1e9:.1f} GB of weights are more than the 2.1 GB that one "
                f"ONNX model can hold; {shrink}"
            )
        model = ModelProto(ir_version=IR_VERSION, producer_name="tvmstruct")
        model.opset_import.append(helper.make_opsetid("", OPSET))
        nodes = helper.make_graph(self.nodes, self.name, self.inputs, self.outputs)
        model.graph.CopyFrom(nodes)  # before the weights, which must not be copied
        for name, array in self.constants.items():
            model.graph.initializer.append(numpy_helper.from_array(array, name))
        for name, weight in self.weights.items():
            rng = np.random.default_rng([check_seed(seed), zlib.crc32(name.encode())])
            tensor = model.graph.initializer.add(name=name, dims=weight.shape)
            tensor.data_type = TensorProto.FLOAT
            tensor.raw_data = weight.fill(rng).tobytes()
        return model


def check_seed(seed: int) -> int:
    """Return ``seed``, or say that numpy takes none below 0."""
    if seed < 0:
        raise InputError(f"seed is {seed}, want 0 or more")
    return seed


def _value(name: str, dims: Dims, dtype: str) -> ValueInfoProto:
    element = helper.np_dtype_to_tensor_dtype(np.dtype(dtype))
    return helper.make_tensor_value_info(name, element, list(dims))
