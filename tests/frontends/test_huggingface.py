"""Checkpoints of Hugging Face encoders give the same numbers as transformers."""

import json

import numpy as np
import pytest

from tests import models
from tvmstruct.errors import ModelError, UnsupportedOperatorError
from tvmstruct.frontends import from_pretrained

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
safetensors_numpy = pytest.importorskip("safetensors.numpy")

SMALL = {"vocab_size": 60, "hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 3,
         "intermediate_size": 40, "max_position_embeddings": 20}  # fmt: skip
DISTIL = {"vocab_size": 60, "dim": 24, "n_layers": 2, "n_heads": 3, "hidden_dim": 40,
          "max_position_embeddings": 20}  # fmt: skip
CASES = {
    "bert": ("Bert", SMALL | {"hidden_act": "gelu"}),
    "bert-tanh": ("Bert", SMALL | {"hidden_act": "gelu_new", "layer_norm_eps": 1e-5}),
    "roberta": ("Roberta", SMALL | {"type_vocab_size": 1, "hidden_act": "relu"}),
    "xlm": ("XLMRoberta", SMALL | {"type_vocab_size": 1}),
    "distilbert": ("DistilBert", DISTIL),
}


def save(folder, case, **options):
    torch.manual_seed(0)
    family, numbers = CASES[case]
    config = getattr(transformers, f"{family}Config")(**numbers)
    model = getattr(transformers, f"{family}Model")(config).eval()
    for parameter in model.parameters():
        parameter.data += 0.05 * torch.randn_like(parameter)
    model.save_pretrained(folder, **options)
    return model


def feeds(source, batch=2, length=7):
    ids = models.rng(3).integers(3, 60, (batch, length))
    mask = np.ones((batch, length), np.int64)
    mask[-1, 4:] = 0
    ids[-1, 4:] = 1
    types = models.rng(4).integers(0, 2, (batch, length))
    every = {"input_ids": ids, "attention_mask": mask, "token_type_ids": types}
    return {s.name: every[s.name] for s in source.inputs}


@pytest.mark.parametrize("case", CASES)
def test_matches_transformers(tmp_path, case):
    model = save(tmp_path, case)
    source = from_pretrained(tmp_path)
    arrays = feeds(source)
    mod = source.at({n: a.shape for n, a in arrays.items()})
    found = models.run_module(mod, arrays.values())
    with torch.no_grad():
        want = model(**{n: torch.from_numpy(a) for n, a in arrays.items()})
    names = [s.name for s in source.outputs]
    assert names == ["last_hidden_state", "pooler_output"][: len(found)]
    for name, array in zip(names, found, strict=True):
        np.testing.assert_allclose(array, want[name].numpy(), rtol=2e-5, atol=2e-5)
    assert 'mode="clip"' not in mod.script()


@pytest.mark.parametrize(("case", "longest"), [("bert", 20), ("roberta", 18), ("distilbert", 20)])
def test_limits_names_and_tokens(tmp_path, case, longest):
    model = save(tmp_path, case)
    source = from_pretrained(tmp_path)
    assert source.limits == {"sequence": longest}
    assert source.token_inputs["input_ids"] == 60
    assert set(source.weights) <= set(model.state_dict())
    for name, array in source.weights.items():
        np.testing.assert_array_equal(array, model.state_dict()[name].numpy())
    shape = (1, longest + 1)
    with pytest.raises(ModelError):
        source.at({s.name: shape for s in source.inputs})


def test_sharded_checkpoint(tmp_path):
    save(tmp_path / "whole", "bert")
    save(tmp_path / "shards", "bert", max_shard_size="8KB")
    assert (tmp_path / "shards" / "model.safetensors.index.json").exists()
    whole, shards = from_pretrained(tmp_path / "whole"), from_pretrained(tmp_path / "shards")
    assert set(whole.weights) == set(shards.weights)


def edit(folder, **changes):
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_half_precision_is_computed_in_float32(tmp_path):
    save(tmp_path, "bert")
    path = tmp_path / "model.safetensors"
    arrays = safetensors_numpy.load_file(path)
    safetensors_numpy.save_file({n: a.astype("float16") for n, a in arrays.items()}, path)
    source = from_pretrained(tmp_path)
    name = "encoder.layer.0.intermediate.dense.weight"
    assert source.weights[name].dtype == np.float32
    assert source.stored_dtypes[name] == "float16"


@pytest.mark.parametrize(
    ("changes", "error", "match"),
    [
        ({"model_type": "gpt2"}, UnsupportedOperatorError, "gpt2.*known: bert, distilbert"),
        ({"hidden_act": "swish"}, UnsupportedOperatorError, "swish.*known"),
        ({"hidden_size": 48}, ModelError, r"word_embeddings\.weight.*\(60, 24\).*\(60, 48\)"),
        ({"num_hidden_layers": 3}, ModelError, r"encoder\.layer\.2.*missing"),
        ({"num_attention_heads": 5}, ModelError, "multiple of 5"),
        ({"vocab_size": -3}, ModelError, "vocab_size is -3"),
        ({"position_embedding_type": "relative_key"}, UnsupportedOperatorError, "absolute"),
    ],
)
def test_refusals(tmp_path, changes, error, match):
    save(tmp_path, "bert")
    edit(tmp_path, **changes)
    with pytest.raises(error, match=match):
        from_pretrained(tmp_path)


def test_missing_and_damaged_files(tmp_path):
    with pytest.raises(ModelError, match=r"config\.json"):
        from_pretrained(tmp_path)
    save(tmp_path, "bert")
    path = tmp_path / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(ModelError, match="safetensors"):
        from_pretrained(tmp_path)
    path.unlink()
    with pytest.raises(ModelError, match="save_pretrained"):
        from_pretrained(tmp_path)


def test_shards_stay_in_the_folder(tmp_path):
    save(tmp_path, "bert")
    (tmp_path / "model.safetensors").unlink()
    index = {"weight_map": {"x": "../outside.safetensors"}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ModelError, match="outside the folder"):
        from_pretrained(tmp_path)
