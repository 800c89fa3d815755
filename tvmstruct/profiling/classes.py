"""The operation class of each kernel call: the operations in Table II of NLP-Fast.

What a node is fused from stays one class, named so. The class of a dense layer is its role: what
it feeds and what it reads. Generic kernels are known by the operators in their names.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from tvmstruct.layers import (
    Attention,
    Embedding,
    FeedForward,
    HashTables,
    Layer,
    LayerNorm,
    LayerSequence,
    Node,
    ProjectedAttention,
)
from tvmstruct.profiling.steps import Step

QKV, DOT, SOFTMAX, WEIGHTED = "Q/K/V-Gen", "dot product", "softmax", "weighted sum"
FC, LINEAR_1, ACTIVATION, LINEAR_2 = "attention FC", "linear 1", "activation", "linear 2"
HASH, GATHER = "lookup hash", "lookup gather"  # of LookupFFN, in the place of linear 1 and 2
NORM, OTHER = "LayerNorm", "other"
FUSED: dict[type, str] = {
    Attention: "attention (fused)",
    ProjectedAttention: "attention + FC (fused)",
    FeedForward: "feed-forward (fused)",
    LayerSequence: "layers (fused)",
    HashTables: GATHER,
    LayerNorm: NORM,
    Embedding: "embedding (fused)",
}
ORDER = (
    FUSED[Embedding],
    *(QKV, DOT, SOFTMAX, WEIGHTED, FUSED[Attention], FC, FUSED[ProjectedAttention]),
    *(LINEAR_1, ACTIVATION, LINEAR_2, FUSED[FeedForward], HASH, GATHER, NORM),
)
NORMS = frozenset({"layer_norm", "rms_norm"})
LAYOUT = frozenset("reshape transpose expand dims squeeze cast split strided slice concat".split())


def classify(steps: Sequence[Step]) -> list[str]:
    """Return the class of each step."""
    found: dict[int, str] = {}
    sources = _attention(steps, found)
    for i in sources:  # the layers behind q, k and v
        found.setdefault(i, QKV)
    for step in steps:
        if isinstance(step.node, HashTables):
            found |= dict.fromkeys(_layers(steps, step.reads[:1]), HASH)
    _feed_forward(steps, found)
    return [found.get(i) or _own_class(step) for i, step in enumerate(steps)]


def rank(name: str) -> tuple[int, str]:
    """Return a key that sorts classes as the model runs them, unknown ones before "other"."""
    place = ORDER.index(name) if name in ORDER else len(ORDER) + (name == OTHER)
    return place, name


def _own_class(step: Step) -> str:
    if isinstance(step.node, Layer):
        return OTHER
    if step.node is not None:
        return FUSED.get(type(step.node)) or _fused_name(step.node)
    return NORM if any(norm in step.symbol for norm in NORMS) else OTHER


def _fused_name(node: Node) -> str:
    """Return ``minimal attention (fused)`` for a node of type MinimalAttention."""
    return re.sub(r"(?<=[a-z])(?=[A-Z])", " ", type(node).__name__).lower() + " (fused)"


def _attention(steps: Sequence[Step], found: dict[int, str]) -> list[int]:
    """Class attention that generic kernels run, and what reads any attention.

    Returns the layers that feed queries, keys and values.
    """
    heads: set[int] = set()
    sources: list[int] = []
    for i, step in enumerate(steps):
        if isinstance(step.node, Attention | ProjectedAttention):
            heads |= {i} if isinstance(step.node, Attention) else set()
            sources += _layers(steps, step.reads[:3])
        elif step.node is None and "softmax" in step.words:
            sums = [j for j in range(i, len(steps)) if _sums_up(steps, j, i)]
            products = _before_softmax(steps, i, found) if sums else []
            found |= dict.fromkeys(sums, WEIGHTED)
            heads |= set(sums)
            for j in (*products, *sums):
                sources += _layers(steps, steps[j].reads)
    for i, step in enumerate(steps):
        if isinstance(step.node, Layer) and i not in sources:
            if _source(steps, step.reads[0]) in heads:
                found[i] = FC
    return sources


def _before_softmax(steps: Sequence[Step], softmax: int, found: dict[int, str]) -> list[int]:
    """Class the products whose results reach a softmax, and the generic kernels between."""
    products = {i for i in _reach(steps, softmax) if _is_product(steps[i])}
    for i in _reach(steps, softmax):
        if i in products:
            found[i] = DOT if "softmax" not in steps[i].words else f"{DOT} + {SOFTMAX} (fused)"
        elif products & _reach(steps, i):
            found[i] = SOFTMAX  # scale or mask
    return sorted(products)


def _reach(steps: Sequence[Step], last: int) -> set[int]:
    """Return ``last`` and the generic kernels that it reads, as far back as the next products."""
    seen: set[int] = set()
    waiting = [last]
    while waiting:
        seen.add(i := waiting.pop())
        if not _is_product(steps[i]):
            reads = (j for j in steps[i].reads if j is not None and steps[j].node is None)
            waiting += [j for j in reads if j not in seen]
    return seen


def _is_product(step: Step) -> bool:
    """Return whether a generic kernel multiplies matrices."""
    return step.node is None and "matmul" in step.words


def _sums_up(steps: Sequence[Step], i: int, softmax: int) -> bool:
    """Return whether a step is the product of a softmax and values."""
    return _is_product(steps[i]) and softmax in (_source(steps, j, softmax) for j in steps[i].reads)


def _source(steps: Sequence[Step], i: int | None, stop: int | None = None) -> int | None:
    """Follow generic kernels of one computed argument back to what they make over."""
    while i is not None and i != stop and steps[i].node is None and not _is_product(steps[i]):
        computed = [j for j in steps[i].reads if j is not None]
        i = computed[0] if len(computed) == 1 else None
    return i


def _layers(steps: Sequence[Step], reads: Sequence[int | None]) -> list[int]:
    """Return the layers that ``reads`` come from."""
    made = (_source(steps, i) for i in reads)
    return [i for i in made if i is not None and isinstance(steps[i].node, Layer)]


def _feed_forward(steps: Sequence[Step], found: dict[int, str]) -> None:
    """Class every two layers in a row, and the activation between them."""
    for i, step in enumerate(steps):
        if not isinstance(step.node, Layer) or i in found:
            continue
        up = _source(steps, step.reads[0])
        if up is None or up in found or not isinstance(steps[up].node, Layer):
            continue
        found |= {up: LINEAR_1, i: LINEAR_2}
        between = step.reads[0]
        while between is not None and between != up:
            if set(steps[between].words) - LAYOUT:
                found[between] = ACTIVATION
            between = next(j for j in steps[between].reads if j is not None)
