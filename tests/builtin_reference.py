"""The built-in models in float64 numpy, from the equations and, where there are any, factors."""

from __future__ import annotations

import functools

import numpy as np
import onnx
from onnx import numpy_helper
from scipy.special import erf

from tvmstruct import models


def arrays_of(model: onnx.ModelProto) -> dict[str, np.ndarray]:
    return {t.name: numpy_helper.to_array(t) for t in model.graph.initializer}


class Reference:
    """The models in float64 numpy, head by head, from the equations of NLP-Fast."""

    def __init__(self, config: models.Config, arrays: dict[str, np.ndarray]) -> None:
        self.config, self.arrays = config, arrays

    def __call__(self, inputs: dict[str, np.ndarray]) -> np.ndarray:
        run = {
            "bert": self.bert,
            "transformer": self.transformer,
            "memory-network": self.memory,
            "t5": T5Reference(self).t5,
            "embedding": lambda inputs: self.table("embeddings.weight")[inputs["input_ids"]],
        }
        return run[self.config.name](inputs)

    def get(self, name: str) -> np.ndarray:
        return self.arrays[name].astype(np.float64)

    def matrix(self, name: str, n_in: int, n_out: int) -> np.ndarray:
        """Return a weight, or the sum of the Kronecker products of its factors, cropped."""
        if name in self.arrays:
            return self.get(name)
        a, b, r = self.get(f"{name}.a"), self.get(f"{name}.b"), self.config.r
        terms = zip(np.split(a, r), np.moveaxis(b.reshape(len(b), -1, r), 2, 0), strict=True)
        return sum(np.kron(x, y) for x, y in terms)[:n_in, :n_out]

    def table(self, name: str) -> np.ndarray:
        """Return a table, or the rows that its word2ketXS factors span, not cropped in rows."""
        if name in self.arrays:
            return self.get(name)
        factors = [self.get(f"{name}.{j}") for j in range(self.config.order)]
        factors = [np.moveaxis(f, 2, 0) for f in factors[:-1]] + [np.moveaxis(factors[-1], 1, 0)]
        terms = (functools.reduce(np.kron, term) for term in zip(*factors, strict=True))
        return sum(terms)[:, : self.config.hidden]

    def dense(self, x: np.ndarray, name: str) -> np.ndarray:
        bias = self.get(f"{name}.bias")
        return x @ self.matrix(f"{name}.weight", x.shape[-1], bias.size) + bias

    def norm(self, x: np.ndarray, name: str, epsilon: float) -> np.ndarray:
        centred = x - x.mean(-1, keepdims=True)
        scaled = centred / np.sqrt((centred**2).mean(-1, keepdims=True) + epsilon)
        return scaled * self.get(f"{name}.weight") + self.get(f"{name}.bias")

    def multi_head(self, x, memory, keep, names) -> np.ndarray:
        """Eq. 2 with scores over the root of the head size; ``keep`` is (batch, queries, keys)."""
        query, key, value = (
            self.dense(source, name)
            for source, name in zip((x, memory, memory), names, strict=False)
        )
        size = self.config.hidden // self.config.heads
        heads = []
        for start in range(0, self.config.hidden, size):
            q, k, v = (part[..., start : start + size] for part in (query, key, value))
            scores = q @ k.swapaxes(1, 2) / np.sqrt(size)
            heads.append(softmax(np.where(keep, scores, -np.inf)) @ v)
        return self.dense(np.concatenate(heads, -1), names[3])

    def bert(self, inputs) -> np.ndarray:
        x = inputs.get("hidden")
        if x is None:
            x = self.table("embeddings.word_embeddings.weight")[inputs["input_ids"]]
            x = x + self.get("embeddings.token_type_embeddings.weight")[inputs["token_type_ids"]]
            x = x + self.get("embeddings.position_embeddings.weight")[: x.shape[1]]
            x = self.norm(x, "embeddings.LayerNorm", 1e-12)
        keep = inputs["attention_mask"][:, None, :] == 1
        for i in range(self.config.layers):
            at = f"encoder.layer.{i}"
            names = [f"{at}.attention.self.{n}" for n in ("query", "key", "value")]
            z = self.multi_head(x, x, keep, [*names, f"{at}.attention.output.dense"])
            x = self.norm(x + z, f"{at}.attention.output.LayerNorm", 1e-12)
            wide = self.dense(x, f"{at}.intermediate.dense")
            wide = wide * (1 + erf(wide / np.sqrt(2))) / 2
            x = self.norm(
                x + self.dense(wide, f"{at}.output.dense"), f"{at}.output.LayerNorm", 1e-12
            )
        return x

    def transformer(self, inputs) -> np.ndarray:
        if self.config.embeddings:
            names = ["shared"] * 2
            if self.config.target_vocabulary is not None:
                names = ["encoder.embed_tokens", "decoder.embed_tokens"]
            ids = [inputs[name] for name in ("input_ids", "decoder_input_ids")]
            x, y = (self.embed(i, f"{n}.weight") for i, n in zip(ids, names, strict=True))
        else:
            x, y = inputs["hidden"], inputs["decoder_hidden"]
        keep = inputs["attention_mask"][:, None, :] == 1
        causal = np.tril(np.ones((1, y.shape[1], y.shape[1]), bool))
        for i in range(self.config.layers):
            at = f"encoder.layers.{i}"
            x = self.attended(x, x, keep, f"{at}.self_attn")
            x = self.fed_forward(x, at)
        for i in range(self.config.layers):
            at = f"decoder.layers.{i}"
            y = self.attended(y, y, causal, f"{at}.self_attn")
            y = self.attended(y, x, keep, f"{at}.encoder_attn")
            y = self.fed_forward(y, at)
        return y

    def embed(self, ids: np.ndarray, words: str) -> np.ndarray:
        """Words times sqrt(d), plus sin(p / 10000^(2i/d)) and cos in turns."""
        d = self.config.hidden
        x = self.table(words)[ids] * np.sqrt(d)
        for p in range(ids.shape[1]):
            for i in range(0, d, 2):
                angle = p / 10000 ** (i / d)
                x[:, p, i] += np.sin(angle)
                x[:, p, i + 1] += np.cos(angle)
        return x

    def attended(self, x, memory, keep, at: str) -> np.ndarray:
        names = [f"{at}.{n}_proj" for n in ("q", "k", "v", "out")]
        return self.norm(x + self.multi_head(x, memory, keep, names), f"{at}_layer_norm", 1e-5)

    def fed_forward(self, x: np.ndarray, at: str) -> np.ndarray:
        wide = np.maximum(self.dense(x, f"{at}.fc1"), 0)
        return self.norm(x + self.dense(wide, f"{at}.fc2"), f"{at}.final_layer_norm", 1e-5)

    def memory(self, inputs) -> np.ndarray:
        """Eq. 1 in each hop, its result added to the query; then the answer layer."""
        stored = self.config.stored
        keys = self.get("memory.keys") if stored else inputs["keys"].astype(np.float64)
        values = self.get("memory.values") if stored else inputs["values"].astype(np.float64)
        u = inputs["queries"].astype(np.float64)
        for _ in range(self.config.hops):
            u = u + softmax(u @ keys.T) @ values
        return softmax(self.dense(u, "answer"))


class T5Reference:
    """T5 (Raffel et al.): norms by the mean square before each layer, unscaled scores."""

    def __init__(self, model: Reference) -> None:
        self.model, self.config = model, model.config

    def dense(self, x: np.ndarray, name: str, n_out: int) -> np.ndarray:
        y = x @ self.model.matrix(f"{name}.weight", x.shape[-1], n_out)
        bias = f"{name}.bias"
        return y + self.model.get(bias) if bias in self.model.arrays else y

    def norm(self, x: np.ndarray, name: str) -> np.ndarray:
        size = np.sqrt((x**2).mean(-1, keepdims=True) + 1e-6)
        return x / size * self.model.get(f"{name}.weight")

    def t5(self, inputs) -> np.ndarray:
        words = self.model.table("shared.weight")
        x, y = words[inputs["input_ids"]], words[inputs["decoder_input_ids"]]
        keep = inputs["attention_mask"][:, None, :] == 1
        causal = np.tril(np.ones((1, y.shape[1], y.shape[1]), bool))
        near = self.distances("encoder", x.shape[1], both=True)
        for i in range(self.config.layers):
            at = f"encoder.block.{i}.layer"
            x = x + self.attend(x, None, keep, near, f"{at}.0", "SelfAttention")
            x = x + self.feed_forward(x, f"{at}.1")
        x = self.norm(x, "encoder.final_layer_norm")
        near = self.distances("decoder", y.shape[1], both=False)
        for i in range(self.config.layers):
            at = f"decoder.block.{i}.layer"
            y = y + self.attend(y, None, causal, near, f"{at}.0", "SelfAttention")
            nowhere = np.zeros((self.config.heads, 1, 1))
            y = y + self.attend(y, x, keep, nowhere, f"{at}.1", "EncDecAttention")
            y = y + self.feed_forward(y, f"{at}.2")
        return self.norm(y, "decoder.final_layer_norm")

    def attend(self, x, memory, keep, near, at: str, kind: str) -> np.ndarray:
        d, size = self.config.hidden, self.config.hidden // self.config.heads
        inner = self.norm(x, f"{at}.layer_norm")
        sources = {"q": inner, "k": inner, "v": inner}
        if memory is not None:
            sources |= {"k": memory, "v": memory}
        made = {n: self.dense(s, f"{at}.{kind}.{n}", d) for n, s in sources.items()}
        heads = []
        for h in range(self.config.heads):
            q, k, v = (part[..., h * size : (h + 1) * size] for part in made.values())
            scores = q @ k.swapaxes(1, 2) + near[h]
            heads.append(softmax(np.where(keep, scores, -np.inf)) @ v)
        return self.dense(np.concatenate(heads, -1), f"{at}.{kind}.o", d)

    def feed_forward(self, x: np.ndarray, at: str) -> np.ndarray:
        inner = self.norm(x, f"{at}.layer_norm")
        wide = np.maximum(self.dense(inner, f"{at}.DenseReluDense.wi", self.config.ffn), 0)
        return self.dense(wide, f"{at}.DenseReluDense.wo", self.config.hidden)

    def distances(self, stack: str, length: int, *, both: bool) -> np.ndarray:
        """Return (heads, queries, keys) by the logarithmic buckets of the paper's code."""
        name = f"{stack}.block.0.layer.0.SelfAttention.relative_attention_bias.weight"
        table = self.model.get(name)
        out = np.empty((self.config.heads, length, length))
        for q in range(length):
            for k in range(length):
                out[:, q, k] = table[relative_bucket(k - q, both=both)]
        return out


def relative_bucket(ahead: int, *, both: bool, buckets: int = 32, farthest: int = 128) -> int:
    """Return the bucket of a key that lies ``ahead`` of its query."""
    first, distance = 0, max(-ahead, 0)
    if both:
        buckets //= 2
        first, distance = (buckets if ahead > 0 else 0), abs(ahead)
    exact = buckets // 2
    if distance < exact:
        return first + distance
    steps = np.log(distance / exact) / np.log(farthest / exact) * (buckets - exact)
    return first + min(exact + int(steps + 1e-9), buckets - 1)


def softmax(x: np.ndarray) -> np.ndarray:
    e = np.exp(x - x.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)
