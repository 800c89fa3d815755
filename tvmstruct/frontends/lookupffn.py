"""Checkpoints of the public LookupFFN code (github.com/mlpen/LookupFFN).

A layer there is ``LayerNorm.{weight,bias}``, ``hash.projection.{weight,bias}`` (dense (h tau, d),
or BH4 (repeats, 4, blocks, b, b)), ``tables`` (h, 2**tau, n) with the most significant bit first,
and ``bias``. BH4 pads d to a power of two and returns ``0.7 bh4(x) + 0.3 repeat(x)``, cropped.

The code's two versions of BH4 disagree. On CUDA, where models are trained, a block maps x to
``w @ x`` and the Hadamard matrix has entries of 1; on the CPU the block is transposed and the
matrix divided by its order. ``convention="cuda"`` is assumed unless "cpu" is asked for.

The whole encoder is RoBERTa with the norm before each block and a LookupFFN in the place of each
feed-forward block. It has no position inputs here: positions count from the padding id on.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from math import sqrt
from pathlib import Path
from typing import Any

import numpy as np
import tvm
from tvm import relax

from tvmstruct.errors import ModelError
from tvmstruct.families.bh4 import DECAY, PAIRS, bh4
from tvmstruct.frontends.checkpoint import Checkpoint, open_checkpoint
from tvmstruct.frontends.lookup import emit_lookup
from tvmstruct.frontends.source import Shape, Source, TensorSpec, new_tensor
from tvmstruct.frontends.validate import SMALL
from tvmstruct.lookup import MOST_BITS, Lookup
from tvmstruct.ops import Dense, Op, next_power_of_two

R = relax.op
CONVENTIONS = ("cuda", "cpu")
WORDS = "embeddings.word_embeddings.weight"
HEAD = 64  # features of a head in the public configurations
HIDDEN = -1000.0  # added to the score of a hidden key
State = str | Path | Mapping[str, Any]


@dataclass(frozen=True)
class LookupLayer:
    """A lookup and the layer normalisation before it."""

    lookup: Lookup
    scale: np.ndarray
    shift: np.ndarray


def read_lookups(
    state: State, *, prefix: str = "", convention: str = "cuda", decay: float = DECAY
) -> dict[str, Lookup]:
    """Return the `Lookup` of every LookupFFN layer whose name begins with ``prefix``.

    ``state`` is a state dict of numpy arrays or PyTorch tensors, a safetensors or PyTorch file,
    or a folder with one. The layer normalisation before a layer is not part of it. Raises
    ModelError for missing tensors, wrong shapes, damaged files, and tables that would not fit
    in memory.
    """
    checkpoint = open_checkpoint(state)
    names = _layers(checkpoint, prefix)
    checkpoint.check_memory([f"{n}tables" for n in names])
    return {n.rstrip("."): _lookup(checkpoint, n, convention, decay) for n in names}


def from_lookupffn(
    state: State,
    *,
    prefix: str | None = None,
    convention: str = "cuda",
    heads: int | None = None,
    decay: float = DECAY,
    epsilon: float = 1e-5,
) -> Source:
    """Return the ``Source`` of an encoder of the public LookupFFN code, or of one layer.

    ``state`` is as in `read_lookups`; a config.json beside the file gives heads, epsilon and
    the padding id. A ``prefix`` that ends at a layer, such as "model.roberta.encoder.layer.0.FFN",
    gives that layer with its norm, of ``x`` (batch, d); otherwise the encoder is read, of
    ``input_ids`` and ``attention_mask`` (batch, sequence). ``heads`` is d / 64 unless given, as
    in all public configurations. ``convention`` is "cuda" or "cpu", see the module.
    """
    checkpoint = open_checkpoint(state)
    config = _read_config(state)
    epsilon = float(config.get("layer_norm_eps", epsilon))
    at = "" if prefix is None else prefix.rstrip(".") + "." * bool(prefix)
    if f"{at}tables" in checkpoint:
        layer = _layer(checkpoint, at, convention, decay)
        return _Weights(epsilon, at).single(layer)
    found = [n[: -len(WORDS)] for n in checkpoint if n.endswith(WORDS) and n.startswith(at)]
    if not found:
        raise ModelError(
            f"{checkpoint.origin}: neither {at + 'tables'!r} nor {at + '...' + WORDS!r} is there; "
            "give the prefix of a LookupFFN layer or of an encoder"
        )
    padding = int(config.get("pad_token_id") or 1)
    heads = heads or config.get("num_attention_heads")
    return _Encoder(checkpoint, found[0], epsilon, heads, padding, convention, decay).source()


def _read_config(state: State) -> dict[str, Any]:
    if isinstance(state, Mapping):
        return {}
    folder = Path(state) if Path(state).is_dir() else Path(state).parent
    path = folder / "config.json"
    if not path.is_file():
        return {}
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ModelError(f"{path}: cannot be read ({error})") from error
    return raw if isinstance(raw, dict) else {}


def _layers(checkpoint: Checkpoint, prefix: str) -> list[str]:
    """Return the prefixes of LookupFFN layers in the order of the checkpoint."""
    ends = [n[: -len("tables")] for n in checkpoint if n == "tables" or n.endswith(".tables")]
    found = [n for n in ends if n.startswith(prefix)]
    if not found:
        raise ModelError(
            f"{checkpoint.origin}: no tensor {prefix + '...tables'!r}; is it of LookupFFN?"
        )
    return found


def _blocks(checkpoint: Checkpoint, at: str) -> list[str]:
    """Return the prefixes of the feed-forward blocks of an encoder, first layer first."""
    found = _layers(checkpoint, at)
    want = [f"{at}{i}.FFN." for i in range(len(found))]
    if missing := sorted(set(want) - set(found)):
        raise ModelError(f"{checkpoint.origin}: tensor '{missing[0]}tables' is missing")
    return want


def _layer(checkpoint: Checkpoint, at: str, convention: str, decay: float) -> LookupLayer:
    lookup = _lookup(checkpoint, at, convention, decay)
    size = (lookup.n_in,)
    norm = [checkpoint.array(f"{at}LayerNorm.{part}", size) for part in ("weight", "bias")]
    return LookupLayer(lookup, *norm)


def _lookup(checkpoint: Checkpoint, at: str, convention: str, decay: float) -> Lookup:
    """Return the lookup of the layer whose tensors begin with ``at``."""
    shape = checkpoint.shape(f"{at}tables")
    if len(shape) != 3 or shape[1] < 2 or shape[1] & (shape[1] - 1) or shape[1] > 1 << MOST_BITS:
        raise ModelError(
            f"{checkpoint.origin}: {at}tables has shape {shape}; want (h, 2**tau, n) with tau "
            f"from 1 to {MOST_BITS}"
        )
    h, rows, n = shape
    bits = h * (rows.bit_length() - 1)
    projection = _projection(checkpoint, at, bits, convention, decay)
    return Lookup(
        projection,
        checkpoint.array(f"{at}tables"),
        checkpoint.array(f"{at}hash.projection.bias", (bits,)),
        checkpoint.array(f"{at}bias", (n,)),
    )


def _projection(checkpoint: Checkpoint, at: str, bits: int, convention: str, decay: float) -> Op:
    """Return the dense projection, or BH4 in a convention of the public code."""
    if convention not in CONVENTIONS:
        raise ModelError(f"convention={convention!r}; want one of {', '.join(CONVENTIONS)}")
    name = f"{at}hash.projection.weight"
    shape, (n_in,) = checkpoint.shape(name), checkpoint.shape(f"{at}LayerNorm.weight")
    if len(shape) == 2:
        return Dense(checkpoint.array(name, (bits, n_in)).T)
    width = next_power_of_two(n_in)
    repeats = max(1, -(-bits // width))
    b = shape[-1]
    want = (repeats, PAIRS, width // b if b else 0, b, b)
    if shape != want or want[2] * b != width:
        raise ModelError(
            f"{checkpoint.origin}: {name} has shape {shape}; for {n_in} inputs, padded to {width}, "
            f"and {bits} bits want ({repeats}, {PAIRS}, {width}/b, b, b) with b a power of two, or "
            f"({bits}, {n_in}) of a dense projection"
        )
    w = checkpoint.array(name)
    if convention == "cpu":
        w = w.swapaxes(-1, -2) / np.float32(width)
    return bh4(w, n_in, bits, decay=decay)


class _Weights:
    """Writes layers into a Relax module; every weight is made once for all shapes."""

    def __init__(self, epsilon: float, prefix: str) -> None:
        self.epsilon, self.prefix = epsilon, prefix
        self.tensors: dict[str, tvm.runtime.Tensor] = {}

    def constant(self, array: np.ndarray, name: str) -> relax.Expr:
        """Return a weight as a constant that holds one tensor for all shapes."""
        name = self.prefix + name
        if name not in self.tensors:
            self.tensors[name] = new_tensor(np.ascontiguousarray(array, np.float32))
        return relax.const(self.tensors[name])

    def named(self) -> dict[str, tvm.runtime.Tensor]:
        """Return the weights that a report names."""
        return {n: t for n, t in self.tensors.items() if t.numel() > SMALL}

    def norm(
        self, bb: relax.BlockBuilder, x: relax.Expr, scale: np.ndarray, shift: np.ndarray, name: str
    ) -> relax.Expr:
        """Return the layer normalisation of the last axis."""
        gamma = self.constant(scale, f"{name}.weight")
        beta = self.constant(shift, f"{name}.bias")
        return bb.emit(R.nn.layer_norm(x, gamma, beta, axes=[-1], epsilon=self.epsilon))

    def lookup(
        self, bb: relax.BlockBuilder, x: relax.Expr, layer: LookupLayer, at: str = ""
    ) -> relax.Expr:
        """Return ``lookup(norm(x))``."""
        x = self.norm(bb, x, layer.scale, layer.shift, f"{at}LayerNorm")
        places = {"projection.weight": "hash.projection.weight"}

        def constant(array: np.ndarray, name: str) -> relax.Expr:
            for short, full in places.items():
                name = name.replace(short, full)
            return self.constant(array, at + name)

        return emit_lookup(bb, x, layer.lookup, constant)

    def single(self, layer: LookupLayer) -> Source:
        """Return a source of ``x`` (batch, d)."""

        def build(shapes: dict[str, Shape]) -> tvm.IRModule:
            bb = relax.BlockBuilder()
            x = relax.Var("x", relax.TensorType(shapes["x"], "float32"))
            return _function(bb, [x], lambda: self.lookup(bb, x, layer))

        build({"x": (1, layer.lookup.n_in)})  # makes the weights
        return Source(
            inputs=(TensorSpec("x", "float32", ("batch", layer.lookup.n_in)),),
            outputs=(TensorSpec("y", "float32", ("batch", layer.lookup.n_out)),),
            tensors=self.named(),
            build=build,
            name="lookupffn",
        )


def _function(bb: relax.BlockBuilder, params: list[relax.Var], body: Any) -> tvm.IRModule:
    with bb.function("main", params):
        with bb.dataflow():
            out = bb.emit_output(body())
        bb.emit_func_output(out)
    return bb.get()


class _Encoder(_Weights):
    """The public code's encoder: embeddings, blocks with the norm before, a norm at the end."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        prefix: str,
        epsilon: float,
        heads: int | None,
        padding: int,
        convention: str,
        decay: float,
    ) -> None:
        super().__init__(epsilon, prefix)
        self.checkpoint, self.padding = checkpoint, padding
        self.vocabulary, self.hidden = checkpoint.shape(prefix + WORDS)
        self.heads = heads or self.hidden // HEAD
        if not self.heads or self.hidden % self.heads:
            raise ModelError(
                f"{checkpoint.origin}: {self.hidden} features and heads={self.heads}; give heads"
            )
        ffns = _blocks(checkpoint, f"{prefix}encoder.layer.")
        checkpoint.check_memory([f"{at}tables" for at in ffns])
        self.ffns = [_layer(checkpoint, at, convention, decay) for at in ffns]
        self.places = checkpoint.shape(f"{prefix}embeddings.position_embeddings.weight")[0]

    def source(self) -> Source:
        """Return a source of input_ids and attention_mask (batch, sequence)."""
        names, shape = ("input_ids", "attention_mask"), ("batch", "sequence")
        self._build({name: (1, 2) for name in names})  # makes the weights
        longest = self.places - self.padding - 1
        return Source(
            inputs=tuple(TensorSpec(name, "int64", shape) for name in names),
            outputs=(TensorSpec("last_hidden_state", "float32", (*shape, self.hidden)),),
            tensors=self.named(),
            build=self._build,
            token_inputs={"input_ids": self.vocabulary},
            find_limits=lambda: {"sequence": longest},
            name="lookupffn",
        )

    def _build(self, shapes: dict[str, Shape]) -> tvm.IRModule:
        bb = relax.BlockBuilder()
        params = [relax.Var(name, relax.TensorType(s, "int64")) for name, s in shapes.items()]
        named = dict(zip(shapes, params, strict=True))
        return _function(
            bb, params, lambda: self._body(bb, named["input_ids"], named["attention_mask"])
        )

    def _body(self, bb: relax.BlockBuilder, ids: relax.Var, mask: relax.Var) -> relax.Expr:
        emit, one = bb.emit, relax.const(1.0, "float32")
        hide = emit(R.subtract(one, emit(R.astype(emit(R.expand_dims(mask, [1, 2])), "float32"))))
        hide = emit(R.multiply(hide, relax.const(HIDDEN, "float32")))
        x = self._embed(bb, ids)
        for index, ffn in enumerate(self.ffns):
            at = f"encoder.layer.{index}."
            x = emit(R.add(self._attend(bb, x, hide, f"{at}attention."), x))
            x = emit(R.add(self.lookup(bb, x, ffn, f"{at}FFN."), x))
        return self._norm(bb, x, "encoder.LayerNorm")

    def _weight(self, name: str, *shape: int) -> relax.Expr:
        if self.prefix + name in self.tensors:
            return relax.const(self.tensors[self.prefix + name])
        return self.constant(self.checkpoint.array(self.prefix + name, shape), name)

    def _norm(self, bb: relax.BlockBuilder, x: relax.Expr, name: str) -> relax.Expr:
        pair = [self._weight(f"{name}.{part}", self.hidden) for part in ("weight", "bias")]
        return bb.emit(R.nn.layer_norm(x, *pair, axes=[-1], epsilon=self.epsilon))

    def _embed(self, bb: relax.BlockBuilder, ids: relax.Var) -> relax.Expr:
        """Words, positions from the padding id on, and the first token type."""
        emit, d, at = bb.emit, self.hidden, "embeddings."
        length = int(ids.ty.shape[1])
        types = self.checkpoint.shape(f"{self.prefix}{at}token_type_embeddings.weight")[0]
        x = emit(R.take(self._weight(WORDS, self.vocabulary, d), ids, axis=0))
        kind = self._weight(f"{at}token_type_embeddings.weight", types, d)
        x = emit(R.add(x, emit(R.strided_slice(kind, [0], [0], [1]))))
        places = self._weight(f"{at}position_embeddings.weight", self.places, d)
        first = self.padding + 1
        used = emit(R.strided_slice(places, [0], [first], [first + length]))
        return self._norm(bb, emit(R.add(x, used)), f"{at}LayerNorm")

    def _dense(self, bb: relax.BlockBuilder, x: relax.Expr, name: str) -> relax.Expr:
        d = self.hidden
        w = bb.emit(R.permute_dims(self._weight(f"{name}.weight", d, d)))
        return bb.emit(R.add(bb.emit(R.matmul(x, w)), self._weight(f"{name}.bias", d)))

    def _attend(
        self, bb: relax.BlockBuilder, x: relax.Expr, hide: relax.Expr, at: str
    ) -> relax.Expr:
        """Attention of ``norm(x)`` on itself and its output projection."""
        emit, d, size = bb.emit, self.hidden, self.hidden // self.heads
        batch, length = (int(hide.ty.shape[i]) for i in (0, 3))
        x = self._norm(bb, x, f"{at}LayerNorm")

        def heads(name: str, axes: list[int]) -> relax.Expr:
            y = self._dense(bb, x, at + name)
            split = emit(R.reshape(y, (batch, length, self.heads, size)))
            return emit(R.permute_dims(split, axes))

        q, k = heads("query", [0, 2, 1, 3]), heads("key", [0, 2, 3, 1])
        scores = emit(R.divide(emit(R.matmul(q, k)), relax.const(sqrt(size), "float32")))
        p = emit(R.nn.softmax(emit(R.add(scores, hide)), axis=-1))
        v = heads("value", [0, 2, 1, 3])
        mixed = emit(R.permute_dims(emit(R.matmul(p, v)), [0, 2, 1, 3]))
        return self._dense(bb, emit(R.reshape(mixed, (batch, length, d))), f"{at}dense")
