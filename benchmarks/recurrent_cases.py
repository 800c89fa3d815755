# pyright: reportMissingImports=false
"""One LSTM layer over a sequence (AntMan, Table 8): ours in a form, the peers dense."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from cases import Work
from peers import OURS

from tvmstruct import families
from tvmstruct.ops import Array, Dense, Op
from tvmstruct.recurrent import Cell, Recurrent

Call = Callable[[], Any]
INPUTS = 8  # fresh sequences that take turns


@dataclass(frozen=True)
class LstmCase:
    """``steps`` of ``rows`` rows, input and hidden size ``dim``; peers keep both matrices dense."""

    dim: int
    form: str = "dense"
    sizes: Mapping[str, int] = field(default_factory=dict)
    steps: int = 100
    rows: int = 1

    def operator(self, rng: np.random.Generator) -> Op:
        """Return a (dim, 4 dim) matrix of the form: the stacked gates."""
        m, n = self.dim, 4 * self.dim
        if self.form == "dense":
            return Dense(rng.standard_normal((m, n), np.float32) / np.float32(m**0.5))
        g = self.sizes["g"]
        if self.form == "lgp_shuffle":
            return families.lgp_shuffle(_random(rng, g, m // g, n // g))
        s = m // self.sizes["r"]
        return families.low_rank_lgp(
            _random(rng, g, m // g, s // g), _random(rng, s, s), _random(rng, g, s // g, n // g)
        )

    def layer(self) -> Recurrent:
        """Return the layer with random weights."""
        rng = np.random.default_rng(0)
        bias = rng.standard_normal(4 * self.dim).astype(np.float32)
        return Recurrent(Cell("lstm"), self.operator(rng), self.operator(rng), bias)

    @property
    def saving(self) -> float:
        """The factor of the paper: multiply-adds of the dense matrix over those of the form."""
        return 4 * self.dim**2 / self.operator(np.random.default_rng(0)).macs

    def work(self) -> Work:
        """Count both products; the hidden matrix is read in every step, the input's once."""
        layer = self.layer()
        features = self.dim * (2 + 2 * 4)  # x and y, the input products written and read
        return Work(
            flops=2.0 * self.steps * self.rows * layer.macs,
            weight_values=layer.input.params + float(self.steps * layer.hidden.params),
            other_bytes=4.0 * self.steps * self.rows * features,
            resident=float(layer.hidden.params),
            saving=self.saving,
            working_set=4.0 * layer.hidden.params,
        )

    def contender(self, name: str, threads: int) -> Call:
        """Return what a contender calls."""
        if name == OURS:
            return self._ours()
        return self._torch(threads) if name == "torch" else self._session(name, threads)

    def inputs(self, make: Callable[..., Array] = np.empty) -> list[Array]:
        """Return sequences (steps, rows, dim) that take turns."""
        rng, made = np.random.default_rng(1), []
        for _ in range(INPUTS):
            array = make((self.steps, self.rows, self.dim), np.float32)
            array[...] = rng.standard_normal(array.shape, np.float32)
            made.append(array)
        return made

    def _ours(self) -> Call:
        from tvm import relax

        import tvmstruct
        from tvmstruct.arrays import aligned_empty
        from tvmstruct.frontends.recurrent import emit_recurrent

        layer, builder = self.layer(), relax.BlockBuilder()
        kind = relax.TensorType((self.steps, self.rows, self.dim), "float32")
        x = relax.Var("x", kind)
        with builder.function("main", [x]):
            with builder.dataflow():
                y, _, _ = emit_recurrent(builder, x, [layer])
                y = builder.emit_output(y)
            builder.emit_func_output(y)
        model = tvmstruct.compile(builder.get())
        arrays = self.inputs(aligned_empty)
        want = layer.apply(arrays[0].astype(np.float64))[0]
        np.testing.assert_allclose(model(arrays[0]), want, rtol=1e-4, atol=1e-4)
        return _turns(model, arrays)

    def _torch(self, threads: int) -> Call:
        import torch

        torch.set_num_threads(threads)
        module = torch.nn.LSTM(self.dim, self.dim)
        return torch.inference_mode()(_turns(module, list(map(torch.from_numpy, self.inputs()))))

    def _session(self, name: str, threads: int) -> Call:
        from contenders import onnxruntime_call, openvino_call

        model, arrays = self._onnx(), self.inputs()
        if name == "onnxruntime":
            run = onnxruntime_call(model, threads)
        else:
            precision = {"openvino-f32": "f32", "openvino-default": None}[name]
            run = openvino_call(model, {"x": arrays[0].shape}, threads, precision)
        return _turns(run, [{"x": array} for array in arrays])

    def _onnx(self) -> bytes:
        """Return the dense layer; values do not matter to the peers."""
        from onnx import TensorProto, helper, numpy_helper

        rng, d = np.random.default_rng(0), self.dim
        weights = {
            "w": rng.standard_normal((1, 4 * d, d), np.float32) / np.float32(d**0.5),
            "r": rng.standard_normal((1, 4 * d, d), np.float32) / np.float32(d**0.5),
            "b": rng.standard_normal((1, 8 * d), np.float32),
        }
        graph = helper.make_graph(
            [helper.make_node("LSTM", ["x", *weights], ["y"], hidden_size=d)],
            "lstm",
            [helper.make_tensor_value_info("x", TensorProto.FLOAT, [self.steps, self.rows, d])],
            [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)],
            [numpy_helper.from_array(a, n) for n, a in weights.items()],
        )
        model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)])
        model.ir_version = 9
        return model.SerializeToString()


@dataclass(frozen=True)
class PackagedCase:
    """A model that a PyPI package ships, as it is called: one chunk of sound, or one string."""

    package: str
    file: str
    feeds: Mapping[str, tuple[tuple[int, ...], str]]  # shapes and dtypes of the inputs
    constants: Mapping[str, int] = field(default_factory=dict)
    rows: int = 1
    highest: int = 30  # of ids

    def work(self) -> Work:
        """Count no work: there is no roofline of a whole model here."""
        return Work(flops=1.0, weight_values=1.0, other_bytes=1.0, resident=1.0)

    def contender(self, name: str, threads: int) -> Call:
        """Return what a contender calls."""
        from tvmstruct.arrays import aligned_empty

        rng, arrays = np.random.default_rng(0), {}
        for key, (shape, dtype) in self.feeds.items():
            arrays[key] = aligned_empty(shape, np.dtype(dtype))
            whole = dtype.startswith("int")
            arrays[key][...] = (
                rng.integers(2, self.highest, shape) if whole else rng.normal(size=shape) / 10
            )
        path = self._path()
        if name == OURS:
            import tvmstruct

            shapes = {key: shape for key, (shape, _) in self.feeds.items()}
            source = tvmstruct.from_onnx(path, constants=dict(self.constants), shapes=shapes)
            model = tvmstruct.compile(source, buckets="exact")
            ordered = [arrays[spec.name] for spec in model.inputs]
            return lambda: model(*ordered)
        from contenders import onnxruntime_call

        given = arrays | {key: np.array(value) for key, value in self.constants.items()}
        with open(path, "rb") as file:
            run = onnxruntime_call(file.read(), threads)
        return lambda: run(given)

    def _path(self) -> str:
        from importlib.metadata import files

        found = (f for f in files(self.package) or [] if f.name == self.file)
        return str(next(found).locate())


SILERO = PackagedCase(
    "silero-vad",
    "silero_vad.onnx",
    {"input": ((1, 576), "float32"), "state": ((2, 1, 128), "float32")},
    {"sr": 16000},
)
DKSPLIT = PackagedCase("dksplit", "dksplit-int8.onnx", {"chars": ((1, 22), "int64")})


def _random(rng: np.random.Generator, *shape: int) -> Array:
    return (rng.standard_normal(shape) / shape[-2] ** 0.5).astype(np.float32)


def _turns(call: Callable[[Any], Any], arguments: list[Any]) -> Call:
    from itertools import cycle

    turns = cycle(arguments)
    return lambda: call(next(turns))
