"""``If`` nodes, inputs that are fixed to a value, dimensions that are fixed to a size."""

import numpy as np
import pytest
from onnx import TensorProto, helper, numpy_helper

import tvmstruct
from tests.models import FLOAT, INT64, make_model, run_onnx, value, weight
from tvmstruct.errors import InputError, ModelError, UnsupportedOperatorError

n = helper.make_node


def branch(nodes, outputs, **arrays):
    """Return the graph of a branch; its constants are initialisers."""
    initialisers = [numpy_helper.from_array(a, k) for k, a in arrays.items()]
    outputs = [helper.make_tensor_value_info(o, FLOAT, None) for o in outputs]
    return helper.make_graph(nodes, "branch", [], outputs, initialisers)


def if_node(condition, then, other, outputs=("y",), name="choice"):
    return n("If", [condition], list(outputs), name=name, then_branch=then, else_branch=other)


def rate_model():
    """``x @ w`` with a weight for each sampling rate; both branches use the same names."""
    then = branch([n("MatMul", ["x", "w"], ["r"])], ["r"], w=weight(20, 3, seed=1))
    other = branch([n("MatMul", ["x", "w"], ["r"]), n("Tanh", ["r"], ["q"])], ["q"],
                   w=weight(20, 3, seed=2))  # fmt: skip
    nodes = [n("Equal", ["sr", "rate"], ["same"]), if_node("same", then, other)]
    inputs = [value("x", ["n", 20]), value("sr", [], INT64)]
    return make_model(nodes, inputs, [value("y", None)], {"rate": np.array(16, np.int64)})


def x_of(rows=5, columns=20):
    return np.random.default_rng(0).normal(size=(rows, columns)).astype(np.float32)


@pytest.mark.parametrize("rate", [16, 8])
def test_a_fixed_input_decides(rate):
    model = rate_model()
    source = tvmstruct.from_onnx(model, constants={"sr": rate})
    assert [s.name for s in source.inputs] == ["x"]
    assert len(source.tensors) == 1  # the other branch and its weight are gone
    want = run_onnx(model, {"x": x_of(), "sr": np.array(rate)})[0]
    np.testing.assert_allclose(tvmstruct.compile(source)(x_of()), want, atol=1e-5)


def test_a_condition_of_the_data_is_refused():
    with pytest.raises(UnsupportedOperatorError, match=r"If.*choice.*constants=\{name: value\}"):
        tvmstruct.from_onnx(rate_model())


def test_shapes_decide_in_nested_branches():
    """One row takes a bias, two are doubled, more are left alone; outer values are read."""
    arrays = {"zero": np.array(0, np.int64), "one": np.array(1, np.int64),
              "two": np.array(2, np.int64)}  # fmt: skip
    inner = if_node(
        "double",
        branch([n("Add", ["h", "h"], ["t"])], ["t"]),
        branch([n("Identity", ["h"], ["t"])], ["t"]),
        ["inner"],
        name="inside",
    )
    then = branch([n("Add", ["h", "b"], ["t"])], ["t"], b=weight(20, seed=3))
    nodes = [
        n("Relu", ["x"], ["h"]),
        n("Shape", ["x"], ["shape"]),
        n("Gather", ["shape", "zero"], ["rows"]),
        n("Equal", ["rows", "one"], ["single"]),
        n("Equal", ["rows", "two"], ["double"]),
        if_node("single", then, branch([inner], ["inner"])),
    ]
    model = make_model(nodes, [value("x", ["n", 20])], [value("y", None)], arrays)
    compiled = tvmstruct.compile(tvmstruct.from_onnx(model), buckets="exact")
    for rows in (1, 2, 5):
        want = run_onnx(model, {"x": x_of(rows)})[0]
        np.testing.assert_allclose(compiled(x_of(rows)), want, atol=1e-6)


def test_weights_of_a_layer_in_a_branch_are_folded():
    """An LSTM whose weights are put together inside of a branch that the shapes choose."""
    w, r = weight(24, 7, seed=1), weight(24, 6, seed=2)
    inside = [
        n("Concat", ["w1", "w2"], ["w"], axis=0),
        n("Unsqueeze", ["w", "first"], ["w3"]),
        n("LSTM", ["x", "w3", "r"], ["", "h"], hidden_size=6, name="rnn"),
    ]
    then = branch(inside, ["h"], w1=w[:8], w2=w[8:], first=np.array([0], np.int64), r=r[None])
    nodes = [
        n("Shape", ["x"], ["shape"]),
        n("Gather", ["shape", "zero"], ["steps"]),
        n("Greater", ["steps", "one"], ["many"]),
        if_node("many", then, branch([n("Slice", ["x", "from", "to", "axis"], ["h"])], ["h"])),
    ]
    arrays = {"zero": np.array(0, np.int64), "one": np.array(1, np.int64)}
    arrays |= {"from": np.array([0], np.int64), "to": np.array([6], np.int64)}
    arrays["axis"] = np.array([2], np.int64)
    model = make_model(nodes, [value("x", ["s", 2, 7])], [value("y", None)], arrays)
    source = tvmstruct.from_onnx(model)
    assert {a.shape for a in source.weights.values()} == {(7, 24), (6, 24)}
    compiled = tvmstruct.compile(source, buckets="exact")
    for steps in (1, 4):
        x = x_of(steps * 2, 7).reshape(steps, 2, 7)
        np.testing.assert_allclose(compiled(x), run_onnx(model, {"x": x})[0], atol=1e-6)


def damaged(change):
    model = rate_model()
    change(model.graph.node[1])
    return model


def no_else(node):
    del node.attribute[1]


def two_results(node):
    node.attribute[0].g.output.append(node.attribute[0].g.output[0])


def takes_input(node):
    node.attribute[0].g.input.append(helper.make_tensor_value_info("z", FLOAT, [1]))


def loop_inside(node):
    node.attribute[0].g.node.append(n("Loop", ["", ""], ["z"], name="inner"))


def deep(node):
    for _ in range(40):
        then = node.attribute[0].g
        inner = if_node("same", branch([], ["x"]), branch([], ["x"]), name="deeper")
        then.node.append(inner)
        node = then.node[-1]


@pytest.mark.parametrize(
    ("change", "why"),
    [
        (no_else, "'choice' needs one condition, then_branch and else_branch"),
        (two_results, "'choice': else_branch must take no inputs and yield 1 outputs"),
        (takes_input, "'choice': else_branch must take no inputs"),
        (loop_inside, r"ai.onnx::Loop \(node 'inner'\)"),
        (deep, "nested more than 32 deep"),
    ],
)
def test_damaged_branches_are_named(change, why):
    with pytest.raises(ModelError, match=why):
        tvmstruct.from_onnx(damaged(change), constants={"sr": 16})


def test_a_condition_of_several_values_is_named():
    then, other = (branch([n(kind, ["x"], ["t"])], ["t"]) for kind in ("Relu", "Tanh"))
    model = make_model(
        [if_node("many", then, other)],
        [value("x", [2, 3]), value("many", [2], TensorProto.BOOL)],
        [value("y", None)],
    )
    with pytest.raises(ModelError, match=r"choice.*its condition has 2 values"):
        tvmstruct.from_onnx(model, constants={"many": [True, False]})


@pytest.mark.parametrize(
    ("options", "why"),
    [
        (
            {"constants": {"rate": 16}},
            r"no input is called \['rate'\]; the inputs are \['x', 'sr'\]",
        ),
        ({"constants": {"sr": 0.5}}, "'sr' is int64, which float64 0.5 is not"),
        ({"constants": {"sr": "fast"}}, "'sr' is int64, which <U4 fast is not"),
        ({"constants": {"sr": [16]}}, r"'sr' has the shape \[\], not \[1\]"),
        ({"shapes": {"y": (1, 20)}}, r"no input is called \['y'\]"),
        ({"shapes": {"x": (1, 21)}}, r"'x' has the shape \['n', 20\]; \[1, 21\] is none"),
        ({"shapes": {"x": (20,)}}, "is none that it can have"),
        ({"shapes": {"x": (0, 20)}}, "size above 0"),
    ],
    ids=str,
)
def test_fixed_inputs_are_checked(options, why):
    with pytest.raises(InputError, match=why):
        tvmstruct.from_onnx(rate_model(), **options)


def test_sizes_that_only_some_models_take_are_asked_for():
    model = make_model(
        [n("Reshape", ["x", "shape"], ["y"])],
        [value("x", ["n", "m"])],
        [value("y", None)],
        {"shape": np.array([-1, 4, 101], np.int64)},
    )
    with pytest.raises(ModelError, match=r"Reshape.*fix them: from_onnx\(\.\.\., shapes="):
        tvmstruct.from_onnx(model)
    source = tvmstruct.from_onnx(model, shapes={"x": ("rows", 404)})
    assert source.inputs[0].shape == ("rows", 404)
    assert source.outputs[0].shape == ("rows", 4, 101)
