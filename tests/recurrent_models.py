"""Small ONNX models of one recurrent node, for the tests."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from onnx import GraphProto, ModelProto, NodeProto, helper, numpy_helper

from tests.models import make_model, rng, value

GATES = {"LSTM": 4, "GRU": 3, "RNN": 1}
COUNTS = {"LSTM": 3, "GRU": 2, "RNN": 1}  # activations of a direction


@dataclass(frozen=True)
class Node:
    """One LSTM, GRU or RNN with random weights; ``lengths`` are constants."""

    kind: str = "LSTM"
    direction: str = "forward"
    steps: int = 5
    batch: int = 3
    n: int = 7
    h: int = 6
    bias: bool = True
    peepholes: bool = False
    states: bool = False
    lengths: list[int] | None = None
    activations: list[str] | None = None
    alpha: list[float] | None = None
    beta: list[float] | None = None
    clip: float | None = None
    coupled: bool = False
    reset_after: bool = False
    layout: int = 0
    outputs: tuple[str, ...] = ("y", "yh", "yc")
    dtype: str = "float32"
    seed: int = 0

    @property
    def sides(self) -> int:
        """Number of directions."""
        return 2 if self.direction == "bidirectional" else 1

    def arrays(self) -> dict[str, np.ndarray]:
        """Return the constants: weights and lengths."""
        g, h, d, draw = GATES[self.kind], self.h, self.sides, rng(self.seed).normal
        arrays = {
            "w": draw(size=(d, g * h, self.n)) / np.sqrt(self.n),
            "r": draw(size=(d, g * h, h)) / np.sqrt(h),
        }
        arrays |= {"b": draw(size=(d, 2 * g * h))} if self.bias else {}
        arrays |= {"p": draw(size=(d, 3 * h))} if self.peepholes else {}
        arrays = {k: a.astype(self.dtype) for k, a in arrays.items()}
        return arrays | ({} if self.lengths is None else {"lengths": np.int32(self.lengths)})

    def shapes(self) -> dict[str, list[int]]:
        """Return the shapes of x and of the states."""
        x, state = [self.steps, self.batch, self.n], [self.sides, self.batch, self.h]
        if self.layout:
            x[:2], state[:2] = x[1::-1], state[1::-1]
        shapes = {"x": x}
        shapes |= {"h": state} if self.states else {}
        return shapes | ({"c": state} if self.states and self.kind == "LSTM" else {})

    def feeds(self, seed: int = 1) -> dict[str, np.ndarray]:
        """Return random x and states."""
        draw = rng(seed).normal
        return {k: draw(size=s).astype(self.dtype) for k, s in self.shapes().items()}

    def proto(self) -> NodeProto:
        """Return the node."""
        has = {*self.arrays(), *self.shapes()}
        names = ["x", "w", "r", "b", "lengths", "h"] + ["c", "p"] * (self.kind == "LSTM")
        optional = {
            "activations": self.activations, "activation_alpha": self.alpha,
            "activation_beta": self.beta, "clip": self.clip,
            "input_forget": int(self.coupled) or None,
            "linear_before_reset": int(self.reset_after) or None,
            "layout": self.layout or None,
        }  # fmt: skip
        return helper.make_node(
            self.kind, [n if n in has else "" for n in names],
            list(self.outputs[: 3 if self.kind == "LSTM" else 2]), name="cell",
            hidden_size=self.h, direction=self.direction,
            **{k: v for k, v in optional.items() if v is not None},
        )  # fmt: skip


def recurrent_model(node: Node, lengths: str | None = None) -> ModelProto:
    """Return a model of the node alone."""
    elem = helper.np_dtype_to_tensor_dtype(np.dtype(node.dtype))
    names = [n for n in node.outputs[: 3 if node.kind == "LSTM" else 2] if n]
    return make_model(
        [node.proto()],
        [value(n, s, elem) for n, s in node.shapes().items()],
        [value(n, None, elem) for n in names],
        node.arrays(),
    )


def branch_model() -> ModelProto:
    """Return ``x @ w`` for one row, an LSTM over x for more: an ``If`` that the shapes decide."""

    def branch(nodes: list[NodeProto], output: str, **arrays: np.ndarray) -> GraphProto:
        held = [numpy_helper.from_array(a, k) for k, a in arrays.items()]
        return helper.make_graph(nodes, "branch", [], [value(output, None)], held)

    n, cell = helper.make_node, Node(n=7, h=6).arrays()
    lstm = n("LSTM", ["x", "w", "r", "b"], ["", "h"], hidden_size=6, name="rnn")
    several = branch([lstm], "h", **cell)
    one = branch([n("MatMul", ["x", "w"], ["h"])], "h", w=rng(1).normal(size=(7, 6)).astype("f"))
    nodes = [
        n("Shape", ["x"], ["shape"]),
        n("Gather", ["shape", "zero"], ["steps"]),
        n("Equal", ["steps", "one"], ["single"]),
        n("If", ["single"], ["y"], name="choice", then_branch=one, else_branch=several),
    ]
    arrays = {"zero": np.array(0, np.int64), "one": np.array(1, np.int64)}
    return make_model(nodes, [value("x", ["s", 3, 7])], [value("y", None)], arrays)
