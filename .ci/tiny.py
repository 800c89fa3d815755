"""Compile a two-layer ONNX model with the installed wheel; argument 1 is the checkout to shun."""

import sys
from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

import tvmstruct
import tvmstruct.passes
import tvmstruct.schedules

checkout = Path(sys.argv[1]).resolve()
for module in (tvmstruct, tvmstruct.passes, tvmstruct.schedules):
    assert module.__file__, module
    assert checkout not in Path(module.__file__).resolve().parents, module.__file__

rng = np.random.default_rng(0)
weights = [rng.normal(size=shape).astype("float32") for shape in ((16, 48), (48, 8))]
graph = helper.make_graph(
    [
        helper.make_node("MatMul", ["x", "w0"], ["h"]),
        helper.make_node("Relu", ["h"], ["r"]),
        helper.make_node("MatMul", ["r", "w1"], ["y"]),
    ],
    "tiny",
    [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", 16])],
    [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["batch", 8])],
    [numpy_helper.from_array(w, f"w{i}") for i, w in enumerate(weights)],
)
model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
onnx.save(model, "tiny.onnx")

x = rng.normal(size=(3, 16)).astype("float32")
compiled = tvmstruct.compile(tvmstruct.from_onnx("tiny.onnx"))
expected = np.maximum(x @ weights[0], 0) @ weights[1]
np.testing.assert_allclose(compiled(x), expected, rtol=1e-4, atol=1e-4)
compiled.save("tiny.tvms")
np.testing.assert_allclose(tvmstruct.load("tiny.tvms")(x), expected, rtol=1e-4, atol=1e-4)
sys.stdout.write("the wheel compiles, saves and loads\n")
