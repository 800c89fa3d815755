"""One attention, many spellings: what exporters and people make of it in ONNX."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import pairwise

import numpy as np
from onnx import ModelProto, helper

from tests import models

B, H, Q, K, D = 2, 3, 5, 7, 20  # rectangular; the depth is no multiple of a vector
F = H * D
ROOT = math.sqrt(D)
LOWEST = float(np.finfo(np.float32).min)
HIDE = [[0, 0, 0, 0, 0, 1, 1], [0, 0, 1, 1, 1, 1, 1]]  # ragged padding
LEFT = [[0] * 7, [1, 1, 1, 0, 0, 0, 0]]  # under a causal mask the first queries see no key


@dataclass
class Builder:
    """Collects the nodes, inputs and constants of a model."""

    nodes: list = field(default_factory=list)
    inputs: dict[str, np.ndarray] = field(default_factory=dict)
    arrays: dict[str, np.ndarray] = field(default_factory=dict)

    def op(self, kind: str, *args: str, **attributes) -> str:
        """Add a node and return the name of its output."""
        out = f"t{len(self.nodes)}"
        self.nodes.append(helper.make_node(kind, args, [out], **attributes))
        return out

    def const(self, value, dtype: str = "float32") -> str:
        """Add a constant and return its name."""
        name = f"c{len(self.arrays)}"
        self.arrays[name] = np.asarray(value, dtype)
        return name

    def given(self, array: np.ndarray) -> str:
        """Add an input with this value and return its name."""
        name = f"x{len(self.inputs)}"
        self.inputs[name] = array
        return name

    def random(self, *shape: int, scale: float = 1.0) -> str:
        """Add an input of normal values."""
        rng = models.rng(len(self.inputs) + 11)
        return self.given((scale * rng.normal(size=shape)).astype(np.float32))

    def reshape(self, x: str, *shape: int) -> str:
        """Reshape to a constant shape."""
        return self.op("Reshape", x, self.const(shape, "int64"))

    def project(self, x: str, features: int = F) -> str:
        """Apply a dense layer to 60 features."""
        seed = len(self.arrays)
        y = self.op("MatMul", x, self.const(models.weight(F, features, seed=seed)))
        return self.op("Add", y, self.const(models.weight(features, seed=seed + 50)))

    def heads(self, x: str, length: int, axes=(0, 2, 1, 3), heads: int = H) -> str:
        """Split the last axis into heads and bring them forward."""
        return self.op("Transpose", self.reshape(x, B, length, heads, D), perm=axes)

    def merged(self, y: str) -> str:
        """Put the heads of a result side by side again."""
        return self.reshape(self.op("Transpose", y, perm=(0, 2, 1, 3)), B, -1, F)

    def build(self, output: str) -> ModelProto:
        """Return the model."""
        given = [
            models.value(n, a.shape, helper.np_dtype_to_tensor_dtype(a.dtype))
            for n, a in self.inputs.items()
        ]
        return models.make_model(self.nodes, given, [models.value(output, None)], self.arrays)


@dataclass(frozen=True)
class Spelling:
    """A model, its inputs and what the report must say of its one attention."""

    name: str
    build: Callable[[Builder], str]
    shape: tuple[int, int] = (H, D)
    says: tuple[str, ...] = ("mask none",)

    def model(self) -> tuple[ModelProto, dict[str, np.ndarray]]:
        """Return the model and its inputs."""
        builder = Builder()
        return builder.build(self.build(builder)), builder.inputs


SPELLINGS: list[Spelling] = []


def spelling(**expected):
    """Register a function of a builder under its name."""

    def register(build):
        SPELLINGS.append(Spelling(build.__name__, build, **expected))
        return build

    return register


def cross(b: Builder, axes_of_keys=(0, 2, 3, 1), *, layers: bool = False) -> tuple[str, str, str]:
    """Return queries of one input, transposed keys and values of another; with layers if asked."""
    x, y = b.random(B, Q, F), b.random(B, K, F)
    q, k, v = (b.project(x), b.project(y), b.project(y)) if layers else (x, y, b.random(B, K, F))
    return b.heads(q, Q), b.heads(k, K, axes_of_keys), b.heads(v, K)


def attend(b: Builder, q: str, k: str, v: str, *steps: Callable[[str], str]) -> str:
    """Write out softmax(steps(q k)) v."""
    scores = b.op("MatMul", q, k)
    for step in steps:
        scores = step(scores)
    return b.op("MatMul", b.op("Softmax", scores, axis=-1), v)


def over_root(b: Builder) -> Callable[[str], str]:
    """Divide by the root of the depth."""
    return lambda scores: b.op("Div", scores, b.const(ROOT))


def padding(b: Builder, low: float, hide=HIDE) -> str:
    """Return (1 - mask) * low, as (batch, 1, 1, keys), of an input of integers."""
    keep = b.op("Cast", b.reshape(b.given(1 - np.array(hide)), B, 1, 1, K), to=models.FLOAT)
    return b.op("Mul", b.op("Sub", b.const(1.0), keep), b.const(low))


def hidden(b: Builder) -> str:
    """Return a Boolean (batch, 1, 1, keys) that is true where a key is hidden."""
    return b.op("Cast", b.reshape(b.given(np.array(HIDE)), B, 1, 1, K), to=models.BOOL)


# Where the scale stands


@spelling(says=("mask keys", "; k, v from one merged layer"))
def bert_eager(b):
    """Scores are divided, then an additive mask."""
    mask = padding(b, LOWEST)
    q, k, v = cross(b, layers=True)
    return b.merged(attend(b, q, k, v, over_root(b), lambda s: b.op("Add", s, mask)))


@spelling()
def scale_on_queries(b):
    """As T5-like and BART-like exports do."""
    q, k, v = cross(b)
    return b.merged(attend(b, b.op("Mul", q, b.const(1 / ROOT)), k, v))


@spelling(says=("mask none", "q, k, v from one merged layer"))
def scale_on_queries_before_heads(b):
    """The scale right after the projection."""
    x = b.random(B, Q, F)
    q = b.heads(b.op("Div", b.project(x), b.const([ROOT])), Q)
    k, v = b.heads(b.project(x), Q, (0, 2, 3, 1)), b.heads(b.project(x), Q)
    return b.merged(attend(b, q, k, v))


@spelling(says=("mask none", "k, v from one merged layer"))
def scale_on_keys(b):
    """The scale on the keys, before they are transposed."""
    q, k, v = cross(b, (0, 2, 1, 3), layers=True)
    k = b.op("Transpose", b.op("Mul", b.const(1 / ROOT), k), perm=(0, 1, 3, 2))
    return b.merged(attend(b, q, k, v))


@spelling(says=("mask full",))
def sdpa_export(b):
    """PyTorch's scaled_dot_product_attention in ONNX: the root of the scale on both."""
    q, k, v = cross(b, (0, 2, 1, 3))
    root = b.op("Sqrt", b.op("Div", b.const(1.0), b.op("Sqrt", b.const(float(D)))))
    q = b.op("Mul", q, root)
    k = b.op("Mul", b.op("Transpose", k, perm=(0, 1, 3, 2)), root)
    mask = b.random(B, 1, Q, K)
    return b.merged(attend(b, q, k, v, lambda s: b.op("Add", s, mask)))


# Masks


@spelling(says=("mask keys",))
def distilbert_masked_fill(b):
    """Hidden scores are replaced by the lowest number."""
    mask = b.op("Expand", hidden(b), b.const((B, H, Q, K), "int64"))
    low = b.const(LOWEST)
    return b.merged(attend(b, *cross(b), over_root(b), lambda s: b.op("Where", mask, low, s)))


@spelling(says=("mask keys",))
def masked_fill_with_infinity(b):
    """Hidden scores are replaced by -inf, spelled as scores that are kept."""
    keep = b.op("Not", hidden(b))
    low = b.const(-np.inf)
    return b.merged(attend(b, *cross(b), lambda s: b.op("Where", keep, s, low), over_root(b)))


@spelling(says=("mask keys",))
def tensorflow_additive(b):
    """``(1 - mask) * -10000`` first in the sum, scale multiplied."""
    mask = padding(b, -10000.0)
    steps = (lambda s: b.op("Mul", s, b.const(1 / ROOT)), lambda s: b.op("Add", mask, s))
    return b.merged(attend(b, *cross(b), *steps))


@spelling(says=("mask keys",))
def mask_before_the_scale(b):
    """``(q k + mask) / root``; the mask is scaled as well."""
    mask = padding(b, -10000.0)
    return b.merged(attend(b, *cross(b), lambda s: b.op("Add", s, mask), over_root(b)))


@spelling(says=("mask keys",))
def subtracted_mask(b):
    """``scores - 10000 * hide``."""
    hide = b.op("Mul", b.op("Cast", hidden(b), to=models.FLOAT), b.const(10000.0))
    return b.merged(attend(b, *cross(b), over_root(b), lambda s: b.op("Sub", s, hide)))


@spelling(says=("mask full",))
def relative_position_bias(b):
    """T5: no scale, a bias for each head that a table holds, and a padding mask."""
    far = np.clip(np.arange(K) - np.arange(Q)[:, None], -3, 3) + 3
    table = b.const(models.weight(7, H, seed=5))
    bias = b.op("Transpose", b.op("Gather", table, b.const(far, "int64")), perm=(2, 0, 1))
    bias = b.op("Unsqueeze", bias, b.const([0], "int64"))
    mask = b.op("Add", bias, padding(b, LOWEST))
    return b.merged(attend(b, *cross(b), lambda s: b.op("Add", s, mask)))


@spelling(says=("mask full",))
def two_masks(b):
    """A padding mask, and a bias of the distance."""
    bias, mask = b.random(1, H, Q, K), padding(b, -10000.0)
    steps = (lambda s: b.op("Add", s, bias), lambda s: b.op("Add", s, mask))
    return b.merged(attend(b, *cross(b), over_root(b), *steps))


@spelling(says=("mask keys",))
def floor_under_the_mask(b):
    """OPT: ``max(scores + mask, lowest)`` on merged heads."""
    q, k, v = cross(b, (0, 2, 1, 3))
    q, k, v = (b.reshape(x, B * H, n, D) for x, n in ((q, Q), (k, K), (v, K)))
    mask = padding(b, LOWEST)
    scores = b.reshape(b.op("MatMul", q, b.op("Transpose", k, perm=(0, 2, 1))), B, H, Q, K)
    scores = b.op("Max", b.op("Add", scores, mask), b.const(LOWEST))
    p = b.op("Softmax", b.reshape(scores, B * H, Q, K), axis=-1)
    return b.merged(b.reshape(b.op("MatMul", p, v), B, H, Q, D))


@spelling(says=("mask none", "causal"))
def causal_of_trilu(b):
    """An upper triangle of -inf is added."""
    upper = b.op("Trilu", b.const(np.full((Q, K), -np.inf)), b.const(1, "int64"), upper=1)
    return b.merged(attend(b, *cross(b), over_root(b), lambda s: b.op("Add", s, upper)))


@spelling(says=("mask none", "causal"))
def causal_of_ranges(b):
    """Keys up to the query are kept, others replaced by the lowest number."""
    zero, one = b.const(0, "int64"), b.const(1, "int64")
    rows = b.op("Range", zero, b.const(Q, "int64"), one)
    columns = b.op("Range", zero, b.const(K, "int64"), one)
    keep = b.op("LessOrEqual", columns, b.op("Unsqueeze", rows, b.const([1], "int64")))
    low = b.const(LOWEST)
    return b.merged(attend(b, *cross(b), over_root(b), lambda s: b.op("Where", keep, s, low)))


@spelling(says=("mask keys", "causal"))
def causal_and_padding(b):
    """An upper triangle of -inf, and hidden keys."""
    upper, mask = b.const(np.triu(np.full((Q, K), -np.inf), 1)), padding(b, -10000.0, LEFT)
    steps = (lambda s: b.op("Add", s, upper), lambda s: b.op("Add", s, mask))
    return b.merged(attend(b, *cross(b), over_root(b), *steps))


@spelling(says=("mask full",))
def causal_of_small_numbers(b):
    """GPT-2 of old adds -10000: scores that differ by as much see through it, so it stays."""
    upper = b.const(np.triu(np.full((Q, K), -1e4), 1))
    return b.merged(attend(b, *cross(b), over_root(b), lambda s: b.op("Add", s, upper)))


@spelling(says=("mask full",))
def causal_aligned_at_the_end(b):
    """The last query sees all keys, as with keys of earlier steps."""
    upper = b.const(np.triu(np.full((Q, K), -np.inf), 1 + K - Q))
    return b.merged(attend(b, *cross(b), over_root(b), lambda s: b.op("Add", s, upper)))


@spelling(says=("mask full",))
def finite_causal_and_padding(b):
    """GPT-2: a row may be hidden by both, so the finite numbers keep their arithmetic."""
    keep, low = b.const(np.tri(Q, K), "bool"), b.const(LOWEST)
    mask = padding(b, LOWEST, LEFT)
    steps = (lambda s: b.op("Where", keep, s, low), lambda s: b.op("Add", s, mask))
    return b.merged(attend(b, *cross(b), over_root(b), *steps))


@spelling(says=("mask full", "causal"))
def causal_with_distances(b):
    """ALiBi: distances under the diagonal, -inf above it."""
    far = np.arange(K) - np.arange(Q)[:, None]
    slopes = np.array([0.5, 0.25, 0.125])[:, None, None]
    bias = b.const(np.where(far > 0, -np.inf, slopes * far)[None])
    return b.merged(attend(b, *cross(b), over_root(b), lambda s: b.op("Add", s, bias)))


@spelling(says=("mask full",))
def mask_of_queries(b):
    """The same for all keys: it changes nothing but rounding, and the graph's is kept."""
    mask = b.random(B, 1, Q, 1)
    return b.merged(attend(b, *cross(b), over_root(b), lambda s: b.op("Add", s, mask)))


@spelling(says=("mask full",))
def rows_without_keys(b):
    """Boolean masks define rows without any key as zeros; ONNX Runtime gives NaN."""
    keep = np.ones((B, 1, Q, K), bool)
    keep[0, :, 2] = keep[1, :, :, 3:] = False
    mask, low = b.given(keep), b.const(-np.inf)
    return b.merged(attend(b, *cross(b), over_root(b), lambda s: b.op("Where", mask, s, low)))


@spelling(says=("mask keys",))
def nan_guard(b):
    """Newer PyTorch: rows without any key become NaN, and NaN becomes zero."""
    q, k, v = cross(b)
    keep = b.given(np.array([[[[False] * K]], [[[True] * 4 + [False] * 3]]]))
    scores = b.op("Add", b.op("MatMul", q, k), b.op("Where", keep, b.const(0.0), b.const(-np.inf)))
    p = b.op("Softmax", scores, axis=-1)
    return b.merged(b.op("MatMul", b.op("Where", b.op("IsNaN", p), b.const(0.0), p), v))


# Layouts


@spelling(shape=(B * H, D), says=("mask full",))
def merged_heads(b):
    """Sequence first and batch times heads in one axis, as nn.MultiheadAttention."""
    x, y = b.random(Q, B, F), b.random(K, B, F)

    def heads(t, length):
        return b.op("Transpose", b.reshape(b.project(t), length, B * H, D), perm=(1, 0, 2))

    q, k, v = heads(x, Q), heads(y, K), heads(y, K)
    q = b.op("Div", q, b.const(ROOT))
    scores = b.op("MatMul", q, b.op("Transpose", k, perm=(0, 2, 1)))
    scores = b.op("Add", b.reshape(scores, B, H, Q, K), padding(b, -1e9))
    p = b.op("Softmax", b.reshape(scores, B * H, Q, K), axis=2)
    return b.reshape(b.op("Transpose", b.op("MatMul", p, v), perm=(1, 0, 2)), Q, B, F)


@spelling(says=("mask none", "k, v from one merged layer"))
def einsum(b):
    """Heads stay behind the length, einsum moves them."""
    x, y = b.random(B, Q, F), b.random(B, K, F)
    q = b.reshape(b.project(x), B, Q, H, D)
    k, v = (b.reshape(b.project(y), B, K, H, D) for _ in range(2))
    scores = over_root(b)(b.op("Einsum", q, k, equation="bqhd,bkhd->bhqk"))
    p = b.op("Softmax", scores, axis=-1)
    return b.reshape(b.op("Einsum", p, v, equation="bhqk,bkhd->bqhd"), B, Q, F)


@spelling()
def einsum_with_keys_first(b):
    """The operands the other way round."""
    q, k, v = cross(b, (0, 2, 1, 3))
    scores = over_root(b)(b.op("Einsum", k, q, equation="bhkd,bhqd->bhqk"))
    return b.merged(b.op("Einsum", v, b.op("Softmax", scores), equation="bhkd,bhqk->bhqd"))


@spelling()
def keys_arrive_transposed(b):
    """An input of keys as (batch, heads, depth, keys)."""
    q, v = b.random(B, H, Q, D), b.random(B, H, K, D)
    return attend(b, q, b.random(B, H, D, K), v, over_root(b))


@spelling(shape=(1, D))
def one_head_of_rank_three(b):
    """(batch, length, depth)."""
    q, k, v = b.random(B, Q, D), b.random(B, K, D), b.random(B, K, 8)
    return attend(b, q, b.op("Transpose", k, perm=(0, 2, 1)), v, over_root(b))


@spelling(shape=(1, D))
def memory_network(b):
    """Questions and a story, without batch or heads."""
    q, k, v = b.random(Q, D), b.random(K, D), b.random(K, D)
    return b.op("Add", attend(b, q, b.op("Transpose", k), v), q)


@spelling(shape=(1, D))
def learned_memory(b):
    """Keys and values are weights."""
    q = b.random(B, Q, D)
    k, v = b.const(models.weight(D, 33, seed=1)), b.const(models.weight(33, 12, seed=2))
    return attend(b, q, k, v, over_root(b))


@spelling()
def learned_memory_for_each_head(b):
    """Keys and values are weights without a batch."""
    q = b.heads(b.project(b.random(B, Q, F)), Q)
    k = b.const(np.stack([models.weight(D, K, seed=s) for s in range(H)]))
    v = b.const(np.stack([models.weight(K, D, seed=s) for s in range(H)]))
    return b.merged(attend(b, q, k, v))


@spelling()
def one_token(b):
    """A single query and a single key: every axis of length one."""
    q, k, v = (b.heads(b.project(b.random(B, 1, F)), 1) for _ in range(3))
    return b.merged(attend(b, q, b.op("Transpose", k, perm=(0, 1, 3, 2)), v, over_root(b)))


# Softmax


@spelling(says=("mask keys",))
def softmax_written_out(b):
    """exp(x - max) / sum."""
    q, k, v = cross(b)
    scores = b.op("Add", over_root(b)(b.op("MatMul", q, k)), padding(b, -10000.0))
    top = b.op("ReduceMax", scores, axes=[-1], keepdims=1)
    weights = b.op("Exp", b.op("Sub", scores, top))
    total = b.op("ReduceSum", weights, b.const([-1], "int64"), keepdims=1)
    return b.merged(b.op("MatMul", b.op("Div", weights, total), v))


@spelling()
def softmax_among_idle_operators(b):
    """Dropout, Identity and casts to the type at hand."""
    q, k, v = cross(b)
    scores = b.op("Cast", over_root(b)(b.op("MatMul", q, k)), to=models.FLOAT)
    p = b.op("Identity", b.op("Cast", b.op("Softmax", scores, axis=-1), to=models.FLOAT))
    return b.merged(b.op("MatMul", b.op("Dropout", p), v))


@spelling(says=("mask keys",))
def softmax_of_rows(b):
    """Opset 12 and before: flattened to (batch * heads * queries, keys)."""
    q, k, v = cross(b)
    scores = b.op("Add", over_root(b)(b.op("MatMul", q, k)), padding(b, -10000.0))
    p = b.op("Softmax", b.reshape(scores, B * H * Q, K), axis=1)
    return b.merged(b.op("MatMul", b.reshape(p, B, H, Q, K), v))


# Heads that share keys and values


@spelling(says=("1 key head",))
def one_key_head_broadcast(b):
    """Multi-query attention: MatMul broadcasts the head."""
    q = b.heads(b.project(b.random(B, Q, F)), Q)
    y = b.random(B, K, F)
    k = b.heads(b.project(y, D), K, (0, 2, 3, 1), heads=1)
    return b.merged(attend(b, q, k, b.heads(b.project(y, D), K, heads=1), over_root(b)))


def grouped(b: Builder, repeat: Callable[[str], str], kv_heads: int = 2, heads: int = 4) -> str:
    """Attention of 4 heads over 2 key heads that ``repeat`` brings to 4."""
    q = b.heads(b.project(b.random(B, Q, F), heads * D), Q, heads=heads)
    y = b.random(B, K, F)
    k, v = (b.heads(b.project(y, kv_heads * D), K, heads=kv_heads) for _ in range(2))
    k = b.op("Transpose", repeat(k), perm=(0, 1, 3, 2))
    out = attend(b, q, k, repeat(v), over_root(b))
    return b.reshape(b.op("Transpose", out, perm=(0, 2, 1, 3)), B, Q, heads * D)


@spelling(shape=(4, D), says=("2 key heads", "; k, v from one merged layer"))
def grouped_by_expand(b):
    """Hugging Face's repeat_kv."""

    def repeat(x):
        x = b.op("Unsqueeze", x, b.const([2], "int64"))
        return b.reshape(b.op("Expand", x, b.const((B, 2, 2, K, D), "int64")), B, 4, K, D)

    return grouped(b, repeat)


@spelling(shape=(4, D), says=("2 key heads",))
def grouped_by_gather(b):
    """repeat_interleave as an index."""
    return grouped(b, lambda x: b.op("Gather", x, b.const([0, 0, 1, 1], "int64"), axis=1))


@spelling(shape=(4, D), says=("2 key heads",))
def grouped_by_tile(b):
    """Round after round: query head h reads key head h % 2."""
    return grouped(b, lambda x: b.op("Tile", x, b.const([1, 2, 1, 1], "int64")))


@spelling(shape=(4, D), says=("2 key heads", "mask keys"))
def grouped_in_five_axes(b):
    """(batch, key heads, group, length, depth), keys broadcast over the group."""
    q = b.reshape(b.project(b.random(B, Q, F), 4 * D), B, Q, 2, 2, D)
    q = b.op("Transpose", q, perm=(0, 2, 3, 1, 4))
    y = b.random(B, K, F)
    k, v = (b.heads(b.project(y, 2 * D), K, heads=2) for _ in range(2))
    two = b.const([2], "int64")
    k = b.op("Unsqueeze", b.op("Transpose", k, perm=(0, 1, 3, 2)), two)
    mask = b.op("Unsqueeze", padding(b, -10000.0), two)
    out = attend(b, q, k, b.op("Unsqueeze", v, two), over_root(b), lambda s: b.op("Add", s, mask))
    return b.reshape(b.op("Transpose", out, perm=(0, 3, 1, 2, 4)), B, Q, 4 * D)


# Slices of one layer


@spelling(says=("q, k, v from one merged layer", "causal"))
def split_of_one_layer(b):
    """GPT-2: one layer, three parts, causal."""
    rows = b.project(b.random(B, Q, F), 3 * F)
    parts = [f"part{i}" for i in range(3)]
    b.nodes.append(helper.make_node("Split", [rows, b.const([F] * 3, "int64")], parts, axis=2))
    axes = ((0, 2, 1, 3), (0, 2, 3, 1), (0, 2, 1, 3))
    q, k, v = (b.heads(part, Q, order) for part, order in zip(parts, axes, strict=True))
    upper = b.const(np.triu(np.full((Q, Q), -np.inf), 1))
    return b.merged(attend(b, q, k, v, over_root(b), lambda s: b.op("Add", s, upper)))


@spelling(says=("q, k, v from one merged layer",))
def gather_of_one_layer(b):
    """Vision transformers: (3, batch, heads, length, depth), picked one by one."""
    rows = b.reshape(b.project(b.random(B, Q, F), 3 * F), B, Q, 3, H, D)
    rows = b.op("Transpose", rows, perm=(2, 0, 3, 1, 4))
    q, k, v = (b.op("Gather", rows, b.const(i, "int64"), axis=0) for i in range(3))
    k = b.op("Transpose", k, perm=(0, 1, 3, 2))
    return b.merged(attend(b, q, k, v, over_root(b)))


@spelling(shape=(4, D), says=("q, k, v from one merged layer", "2 key heads"))
def slices_of_unequal_parts(b):
    """Four query heads, and two key and value heads behind them."""
    rows = b.project(b.random(B, Q, F), 8 * D)
    ends = (0, 4 * D, 6 * D, 8 * D)
    q, k, v = (
        b.op("Slice", rows, *(b.const([n], "int64") for n in (*cut, 2))) for cut in pairwise(ends)
    )
    two = b.const([0, 0, 1, 1], "int64")
    q = b.heads(q, Q, heads=4)
    k, v = (b.op("Gather", b.heads(x, Q, heads=2), two, axis=1) for x in (k, v))
    out = attend(b, q, b.op("Transpose", k, perm=(0, 1, 3, 2)), v, over_root(b))
    return b.reshape(b.op("Transpose", out, perm=(0, 2, 1, 3)), B, Q, 4 * D)


@spelling(says=("q, k, v from separate layers",))
def slices_of_every_head(b):
    """GPT-NeoX: queries, keys and values of a head side by side; they are taken apart first."""
    rows = b.reshape(b.project(b.random(B, Q, F), 3 * F), B, Q, H, 3 * D)
    rows = b.op("Transpose", rows, perm=(0, 2, 1, 3))
    parts = [f"part{i}" for i in range(3)]
    b.nodes.append(helper.make_node("Split", [rows, b.const([D] * 3, "int64")], parts, axis=3))
    k = b.op("Transpose", parts[1], perm=(0, 1, 3, 2))
    return b.merged(attend(b, parts[0], k, parts[2], over_root(b)))


@spelling(says=("mask none",))
def some_of_the_keys(b):
    """Keys and values of the first positions only."""
    q, k, v = cross(b)
    first = [b.const([n], "int64") for n in (0, 4)]
    k = b.op("Slice", k, *first, b.const([3], "int64"))
    return b.merged(attend(b, q, k, b.op("Slice", v, *first, b.const([2], "int64"))))


@spelling(says=("mask none", "q, k, v from separate layers"))
def one_slice(b):
    """Keys are a part of a layer whose rest nothing reads: it must not merge as a whole layer."""
    x = b.random(B, Q, F)
    wide = b.project(x, 2 * F)
    k = b.op("Slice", wide, *(b.const([n], "int64") for n in (F, 2 * F, 2)))
    return b.merged(attend(b, b.heads(b.project(x), Q), b.heads(k, Q, (0, 2, 3, 1)), b.heads(k, Q)))
