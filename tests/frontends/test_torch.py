"""Torch modules and Relax modules as sources."""

import subprocess
import sys

import numpy as np
import pytest

from tests import models
from tvmstruct.errors import InputError, ModelError, TvmstructError
from tvmstruct.frontends import as_source, from_onnx, from_torch


def tiny(torch):
    class Tiny(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.words = torch.nn.Embedding(50, 24)
            self.up = torch.nn.Linear(24, 40)
            self.norm = torch.nn.LayerNorm(40)

        def forward(self, ids):
            return self.norm(torch.nn.functional.gelu(self.up(self.words(ids))))

    torch.manual_seed(0)
    return Tiny().eval()


@pytest.fixture(scope="module")
def torch():
    return pytest.importorskip("torch")


def test_module_with_dynamic_shapes_matches(torch):
    module, example = tiny(torch), torch.zeros(2, 7, dtype=torch.int64)
    source = from_torch(module, (example,), dynamic_shapes={"ids": {0: "batch", 1: "sequence"}})
    assert source.inputs[0].shape == ("batch", "sequence")
    assert source.outputs[0].shape == ("batch", "sequence", 40)
    assert source.token_inputs == {"ids": 50}
    assert set(source.weights) == set(module.state_dict())
    ids = models.rng(1).integers(0, 50, (3, 5))
    mod = source.at({"ids": ids.shape})
    assert mod.attrs["tvmstruct.weights"]["up.weight"].same_as(source.tensors["up.weight"])
    with torch.no_grad():
        want = module(torch.from_numpy(ids)).numpy()
    np.testing.assert_allclose(models.run_module(mod, [ids])[0], want, rtol=2e-5, atol=2e-5)


def test_exported_program_is_fixed(torch):
    example = torch.zeros(2, 7, dtype=torch.int64)
    source = from_torch(torch.export.export(tiny(torch), (example,)))
    assert source.at()["main"].params[0].name == "ids"
    with pytest.raises(InputError, match="must be 2"):
        source.at({"ids": (3, 7)})


@pytest.mark.parametrize(
    ("make", "match"),
    [
        (lambda torch, m: from_torch("m"), "Module or ExportedProgram"),
        (lambda torch, m: from_torch(m.train(), (torch.zeros(1, 2).long(),)), "eval"),
        (lambda torch, m: from_torch(m, (3,)), "tensors"),
        (
            lambda torch, m: from_torch(
                m, (torch.zeros(1, 2).long(),), dynamic_shapes={"z": {0: "b"}}
            ),
            "inputs are: ids",
        ),
        (lambda torch, m: from_torch(m, (torch.zeros(1, 2),)), "torch.export fails"),
    ],
)
def test_refusals(torch, make, match):
    with pytest.raises(TvmstructError, match=match):
        make(torch, tiny(torch))


def test_relax_module_is_one_bucket():
    mod = from_onnx(models.dense_model()).at({"x": (3, 24)})
    source = as_source(mod)
    assert as_source(source) is source
    assert source.inputs[0].shape == (3, 24)
    assert "layer.0.weight" in source.weights
    x = models.weight(3, 24)
    np.testing.assert_array_equal(
        models.run_module(source.at(), [x])[0], models.run_module(mod, [x])[0]
    )


def lookup_module(computed):
    import tvm
    from tvm import relax

    ids = relax.Var("ids", relax.TensorType([4], "int64"))
    builder = relax.BlockBuilder()
    with builder.function("main", [ids]):
        with builder.dataflow():
            index = builder.emit(relax.op.add(ids, relax.const(1, "int64"))) if computed else ids
            table = relax.const(models.weight(6, 5))
            y = builder.emit_output(builder.emit(relax.op.take(table, index, 0)))
        builder.emit_func_output(y)
    assert isinstance(builder.get(), tvm.IRModule)
    return builder.get()


def test_relax_lookups_are_checked_or_clipped():
    direct, computed = as_source(lookup_module(False)), as_source(lookup_module(True))
    assert direct.token_inputs == {"ids": 6}
    assert list(direct.weights) == ["main.const_0"]
    assert computed.token_inputs == {}
    wild = np.array([0, 10**9, 3, 4])
    found = models.run_module(computed.at(), [wild])[0]
    np.testing.assert_array_equal(found[0], direct.weights["main.const_0"][1])


def test_relax_module_without_main():
    import tvm

    with pytest.raises(ModelError, match="main"):
        as_source(tvm.IRModule())


def test_optional_packages_are_not_needed():
    code = (
        "import sys; names = ['torch', 'transformers', 'safetensors', 'onnxruntime']; "
        "sys.modules.update(dict.fromkeys(names)); import tvmstruct.frontends as f; "
        "from tvmstruct.errors import MissingDependencyError as E\n"
        "try: f.from_torch(None)\n"
        "except E as e: assert 'tvmstruct[torch]' in str(e)\n"
        "else: raise SystemExit('no error')"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)
