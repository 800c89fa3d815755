"""Hugging Face encoders: config.json and safetensors become an ONNX graph, then a ``Source``."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from onnx import NodeProto, helper

from tvmstruct.errors import ModelError, UnsupportedOperatorError
from tvmstruct.frontends.nodes import own_nodes
from tvmstruct.frontends.onnx import source_from_graph
from tvmstruct.frontends.source import Source, TensorSpec, new_tensor
from tvmstruct.frontends.tensors import load_safetensors, read_tensors
from tvmstruct.frontends.validate import SMALL, Graph

OPSET = 20
ROBERTA = frozenset({"roberta", "xlm-roberta", "camembert"})
KNOWN = ("bert", "distilbert", *sorted(ROBERTA))
PREFIXES = ("", "bert.", "roberta.", "distilbert.", "model.", "auto_model.", "0.auto_model.")


@dataclass(frozen=True)
class _Names:
    """Where a family keeps its weights below ``layer``; dense layers have weight and bias."""

    layer: str
    query: str
    key: str
    value: str
    attention_out: str
    attention_norm: str
    up: str
    down: str
    out_norm: str


BERT_NAMES = _Names(
    "encoder.layer.{}.",
    "attention.self.query",
    "attention.self.key",
    "attention.self.value",
    "attention.output.dense",
    "attention.output.LayerNorm",
    "intermediate.dense",
    "output.dense",
    "output.LayerNorm",
)
DISTILBERT_NAMES = _Names(
    "transformer.layer.{}.",
    "attention.q_lin",
    "attention.k_lin",
    "attention.v_lin",
    "attention.out_lin",
    "sa_layer_norm",
    "ffn.lin1",
    "ffn.lin2",
    "output_layer_norm",
)


@dataclass(frozen=True)
class _Config:
    """The numbers of an encoder, the same for all families."""

    family: str
    hidden: int
    layers: int
    heads: int
    inner: int
    vocabulary: int
    positions: int
    types: int
    epsilon: float
    activation: str
    padding: int


def from_pretrained(folder: str | Path) -> Source:
    """Return the ``Source`` of a BERT, RoBERTa, XLM-R or DistilBERT encoder in ``folder``."""
    root = Path(folder)
    config = _read_config(root)
    encoder = _Encoder(config, _read_weights(root))
    graph = encoder.build()
    usable = config.positions - (config.padding + 1 if config.family in ROBERTA else 0)
    return source_from_graph(graph, limits={"sequence": usable})


def _read_config(root: Path) -> _Config:
    path = root / "config.json"
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ModelError(f"{path}: cannot be read ({error}); give a model folder") from error
    if not isinstance(raw, dict):
        raise ModelError(f"{path}: holds {type(raw).__name__}, want a JSON object")
    family = raw.get("model_type")
    if family not in KNOWN:
        raise UnsupportedOperatorError(
            f"{path}: model_type {family!r} is unknown; known: {', '.join(KNOWN)}. Export the "
            "model to ONNX and use tvmstruct.from_onnx"
        )
    if raw.get("position_embedding_type", "absolute") != "absolute" or raw.get("is_decoder"):
        raise UnsupportedOperatorError(f"{path}: only encoders with absolute positions compile")
    config = _config_of(family, raw, path)
    if config.hidden % config.heads:
        raise ModelError(f"{path}: hidden size {config.hidden} is no multiple of {config.heads}")
    return config


def _config_of(family: str, raw: Mapping[str, Any], path: Path) -> _Config:
    distil = family == "distilbert"
    activation = str(raw.get("activation" if distil else "hidden_act", "gelu"))
    if activation not in ACTIVATIONS:
        raise UnsupportedOperatorError(
            f"{path}: activation {activation!r} is unknown; known: {sorted(ACTIVATIONS)}"
        )
    return _Config(
        family=family,
        hidden=_integer(raw, path, "dim" if distil else "hidden_size", 768),
        layers=_integer(raw, path, "n_layers" if distil else "num_hidden_layers", 12),
        heads=_integer(raw, path, "n_heads" if distil else "num_attention_heads", 12),
        inner=_integer(raw, path, "hidden_dim" if distil else "intermediate_size", 3072),
        vocabulary=_integer(raw, path, "vocab_size", 30522),
        positions=_integer(raw, path, "max_position_embeddings", 512),
        types=0 if distil else _integer(raw, path, "type_vocab_size", 2),
        epsilon=float(raw.get("layer_norm_eps", 1e-12)),
        activation=activation,
        padding=_integer(raw, path, "pad_token_id", 1 if family in ROBERTA else 0, least=0),
    )


def _integer(raw: Mapping[str, Any], path: Path, key: str, default: int, least: int = 1) -> int:
    value = raw.get(key, default)
    value = default if value is None else value
    if not isinstance(value, int) or isinstance(value, bool) or not least <= value < 1 << 31:
        raise ModelError(f"{path}: {key} is {value!r}, want an integer of {least} or more")
    return value


def _read_weights(root: Path) -> dict[str, np.ndarray]:
    load_safetensors()  # before looking for files: without the extra there is nothing to read
    weights: dict[str, np.ndarray] = {}
    for path in _weight_files(root):
        weights |= read_tensors(path)
    return weights


def _weight_files(root: Path) -> list[Path]:
    single, index = root / "model.safetensors", root / "model.safetensors.index.json"
    if single.is_file():
        return [single]
    if not index.is_file():
        raise ModelError(
            f"{root}: has no model.safetensors (nor its index); save the model with "
            "save_pretrained(folder, safe_serialization=True)"
        )
    try:
        names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ModelError(f"{index}: no valid weight_map: {error}") from error
    paths = [root / str(name) for name in names]
    for path in paths:
        if path.resolve().parent != root.resolve() or not path.is_file():
            raise ModelError(f"{index}: shard {path.name!r} is missing or outside the folder")
    return paths


class _Encoder:
    """Writes the encoder as ONNX nodes; every dense weight keeps its name and (out, in) layout."""

    def __init__(self, config: _Config, weights: Mapping[str, np.ndarray]) -> None:
        self.config = config
        self.weights = weights
        self.nodes: list[NodeProto] = []
        self.arrays: dict[str, np.ndarray] = {}
        anchor = "embeddings.word_embeddings.weight"
        found = [p for p in PREFIXES if p + anchor in weights]
        if not found:
            raise ModelError(
                f"tensor {anchor!r} is missing; the checkpoint has {sorted(weights)[:5]}"
            )
        self.prefix = found[0]

    def weight(self, name: str, shape: tuple[int, ...]) -> str:
        """Take a checkpoint tensor into the graph after checking its shape."""
        full = self.prefix + name
        array = self.weights.get(full)
        if array is None:
            legacy = full.replace("LayerNorm.weight", "LayerNorm.gamma")
            array = self.weights.get(legacy.replace("LayerNorm.bias", "LayerNorm.beta"))
        if array is None:
            raise ModelError(f"tensor {full!r} is missing in the checkpoint; want shape {shape}")
        if array.shape != shape:
            raise ModelError(
                f"tensor {full!r} has shape {array.shape}, config.json wants {shape}; "
                "the two files belong to different models"
            )
        self.arrays[full] = array
        return full if array.dtype == np.float32 else self.op("Cast", full, to=1)

    def constant(self, value: float | Sequence[int], dtype: str = "float32") -> str:
        """Add a small constant."""
        name = f"constant_{len(self.arrays)}"
        self.arrays[name] = np.array(value, dtype=dtype)
        return name

    def op(self, kind: str, *inputs: str, output: str | None = None, **attributes: object) -> str:
        """Add a node and return the name of its output."""
        name = output or f"{kind}_{len(self.nodes)}"
        self.nodes.append(helper.make_node(kind, list(inputs), [name], name=name, **attributes))
        return name

    def dense(self, x: str, name: str, shape: tuple[int, int]) -> str:
        """``x @ w.T + b`` for a stored weight of shape (out, in)."""
        transposed = self.op("Transpose", self.weight(name + ".weight", shape), perm=[1, 0])
        product = self.op("MatMul", x, transposed)
        return self.op("Add", product, self.weight(name + ".bias", shape[:1]))

    def norm(self, x: str, name: str, output: str | None = None) -> str:
        """LayerNorm over the last axis."""
        size = (self.config.hidden,)
        scale, bias = self.weight(name + ".weight", size), self.weight(name + ".bias", size)
        return self.op(
            "LayerNormalization", x, scale, bias, output=output, epsilon=self.config.epsilon
        )

    def embed(self) -> str:
        """Sum of word, position and type embeddings, normalised."""
        cfg = self.config
        words = self.weight("embeddings.word_embeddings.weight", (cfg.vocabulary, cfg.hidden))
        x = self.op("Gather", words, "input_ids")
        if cfg.types:
            table = self.weight("embeddings.token_type_embeddings.weight", (cfg.types, cfg.hidden))
            index = self.token_types()
            x = self.op("Add", x, self.op("Gather", table, index))
        table = self.weight("embeddings.position_embeddings.weight", (cfg.positions, cfg.hidden))
        x = self.op("Add", x, self.op("Gather", table, self.positions()))
        return self.norm(x, "embeddings.LayerNorm")

    def token_types(self) -> str:
        """Return the token types: an input of BERT, zero for the RoBERTa family."""
        if self.config.family == "bert":
            return "token_type_ids"
        shape = self.op("Shape", "input_ids")
        return self.op("ConstantOfShape", shape, value=helper.make_tensor("zero", 7, [1], [0]))

    def positions(self) -> str:
        """0, 1, 2, ...; RoBERTa counts the tokens that are not padding, from padding + 1."""
        if self.config.family in ROBERTA:
            padding = self.constant(self.config.padding, "int64")
            used = self.op("Cast", self.op("Not", self.op("Equal", "input_ids", padding)), to=7)
            count = self.op("CumSum", used, self.constant(1, "int64"))
            return self.op("Add", self.op("Mul", count, used), padding)
        shape = self.op("Shape", "input_ids")
        length = self.op("Gather", shape, self.constant(1, "int64"))
        zero, one = self.constant(0, "int64"), self.constant(1, "int64")
        return self.op("Range", zero, length, one)

    def mask(self) -> str:
        """``(1 - mask) * finfo.min`` of shape (batch, 1, 1, sequence)."""
        wide = self.op("Unsqueeze", "attention_mask", self.constant([1, 2], "int64"))
        inverse = self.op("Sub", self.constant(1.0), self.op("Cast", wide, to=1))
        return self.op("Mul", inverse, self.constant(float(np.finfo(np.float32).min)))

    def heads(self, x: str, axes: list[int]) -> str:
        """Split the last axis into heads and reorder."""
        cfg = self.config
        shape = self.constant([0, 0, cfg.heads, cfg.hidden // cfg.heads], "int64")
        return self.op("Transpose", self.op("Reshape", x, shape), perm=axes)

    def attention(self, x: str, mask: str, names: _Names, layer: str) -> str:
        """Scaled dot-product attention and its output projection."""
        cfg = self.config
        square = (cfg.hidden, cfg.hidden)
        query = self.heads(self.dense(x, layer + names.query, square), [0, 2, 1, 3])
        key = self.heads(self.dense(x, layer + names.key, square), [0, 2, 3, 1])
        value = self.heads(self.dense(x, layer + names.value, square), [0, 2, 1, 3])
        root = self.constant(float(np.sqrt(cfg.hidden // cfg.heads)))
        scores = self.op("Add", self.op("Div", self.op("MatMul", query, key), root), mask)
        mixed = self.op("MatMul", self.op("Softmax", scores, axis=-1), value)
        merged = self.op("Transpose", mixed, perm=[0, 2, 1, 3])
        flat = self.op("Reshape", merged, self.constant([0, 0, cfg.hidden], "int64"))
        return self.dense(flat, layer + names.attention_out, square)

    def block(self, x: str, mask: str, names: _Names, index: int, output: str | None) -> str:
        """One encoder layer, normalised after each residual."""
        cfg, layer = self.config, names.layer.format(index)
        x = self.norm(
            self.op("Add", self.attention(x, mask, names, layer), x), layer + names.attention_norm
        )
        up = self.dense(x, layer + names.up, (cfg.inner, cfg.hidden))
        kind, attributes = ACTIVATIONS[cfg.activation]
        down = self.dense(
            self.op(kind, up, **attributes), layer + names.down, (cfg.hidden, cfg.inner)
        )
        return self.norm(self.op("Add", down, x), layer + names.out_norm, output)

    def build(self) -> Graph:
        """Return the whole encoder, with the pooler where the checkpoint has one."""
        cfg = self.config
        names = DISTILBERT_NAMES if cfg.family == "distilbert" else BERT_NAMES
        x, mask = self.embed(), self.mask()
        for index in range(cfg.layers):
            x = self.block(x, mask, names, index, _last(index, cfg.layers))
        outputs = [("last_hidden_state", 3)]
        if self.prefix + "pooler.dense.weight" in self.weights:
            first = self.op("Gather", x, self.constant(0, "int64"), axis=1)
            dense = self.dense(first, "pooler.dense", (cfg.hidden, cfg.hidden))
            outputs.append((self.op("Tanh", dense, output="pooler_output"), 2))
        return self.graph([TensorSpec(n, "float32", (None,) * rank) for n, rank in outputs])

    def graph(self, outputs: list[TensorSpec]) -> Graph:
        """Wrap nodes and arrays."""
        names = ["input_ids", "attention_mask"]
        names += ["token_type_ids"] if self.config.family == "bert" else []
        weights = {n: a for n, a in self.arrays.items() if a.size > SMALL and a.dtype.kind != "i"}
        return Graph(
            nodes=own_nodes(self.nodes),
            inputs=tuple(TensorSpec(n, "int64", ("batch", "sequence")) for n in names),
            outputs=tuple(outputs),
            tensors={n: new_tensor(a) for n, a in weights.items()},
            constants={n: a for n, a in self.arrays.items() if n not in weights},
            opset=OPSET,
            stored_dtypes={},
            name=self.config.family,
        )


def _last(index: int, layers: int) -> str | None:
    return "last_hidden_state" if index == layers - 1 else None


ACTIVATIONS: dict[str, tuple[str, dict[str, str]]] = {
    "gelu": ("Gelu", {}),
    "gelu_new": ("Gelu", {"approximate": "tanh"}),
    "gelu_pytorch_tanh": ("Gelu", {"approximate": "tanh"}),
    "relu": ("Relu", {}),
    "tanh": ("Tanh", {}),
}
