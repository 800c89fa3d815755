# pyright: reportMissingImports=false
"""Cases of transformers: attention alone, one encoder layer, and a memory network's question.

Each says what work it is, and gives the same computation as an ONNX model and in PyTorch.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from cases import Work

from tvmstruct.ops import Array

Feeds = dict[str, Array]
OPSET = 17
SPREAD = 3.29  # standard deviation of scores with 95% of the probability in 5% of the keys


@dataclass(frozen=True)
class Attention:
    """Self-attention without projections on ``rows`` sequences; q, k, v are (rows, length, h d)."""

    rows: int
    length: int
    heads: int = 16
    head_dim: int = 64

    def work(self) -> Work:
        """Count the two products; softmax is not in the bound."""
        width = self.heads * self.head_dim
        return Work(
            flops=4.0 * self.rows * self.length**2 * width,
            weight_values=0.0,
            other_bytes=16.0 * self.rows * self.length * width,
            resident=0.0,
        )

    def feeds(self) -> Feeds:
        """Return random q, k and v."""
        shape = (self.rows, self.length, self.heads * self.head_dim)
        rng = np.random.default_rng(0)
        return {name: rng.standard_normal(shape, np.float32) for name in "qkv"}

    def model(self) -> tuple[bytes, Feeds]:
        """Return the ONNX model and its inputs."""
        split = np.array([self.rows, self.length, self.heads, self.head_dim])
        graph = Graph({"split": split, "scale": np.float32(self.head_dim**-0.5)})
        q, k, v = (graph.node("Reshape", name, "split") for name in "qkv")
        q, v = (graph.node("Transpose", x, perm=[0, 2, 1, 3]) for x in (q, v))
        scores = graph.node("MatMul", q, graph.node("Transpose", k, perm=[0, 2, 3, 1]))
        weights = graph.node("Softmax", graph.node("Mul", scores, "scale"), axis=-1)
        mixed = graph.node("Transpose", graph.node("MatMul", weights, v), perm=[0, 2, 1, 3])
        rows = np.array([self.rows, self.length, self.heads * self.head_dim])
        graph.constants["rows"] = rows
        feeds = self.feeds()
        return graph.finish(graph.node("Reshape", mixed, "rows"), feeds), feeds

    def torch(self) -> Callable[[], Any]:
        """Return PyTorch's own fused attention on the same rows."""
        import torch

        rows = [torch.from_numpy(x) for x in self.feeds().values()]
        split = (self.rows, self.length, self.heads, self.head_dim)

        @torch.inference_mode()
        def call() -> Any:
            q, k, v = (x.view(split).transpose(1, 2) for x in rows)
            out = torch.nn.functional.scaled_dot_product_attention(q, k, v)
            return out.transpose(1, 2).reshape(self.rows, self.length, -1)

        return call


@dataclass(frozen=True)
class EncoderLayer:
    """One BERT layer of Table IV of NLP-Fast on ``rows`` sequences of hidden states."""

    rows: int
    length: int = 256
    hidden: int = 1024
    inner: int = 4096
    heads: int = 16

    def work(self) -> Work:
        """Count dense layers and the two products of attention."""
        values = 4 * self.hidden**2 + 2 * self.hidden * self.inner
        tokens = self.rows * self.length
        return Work(
            flops=2.0 * tokens * (values + 2 * self.length * self.hidden),
            weight_values=values,
            other_bytes=4.0 * tokens * (8 * self.hidden + 2 * self.inner),
            resident=values,
        )

    def model(self) -> tuple[bytes, Feeds]:
        """Return the ONNX model and its inputs."""
        from tvmstruct import models

        config = models.config(
            "bert", layers=1, embeddings=False, seq=self.length, hidden=self.hidden,
            ffn=self.inner, heads=self.heads,
        )  # fmt: skip
        feeds = {
            n: np.ones_like(x) if "mask" in n else x for n, x in config.inputs(self.rows).items()
        }
        return models.build(config).SerializeToString(), feeds

    def torch(self) -> Callable[[], Any]:
        """Return PyTorch's own encoder layer, which has a fused form for inference."""
        import torch

        layer = torch.nn.TransformerEncoderLayer(
            self.hidden, self.heads, self.inner, 0.0, "gelu", batch_first=True
        ).eval()
        x = torch.randn(self.rows, self.length, self.hidden)
        return torch.inference_mode()(lambda: layer(x))


@dataclass(frozen=True)
class Question:
    """``rows`` questions of a memory of ``keys`` keys and values: softmax(q k^T) v."""

    rows: int
    keys: int
    head_dim: int = 64

    def work(self) -> Work:
        """Count the two products; keys and values are read once."""
        values = 2 * self.keys * self.head_dim
        return Work(2.0 * self.rows * values, 0.0, 4.0 * values, 0.0)

    def feeds(self) -> Feeds:
        """Return keys and values, and questions whose scores spread as `SPREAD` says."""
        rng = np.random.default_rng(0)
        q = rng.standard_normal((self.rows, self.head_dim), np.float32)
        q *= np.float32(SPREAD) / np.linalg.norm(q, axis=1, keepdims=True)
        shape = (self.keys, self.head_dim)
        return {"q": q} | {n: rng.standard_normal(shape, np.float32) for n in "kv"}

    def model(self) -> tuple[bytes, Feeds]:
        """Return the ONNX model and its inputs."""
        graph, feeds = Graph({}), self.feeds()
        scores = graph.node("MatMul", "q", graph.node("Transpose", "k", perm=[1, 0]))
        out = graph.node("MatMul", graph.node("Softmax", scores, axis=-1), "v")
        return graph.finish(out, feeds), feeds

    def torch(self) -> Callable[[], Any]:
        """Return PyTorch's own fused attention with a single head."""
        import torch

        q, k, v = (torch.from_numpy(x)[None, None] for x in self.feeds().values())
        attention = torch.nn.functional.scaled_dot_product_attention
        return torch.inference_mode()(lambda: attention(q, k, v, scale=1.0))


TransformerCase = Attention | EncoderLayer | Question


class Graph:
    """An ONNX graph that grows node by node."""

    def __init__(self, constants: dict[str, Any]) -> None:
        self.constants, self.nodes = constants, []

    def node(self, op: str, *inputs: str, **attributes: Any) -> str:
        """Add a node and return the name of its result."""
        from onnx import helper

        name = f"y{len(self.nodes)}"
        self.nodes.append(helper.make_node(op, list(inputs), [name], **attributes))
        return name

    def finish(self, output: str, feeds: Feeds) -> bytes:
        """Return the model."""
        from onnx import TensorProto, helper, numpy_helper

        declare = helper.make_tensor_value_info
        graph = helper.make_graph(
            self.nodes,
            "case",
            [declare(n, TensorProto.FLOAT, x.shape) for n, x in feeds.items()],
            [declare(output, TensorProto.FLOAT, None)],
            [numpy_helper.from_array(np.asarray(x), n) for n, x in self.constants.items()],
        )
        model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", OPSET)])
        model.ir_version = 9
        return model.SerializeToString()
