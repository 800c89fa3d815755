"""Damaged, hostile and unsupported models are refused with a named error."""

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from tests import models
from tests.models import INT64, value
from tvmstruct.errors import ModelError, UnsupportedOperatorError
from tvmstruct.frontends import as_source, from_onnx


def one_node(op, inputs=("x",), arrays=None, *, opset=17, domain="", **attributes):
    node = helper.make_node(op, list(inputs), ["y"], name="culprit", domain=domain, **attributes)
    return models.make_model(
        [node], [value("x", ["n", 20])], [value("y", None)], arrays or {}, opset
    )


@pytest.mark.parametrize("op", ["Loop", "Scan", "NonZero", "Bogus"])
def test_unsupported_operator_is_named_with_its_node(op):
    with pytest.raises(UnsupportedOperatorError, match=f"ai.onnx::{op}.*culprit"):
        from_onnx(one_node(op))


def test_all_unsupported_operators_are_listed():
    nodes = [
        helper.make_node("NonZero", ["x"], ["a"], name="first"),
        helper.make_node("FusedMatMul", ["x", "x"], ["y"], domain="com.microsoft", name="second"),
    ]
    model = models.make_model(nodes, [value("x", [2, 2])], [value("y", None)])
    with pytest.raises(UnsupportedOperatorError, match=r"first.*com\.microsoft::FusedMatMul.*sec"):
        from_onnx(model)


def test_computed_scatter_is_refused():
    nodes = [helper.make_node("ScatterElements", ["x", "i", "x"], ["y"], name="culprit")]
    inputs = [value("x", [4, 5]), value("i", [4, 5], INT64)]
    model = models.make_model(nodes, inputs, [value("y", None)])
    with pytest.raises(UnsupportedOperatorError, match=r"culprit.*constant positions"):
        from_onnx(model)


@pytest.mark.parametrize("opset", [8, 22])
def test_opset_outside_the_range(opset):
    with pytest.raises(ModelError, match=f"opset {opset} is outside 9 to 21.*version_converter"):
        from_onnx(models.dense_model(opset))


@pytest.mark.parametrize("keep", [0, 1, 100, 3000])
def test_truncated(keep):
    with pytest.raises(ModelError):
        from_onnx(models.dense_model().SerializeToString()[:keep])


def test_missing_file(tmp_path):
    with pytest.raises(ModelError, match="cannot be read"):
        from_onnx(tmp_path / "none.onnx")


def test_short_weight_data():
    model = models.dense_model()
    model.graph.initializer[0].raw_data = model.graph.initializer[0].raw_data[:-4]
    with pytest.raises(ModelError, match=r"layer\.0\.weight.*3836 bytes.*3840"):
        from_onnx(model)


@pytest.mark.parametrize("dims", [[-1, 24], [1 << 40, 1 << 40], [1] * 40])
def test_absurd_dims(dims):
    model = models.dense_model()
    model.graph.initializer[0].ClearField("dims")
    model.graph.initializer[0].dims.extend(dims)
    with pytest.raises(ModelError, match="not possible"):
        from_onnx(model)


def test_absurd_value():
    model = one_node("Tile", ("x", "r"), {"r": np.array([1 << 35, 1 << 10], np.int64)})
    with pytest.raises(ModelError, match="absurdly large"):
        from_onnx(model)


def test_cycle():
    nodes = [helper.make_node("Relu", ["b"], ["a"]), helper.make_node("Relu", ["a"], ["b"])]
    with pytest.raises(ModelError, match="sorted"):
        from_onnx(models.make_model(nodes, [value("x", [2])], [value("b", [2])]))


def test_duplicate_name():
    nodes = [helper.make_node("Relu", ["x"], ["y"]), helper.make_node("Abs", ["x"], ["y"])]
    with pytest.raises(ModelError, match="more than once"):
        from_onnx(models.make_model(nodes, [value("x", [2])], [value("y", [2])]))


def test_output_that_nothing_computes():
    model = models.dense_model()
    model.graph.output[0].name = "other"
    with pytest.raises(ModelError, match="other"):
        from_onnx(model)


def test_shapes_that_do_not_fit():
    model = one_node("MatMul", ("x", "w"), {"w": models.weight(21, 5)})
    with pytest.raises(ModelError, match=r"MatMul \(node 'culprit'\) does not accept"):
        from_onnx(model)


def test_constant_index_outside_the_table():
    model = one_node("Gather", ("x", "i"), {"i": np.array([20], np.int64)}, axis=1)
    with pytest.raises(ModelError, match="outside a table of 20 rows"):
        from_onnx(model)


def test_wrong_declared_output_type():
    model = models.dense_model()
    model.graph.output[0].type.tensor_type.elem_type = TensorProto.INT64
    with pytest.raises(ModelError, match="declared int64"):
        from_onnx(model)


def test_data_dependent_shape():
    nodes = [helper.make_node("Expand", ["v", "x"], ["y"], name="culprit")]
    arrays = {"v": models.weight(1)}
    model = models.make_model(nodes, [value("x", [2], INT64)], [value("y", None)], arrays)
    with pytest.raises(ModelError, match=r"culprit.*depends on the data"):
        from_onnx(model)


@pytest.mark.parametrize("location", ["../secret.bin", "/etc/passwd", "missing.bin", "", "."])
def test_external_data_stays_in_the_folder(tmp_path, location):
    folder = tmp_path / "model"
    folder.mkdir()
    (tmp_path / "secret.bin").write_bytes(bytes(24 * 40 * 4))
    model = models.dense_model()
    tensor = model.graph.initializer[0]
    tensor.ClearField("raw_data")
    onnx.external_data_helper.set_external_data(_with_raw(tensor), location)
    tensor.ClearField("raw_data")
    path = folder / "model.onnx"
    path.write_bytes(model.SerializeToString())
    with pytest.raises(ModelError, match="outside the model's folder"):
        from_onnx(path)
    with pytest.raises(ModelError, match="pass the path"):
        from_onnx(path.read_bytes())


def _with_raw(tensor):
    tensor.raw_data = b""
    return tensor


@pytest.mark.parametrize(("offset", "length"), [(8, None), (-4, None), (0, 8), (1 << 40, None)])
def test_external_data_bounds(tmp_path, offset, length):
    model = models.dense_model()
    tensor = model.graph.initializer[0]
    (tmp_path / "w.bin").write_bytes(tensor.raw_data)
    onnx.external_data_helper.set_external_data(tensor, "w.bin", offset=offset, length=length)
    tensor.ClearField("raw_data")
    path = tmp_path / "model.onnx"
    path.write_bytes(model.SerializeToString())
    with pytest.raises(ModelError, match="do not hold"):
        from_onnx(path)


def test_external_attribute_is_refused():
    tensor = TensorProto(data_type=1, dims=[1], data_location=TensorProto.EXTERNAL)
    model = one_node("ConstantOfShape", opset=17, value=tensor)
    with pytest.raises(ModelError, match="another file"):
        from_onnx(model)


def test_as_source_names_the_alternatives():
    with pytest.raises(ModelError, match="from_onnx"):
        as_source("model.onnx")
