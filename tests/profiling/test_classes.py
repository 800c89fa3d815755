"""Every kernel call of a BERT has the class that the paper gives it."""

import numpy as np
import pytest

import tvmstruct
from tvmstruct import pipeline
from tvmstruct.compiler import new_session
from tvmstruct.layers import Embedding, Layer
from tvmstruct.models import config
from tvmstruct.ops import Dense
from tvmstruct.passes.simplify_layout import SimplifyLayout
from tvmstruct.profiling.classes import classify, rank
from tvmstruct.profiling.steps import Step, read_steps, working_set

SIZES = {"seq": 16, "hidden": 64, "heads": 4, "ffn": 128}
ROWS, HIDDEN, FFN = 16, 64, 128
BERT = config("bert", layers=2, vocabulary=100, **SIZES)
LAYER = ["Q/K/V-Gen", "attention (fused)", "attention FC", "linear 1", "linear 2"]


def lowered_of(model_config):
    source = tvmstruct.models.source(model_config)
    session = new_session(tvmstruct.resolve_target("host"))
    return pipeline.lower(source.at(model_config.shapes()), session)


def steps_of(model_config):
    return read_steps(lowered_of(model_config))


@pytest.fixture(scope="module")
def bert():
    return steps_of(BERT)


def classes(steps):
    """Return the classes but for reshapes and the like."""
    return [name for name in classify(steps) if name != "other"]


def test_bert(bert):
    assert classes(bert) == ["embedding (fused)", *LAYER, *LAYER]


def test_flops_of_bert(bert):
    by_class = dict(zip(classify(bert), bert, strict=True))
    assert by_class["Q/K/V-Gen"].flops == 2 * ROWS * HIDDEN * 3 * HIDDEN
    assert by_class["attention (fused)"].flops == 2 * 2 * ROWS * ROWS * HIDDEN
    assert by_class["attention FC"].flops == 2 * ROWS * HIDDEN**2
    assert by_class["linear 1"].flops == by_class["linear 2"].flops == 2 * ROWS * HIDDEN * FFN
    assert by_class["embedding (fused)"].flops == 2 * 3 * ROWS * HIDDEN  # three rows added up


def test_bytes_of_bert(bert):
    by_class = dict(zip(classify(bert), bert, strict=True))
    qkv = ROWS * 3 * HIDDEN  # read once, though it is q, k and v
    assert by_class["attention (fused)"].bytes == 4 * (qkv + ROWS + ROWS * HIDDEN)
    weights = HIDDEN * FFN + FFN
    assert by_class["linear 1"].bytes == 4 * (ROWS * HIDDEN + weights + ROWS * FFN)


def test_a_gather_reads_the_rows_that_it_writes(bert):
    (look_up,) = (step for step in bert if isinstance(step.node, Embedding))
    tables = ROWS * HIDDEN + 2 * HIDDEN + ROWS * HIDDEN  # words, both types, positions
    norm = 2 * HIDDEN
    assert look_up.bytes == 4 * (tables + norm + ROWS * HIDDEN) + 2 * 8 * ROWS


def test_attention_of_generic_kernels(monkeypatch):
    monkeypatch.setattr(pipeline, "FuseAttention", lambda table: SimplifyLayout())
    steps = steps_of(BERT)
    attention = ["dot product", "softmax", "weighted sum", "attention FC"]
    layer = ["Q/K/V-Gen"] * 3 + attention + LAYER[-2:]
    assert sorted(classes(steps)) == sorted(["embedding (fused)", *layer, *layer])
    by_class = dict(zip(classify(steps), steps, strict=True))
    assert by_class["weighted sum"].flops == 2 * ROWS * ROWS * HIDDEN
    assert by_class["dot product"].flops >= 2 * ROWS * ROWS * HIDDEN  # and scale and mask
    assert by_class["softmax"].flops == 5 * SIZES["heads"] * ROWS * ROWS


def test_activation_between_two_layers():
    layer = Layer(("w",), Dense(np.eye(2, dtype=np.float32)))
    nodes = [("a", layer, None), ("reshape", None, 0), ("fused_tanh1", None, 1), ("b", layer, 2)]
    steps = [Step(symbol, node, (i,), 1, 0.0, 0) for symbol, node, i in nodes]
    assert classify(steps) == ["linear 1", "other", "activation", "linear 2"]


def test_a_softmax_over_answers_is_no_attention():
    """A memory network's hops are attention, its last layer and softmax are not."""
    network = config("memory-network", keys=40, hidden=16, answers=10, hops=2, queries=3)
    found = classes(steps_of(network))
    assert found == ["attention (fused)"] * 2


def test_working_set_counts_shared_memory_once():
    keys, hidden = 4096, 16
    network = config("memory-network", keys=keys, hidden=hidden, answers=10, hops=3)
    memory = 4 * 2 * keys * hidden
    assert memory < working_set(lowered_of(network)) < 2 * memory


def test_a_new_node_type_has_a_class_of_its_name():
    class MinimalAttention:
        pass

    (found,) = classify([Step("kernel", MinimalAttention(), (None,), 1, 0.0, 0)])
    assert found == "minimal attention (fused)"
    assert rank("linear 2") < rank(found) < rank("other")
