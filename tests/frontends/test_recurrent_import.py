"""Recurrent layers through `from_onnx` and `compile`: names, shapes, lengths, padding."""

import numpy as np
import pytest
from onnx import TensorProto, helper

import tvmstruct
from tests.models import FLOAT, INT64, make_model, run_onnx, value, weight
from tests.recurrent_models import Node, recurrent_model
from tvmstruct.errors import InputError, ModelError, UnsupportedOperatorError
from tvmstruct.testing import tolerance

INT32, n = TensorProto.INT32, helper.make_node


def assert_same(model, compiled, feeds, inner=20):
    want = run_onnx(model, feeds)
    for got, expected in zip(compiled.run(feeds).values(), want, strict=True):
        np.testing.assert_allclose(got, expected, **tolerance("float32", inner))


@pytest.mark.parametrize(
    "node",
    [
        Node("LSTM", "bidirectional", states=True, peepholes=True, lengths=[2, 5, 0], clip=0.6),
        Node("GRU", "reverse", states=True, bias=False, outputs=("y", "")),
        Node("GRU", reset_after=True, n=17, h=19, outputs=("", "yh")),
        Node("RNN", "bidirectional", activations=["Relu", "Softsign"], batch=1),
        Node("LSTM", coupled=True, steps=1, outputs=("", "", "yc")),
    ],
    ids=lambda node: f"{node.kind} {node.direction}",
)
def test_compiled_nodes_equal_onnx_runtime(node):
    model = recurrent_model(node)
    compiled = tvmstruct.compile(tvmstruct.from_onnx(model))
    assert_same(model, compiled, node.feeds())


def test_batch_first_and_half_precision():
    node = Node("GRU", states=True, layout=1, dtype="float16", outputs=("y", "yh"))
    source = tvmstruct.from_onnx(recurrent_model(node))
    assert [s.shape for s in source.outputs] == [(3, 5, 1, 6), (3, 1, 6)]
    assert source.stored_dtypes == dict.fromkeys(("w", "r", "b"), "float16")
    feeds = node.feeds()
    plain = recurrent_model(Node("GRU", states=True, outputs=("y", "yh")))
    swapped = {k: a.swapaxes(0, 1).astype("float32") for k, a in feeds.items()}
    y, h = run_onnx(plain, swapped)
    got = tvmstruct.compile(source).run(feeds)
    np.testing.assert_allclose(got["y"], y.transpose(2, 0, 1, 3), atol=4e-3)
    np.testing.assert_allclose(got["yh"], h.swapaxes(0, 1), atol=4e-3)


def text_model(*, lengths: str = "input", both: bool = True, last: bool = False):
    """Words (b, s) through a table, an LSTM and a dense layer; lengths come from where it says."""
    d, h = 1 + both, 20
    arrays = {
        "words": weight(30, 12, seed=1),
        "rnn.w": weight(d, 4 * h, 12, seed=2), "rnn.r": weight(d, 4 * h, h, seed=3) * 4,
        "rnn.b": weight(d, 8 * h, seed=4), "out": weight(h, 3, seed=5),
        "merge": np.array([0, 0, -1], np.int64),
    }  # fmt: skip
    arrays["out"] = weight(d * h, 3, seed=5)
    nodes = [n("Gather", ["words", "ids"], ["e"]), n("Transpose", ["e"], ["x"], perm=[1, 0, 2])]
    inputs, given = [value("ids", ["batch", "steps"], INT64)], ""
    if lengths == "input":
        inputs.append(value("count", ["batch"], INT64))
        nodes.append(n("Cast", ["count"], ["length"], to=INT32))
        given = "length"
    elif lengths == "mask":
        inputs.append(value("attention_mask", ["batch", "steps"], INT64))
        arrays["one"] = np.array([1], np.int64)
        nodes.append(n("ReduceSum", ["attention_mask", "one"], ["sum"], keepdims=0))
        nodes.append(n("Cast", ["sum"], ["length"], to=INT32))
        given = "length"
    elif lengths == "unused mask":
        inputs.append(value("attention_mask", ["batch", "steps"], INT64))
    outputs = ["y", "", "c"] if last else ["y"]
    nodes += [
        n("LSTM", ["x", "rnn.w", "rnn.r", "rnn.b", given], outputs, name="rnn", hidden_size=h,
          direction="bidirectional" if both else "forward"),
        n("Transpose", ["y"], ["t"], perm=[2, 0, 1, 3]),
        n("Reshape", ["t", "merge"], ["flat"]),
        n("MatMul", ["flat", "out"], ["scores"]),
    ]  # fmt: skip
    if lengths == "unused mask":
        nodes += [
            n("Cast", ["attention_mask"], ["kept"], to=FLOAT),
            n("Unsqueeze", ["kept", "two"], ["wide"]),
            n("Mul", ["scores", "wide"], ["masked"]),
        ]
        arrays["two"] = np.array([2], np.int64)
    results = ["masked" if lengths == "unused mask" else "scores"] + ["c"] * last
    return make_model(nodes, inputs, [value(r, None) for r in results], arrays)


def feeds(batch, steps, **more):
    rng = np.random.default_rng(steps)
    return {"ids": rng.integers(0, 30, (batch, steps)), **more}


def test_lengths_of_a_request_are_checked(tmp_path):
    model = text_model()
    source = tvmstruct.from_onnx(model)
    assert source.length_inputs == {"count": "steps"}
    compiled = tvmstruct.compile(source)
    assert_same(model, compiled, feeds(3, 7, count=np.array([7, 3, 0])))
    compiled.save(tmp_path / "model.tvms")
    for ready in (compiled, tvmstruct.load(tmp_path / "model.tvms")):
        for bad in ([7, 8, 1], [7, -1, 1]):
            with pytest.raises(InputError, match=r"'count'\[1\] is -?\d; lengths must be 0 to 7"):
                ready.run(feeds(3, 7, count=np.array(bad)))


def test_lengths_that_the_graph_computes_are_bounded():
    compiled = tvmstruct.compile(tvmstruct.from_onnx(text_model(lengths="mask")), buckets="exact")
    long = compiled.run(feeds(2, 5, attention_mask=np.full((2, 5), 9)))
    full = compiled.run(feeds(2, 5, attention_mask=np.ones((2, 5), np.int64)))
    np.testing.assert_array_equal(long["scores"], full["scores"])
    none = compiled.run(feeds(2, 5, attention_mask=np.full((2, 5), -1)))
    assert not none["scores"].any()


@pytest.mark.parametrize(
    ("kinds", "kept"),
    [
        ({"lengths": "mask", "both": True, "last": True}, "steps: padded"),
        ({"lengths": "unused mask", "both": False}, "steps: padded"),
        ({"lengths": "unused mask", "both": True}, "steps: exact sizes (output 'masked' changes"),
        (
            {"lengths": "unused mask", "both": False, "last": True},
            "exact sizes (output 'c'",
        ),
        ({"lengths": "none", "both": True}, "no attention mask has this dimension"),
    ],
    ids=str,
)
def test_steps_are_padded_only_where_it_changes_nothing(kinds, kept):
    model = text_model(**kinds)
    compiled = tvmstruct.compile(tvmstruct.from_onnx(model))
    given = {"attention_mask": np.ones((2, 9), np.int64)} if "mask" in kinds["lengths"] else {}
    given |= {"count": np.array([9, 4])} if kinds["lengths"] == "input" else {}
    assert_same(model, compiled, feeds(2, 9, **given), inner=40)
    assert any(kept in note for note in compiled.padder.notes)


def test_time_major_steps_are_not_padded_into_a_last_state():
    node = Node(outputs=("", "yh"))
    model = recurrent_model(node)
    source = tvmstruct.from_onnx(model, shapes={})
    assert source.inputs[0].shape == (5, 3, 7)
    for axis, dim in enumerate(("steps", "batch")):
        model.graph.input[0].type.tensor_type.shape.dim[axis].dim_param = dim
    compiled = tvmstruct.compile(tvmstruct.from_onnx(model))
    x = np.random.default_rng(0).normal(size=(9, 2, 7)).astype("float32")
    assert_same(model, compiled, {"x": x})
    assert "steps: exact sizes" in " ".join(compiled.padder.notes)


def test_two_layers_share_a_weight_and_another_node_keeps_its_own():
    node = Node()
    arrays = node.arrays()
    nodes = [
        n("LSTM", ["x", "w", "r", "b"], ["a"], hidden_size=6),
        n("LSTM", ["x", "w", "r"], ["c"], hidden_size=6, direction="reverse"),
        n("Add", ["a", "c"], ["y"]),
        n("Mul", ["r", "s"], ["z"]),
    ]
    inputs = [value("x", [5, 3, 7]), value("s", [1])]
    model = make_model(nodes, inputs, [value("y", None), value("z", None)], arrays)
    source = tvmstruct.from_onnx(model)
    assert {k: a.shape for k, a in source.weights.items()} == {
        "w": (7, 24), "r": (1, 24, 6), "r.gates": (6, 24), "b": (24,)
    }  # fmt: skip
    assert_same(model, tvmstruct.compile(source), node.feeds() | {"s": np.ones(1, "float32")})


def test_directions_have_names_of_their_own():
    source = tvmstruct.from_onnx(text_model())
    compiled = tvmstruct.compile(source)
    names = {record.name for record in compiled.report().layers}
    wanted = {f"rnn.{k}.{side}" for k in "wr" for side in ("forward", "reverse")}
    assert wanted <= names & set(source.tensors)
    assert not {"rnn.w", "rnn.r", "rnn.b"} & set(source.tensors)


@pytest.mark.parametrize(
    ("node", "change", "why"),
    [
        (Node(lengths=[6, 1, 1]), {}, r"sequence_lens are \[6, 1, 1\].* 0 to the 5 steps"),
        (Node(lengths=[-1, 1, 1]), {}, r"sequence_lens are \[-1, 1, 1\]"),
        (Node(lengths=[1, 1]), {}, r"sequence_lens 'lengths' has the shape \(2,\).*3 rows"),
        (Node(states=True), {"h": [1, 2, 6]}, r"initial_h 'h' has the shape \(1, 2, 6\)"),
        (Node(states=True), {"c": [1, 3, 5]}, r"initial_c 'c' has the shape \(1, 3, 5\)"),
        (Node(), {"x": [5, 3, 8]}, r"input 'x' has the shape \(5, 3, 8\).*7 features"),
        (Node(), {"x": [5, 21]}, "three axes"),
    ],
    ids=str,
)
def test_shapes_that_do_not_fit_are_named(node, change, why):
    model = recurrent_model(node)
    for info in model.graph.input:
        if info.name in change:
            info.CopyFrom(value(info.name, change[info.name]))
    with pytest.raises(ModelError, match=why):
        tvmstruct.from_onnx(model)


def test_computed_weights_are_refused():
    nodes = [n("LSTM", ["x", "w", "r"], ["y"], name="cell", hidden_size=6)]
    inputs = [value("x", [5, 3, 7]), value("w", [1, 24, 7])]
    model = make_model(nodes, inputs, [value("y", None)], {"r": Node().arrays()["r"]})
    with pytest.raises(UnsupportedOperatorError, match=r"cell.*W 'w' is computed at run time"):
        tvmstruct.from_onnx(model)
