"""Checkpoints of the public LookupFFN code against its arithmetic in numpy."""

from __future__ import annotations

import json

import numpy as np
import pytest
from scipy.linalg import hadamard
from scipy.special import softmax

import tvmstruct
from tests import models
from tvmstruct.errors import ModelError
from tvmstruct.frontends import checkpoint as checkpoints
from tvmstruct.testing import tolerance

D, WORDS, PLACES, LAYERS, HEADS = 60, 50, 20, 2, 3
H, TAU, WIDTH, B = 20, 5, 64, 4
BITS = H * TAU
BOUND = tolerance("float32", 512, scale=10)


def layer_state(rng, at="", projection="bh4"):
    """Return the tensors of one LookupFFN layer."""

    def normal(*shape, scale=1.0):
        return (scale * rng.normal(size=shape)).astype(np.float32)

    dense, blocks = (BITS, D), (2, 4, WIDTH // B, B, B)
    return {
        f"{at}LayerNorm.weight": 1 + normal(D, scale=0.1),
        f"{at}LayerNorm.bias": normal(D, scale=0.1),
        f"{at}hash.projection.weight": normal(*blocks, scale=1 / np.sqrt(B * WIDTH))
        if projection == "bh4"
        else normal(*dense, scale=1 / np.sqrt(D)),
        f"{at}hash.projection.bias": normal(BITS, scale=0.1),
        f"{at}tables": normal(H, 1 << TAU, D, scale=0.02),
        f"{at}bias": normal(D, scale=0.1),
    }


def encoder_state(prefix="model.roberta."):
    """Return the tensors of a whole encoder."""
    rng = models.rng(4)

    def normal(*shape, scale=1.0):
        return (scale * rng.normal(size=shape)).astype(np.float32)

    state, at = {}, f"{prefix}embeddings."
    for name, rows in (("word", WORDS), ("position", PLACES), ("token_type", 1)):
        state[f"{at}{name}_embeddings.weight"] = normal(rows, D)
    norms = [f"{at}LayerNorm", f"{prefix}encoder.LayerNorm"]
    for i in range(LAYERS):
        here = f"{prefix}encoder.layer.{i}."
        state |= layer_state(rng, f"{here}FFN.")
        norms.append(f"{here}attention.LayerNorm")
        for name in ("query", "key", "value", "dense"):
            state[f"{here}attention.{name}.weight"] = normal(D, D, scale=1 / np.sqrt(D))
            state[f"{here}attention.{name}.bias"] = normal(D, scale=0.1)
    for name in norms:
        state |= {f"{name}.weight": 1 + normal(D, scale=0.1), f"{name}.bias": normal(D, scale=0.1)}
    return state


# The public code in numpy


def norm(x, state, at):
    x = x - x.mean(-1, keepdims=True)
    return (
        x / np.sqrt(x.var(-1, keepdims=True) + 1e-5) * state[f"{at}.weight"] + state[f"{at}.bias"]
    )


def project(x, state, at, convention):
    w, bias = state[f"{at}weight"], state[f"{at}bias"]
    if w.ndim == 2:
        return x @ w.T + bias
    x = np.pad(x, ((0, 0), (0, WIDTH - D)))
    outs, rule = [], "bni,noi->bno" if convention == "cuda" else "bni,nio->bno"
    for repeat in w:
        y = x
        for pair in repeat:
            y = np.einsum(rule, y.reshape(len(x), -1, B), pair).reshape(len(x), WIDTH)
            y = y @ hadamard(WIDTH) / (1 if convention == "cuda" else WIDTH)
        outs.append(y)
    y = 0.7 * np.concatenate(outs, 1) + (1 - 0.7) * np.tile(x, (1, len(w)))
    return y[:, :BITS] + bias


def lookup_ffn(x, state, at, convention="cuda"):
    z = project(norm(x, state, f"{at}LayerNorm"), state, f"{at}hash.projection.", convention)
    z = z.reshape(len(x), H, TAU)
    code = ((z > 0) * 2 ** np.arange(TAU - 1, -1, -1)).sum(-1)
    score = np.abs(z).sum(-1) / np.prod(1 + np.exp(-2 * np.abs(z)), -1)
    rows = state[f"{at}tables"].reshape(-1, D)[code + (1 << TAU) * np.arange(H)]
    return (rows * score[..., None]).sum(1) + state[f"{at}bias"]


def encode(ids, mask, state, prefix):
    batch, length = ids.shape
    at = f"{prefix}embeddings."
    x = state[f"{at}word_embeddings.weight"][ids] + state[f"{at}token_type_embeddings.weight"][0]
    x = norm(x + state[f"{at}position_embeddings.weight"][2 : 2 + length], state, f"{at}LayerNorm")
    for i in range(LAYERS):
        here = f"{prefix}encoder.layer.{i}."
        y = norm(x, state, f"{here}attention.LayerNorm")

        def dense(y, name, here=here):
            name = f"{here}attention.{name}."
            return y @ state[f"{name}weight"].T + state[f"{name}bias"]

        q, k, v = (
            dense(y, name).reshape(batch, length, HEADS, -1).swapaxes(1, 2)
            for name in ("query", "key", "value")
        )
        scores = q @ k.swapaxes(2, 3) / np.sqrt(D / HEADS) - 1000 * (1 - mask[:, None, None])
        y = (softmax(scores, -1) @ v).swapaxes(1, 2).reshape(batch, length, D)
        x = x + dense(y, "dense")
        x = x + lookup_ffn(x.reshape(-1, D), state, f"{here}FFN.").reshape(x.shape)
    return norm(x, state, f"{prefix}encoder.LayerNorm")


def wide(state):
    return {name: array.astype(np.float64) for name, array in state.items()}


# Layers


@pytest.mark.parametrize("convention", ["cuda", "cpu"])
def test_layer(convention):
    state = layer_state(models.rng(1), "FFN.")
    if convention == "cpu":
        state["FFN.hash.projection.weight"] *= WIDTH
    x = models.rng(2).normal(size=(9, D)).astype(np.float32)
    source = tvmstruct.from_lookupffn(state, prefix="FFN", convention=convention)
    model = tvmstruct.compile(source.at({"x": x.shape}))
    want = lookup_ffn(x.astype(float), wide(state), "FFN.", convention)
    np.testing.assert_allclose(model(x), want, **BOUND)
    hashed, tables = model.report().layers[-2:]
    assert (hashed.name, hashed.form) == ("FFN.hash.projection.weight", "bh4")
    assert (tables.name, tables.shape, tables.form) == ("FFN.tables", (H, 1 << TAU, D), "lookup")


def test_the_conventions_differ():
    state = layer_state(models.rng(1))
    ((_, cuda),) = tvmstruct.read_lookups(state).items()
    ((_, cpu),) = tvmstruct.read_lookups(state, convention="cpu").items()
    x = models.rng(2).normal(size=(3, D))
    assert np.abs(cuda.projection.apply(x) - cpu.projection.apply(x)).max() > 0.1


@pytest.mark.parametrize("projection", ["bh4", "dense"])
def test_lookup_of_a_layer(projection):
    state = layer_state(models.rng(1), "a.", projection)
    (name, lookup), *more = tvmstruct.read_lookups(state, prefix="a").items()
    assert (name, more) == ("a", [])
    x = models.rng(2).normal(size=(4, D))
    want = lookup_ffn(x, wide(state), "a.")
    found = lookup.apply(norm(x, wide(state), "a.LayerNorm"))
    np.testing.assert_allclose(found, want, **BOUND)


# The encoder


@pytest.fixture(scope="module")
def state():
    return encoder_state()


def test_encoder(state, tmp_path):
    torch = pytest.importorskip("torch")
    path = tmp_path / "last.ckpt"
    tensors = {name: torch.from_numpy(array) for name, array in state.items()}
    torch.save({"state_dict": tensors, "epoch": 3}, path)
    source = tvmstruct.from_lookupffn(path, heads=HEADS)
    assert source.limits == {"sequence": PLACES - 2}
    model = tvmstruct.compile(source.at({"input_ids": (2, 7), "attention_mask": (2, 7)}))
    ids = models.rng(3).integers(0, WORDS, size=(2, 7))
    mask = np.array([[1] * 7, [1] * 4 + [0] * 3])
    want = encode(ids, mask, wide(state), "model.roberta.")
    np.testing.assert_allclose(model(ids, mask), want, **BOUND)
    forms = [r.form for r in model.report().layers]
    assert (forms.count("bh4"), forms.count("lookup")) == (LAYERS, LAYERS)
    assert forms.count("attention") == LAYERS


def test_folder_with_a_config(state, tmp_path):
    safetensors = pytest.importorskip("safetensors.numpy")
    safetensors.save_file(state, str(tmp_path / "model.safetensors"))
    config = {"num_attention_heads": HEADS, "layer_norm_eps": 1e-5, "pad_token_id": 1}
    (tmp_path / "config.json").write_text(json.dumps(config))
    source = tvmstruct.from_lookupffn(tmp_path)
    assert [s.name for s in source.inputs] == ["input_ids", "attention_mask"]
    assert list(tvmstruct.read_lookups(tmp_path)) == [
        f"model.roberta.encoder.layer.{i}.FFN" for i in range(LAYERS)
    ]


# What is refused


@pytest.mark.parametrize(
    ("name", "change", "why"),
    [
        ("tables", None, r"no tensor '...tables'"),
        ("bias", None, r"tensor 'bias' is missing"),
        ("tables", lambda a: a[:, :31], r"shape \(20, 31, 60\); want \(h, 2\*\*tau, n\)"),
        ("hash.projection.bias", lambda a: a[1:], r"shape \(99,\), want \(100,\)"),
        ("hash.projection.weight", lambda a: a[:1], r"for 60 inputs, padded to 64, and 100 bits"),
        ("hash.projection.weight", lambda a: a[..., :3], r"want \(2, 4, 64/b, b, b\)"),
    ],
)
def test_wrong_tensors(name, change, why):
    state = layer_state(models.rng(1))
    if change is None:
        del state[name]
    else:
        state[name] = change(state[name])
    with pytest.raises(ModelError, match=why):
        tvmstruct.read_lookups(state)


def test_other_models_and_conventions(state):
    with pytest.raises(ModelError, match="give the prefix of a LookupFFN layer"):
        tvmstruct.from_lookupffn({"weight": np.zeros((2, 2))})
    with pytest.raises(ModelError, match="want one of cuda, cpu"):
        tvmstruct.read_lookups(layer_state(models.rng(1)), convention="gpu")
    with pytest.raises(ModelError, match="60 features and heads=0; give heads"):
        tvmstruct.from_lookupffn(state)


def test_missing_layer(state):
    some = {n: a for n, a in state.items() if "layer.0.FFN" not in n}
    with pytest.raises(ModelError, match=r"encoder\.layer\.0\.FFN\.tables' is missing"):
        tvmstruct.from_lookupffn(some, heads=HEADS)


def test_truncated_files(state, tmp_path):
    safetensors = pytest.importorskip("safetensors.numpy")
    path = tmp_path / "model.safetensors"
    safetensors.save_file(state, str(path))
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(ModelError, match="cannot be read as safetensors"):
        tvmstruct.from_lookupffn(path)
    with pytest.raises(ModelError, match="does not exist"):
        tvmstruct.from_lookupffn(tmp_path / "other.ckpt")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ModelError, match="has no file ending in"):
        tvmstruct.read_lookups(tmp_path / "empty")


def test_truncated_torch_file(tmp_path):
    pytest.importorskip("torch")
    path = tmp_path / "last.ckpt"
    path.write_bytes(b"PK\x03\x04 not a checkpoint")
    with pytest.raises(ModelError, match=r"cannot be read by torch\.load"):
        tvmstruct.from_lookupffn(path)


def test_tables_that_do_not_fit_are_never_read(monkeypatch):
    class Never:
        shape = (1 << 12, 1 << 20, 4096)

    state = layer_state(models.rng(1)) | {"tables": Never()}
    with pytest.raises(ModelError, match="tables take 140,737,488,355,328 bytes"):
        tvmstruct.read_lookups(state)
    monkeypatch.setattr(checkpoints, "available_memory", lambda: 1000)
    with pytest.raises(ModelError, match="1,000 are free"):
        tvmstruct.read_lookups(layer_state(models.rng(1)))
