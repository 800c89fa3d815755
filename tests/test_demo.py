"""The parts of the demo that need no compiled model."""

from types import SimpleNamespace

import numpy as np
import pytest

from tvmstruct import demo
from tvmstruct.errors import MissingDependencyError, TvmstructError


def encoder(offset=0.0):
    """Return a stand-in whose model adds ``offset`` to what the peer says."""
    feeds = {"input_ids": np.arange(6).reshape(2, 3)}
    return SimpleNamespace(
        hidden=SimpleNamespace(name="states"),
        model=SimpleNamespace(run=lambda given: {"states": peer(given) + offset}),
        batches=lambda sentences: [([0, 1], feeds)],
    )


def peer(feeds):
    return feeds["input_ids"].astype(np.float64)


def test_the_largest_difference_is_found():
    assert demo.largest_difference(encoder(offset=5e-5), peer) == pytest.approx(5e-5)


@pytest.mark.parametrize("offset", [2e-4, np.nan])
def test_a_wrong_result_is_an_error(offset):
    with pytest.raises(TvmstructError, match="differ from ONNX Runtime"):
        demo.largest_difference(encoder(offset), peer)


def test_sentences_come_in_pairs_of_different_lengths():
    assert len(demo.SENTENCES) == len(set(demo.SENTENCES)) == 24
    assert len({len(sentence) for sentence in demo.SENTENCES}) > 12


def test_nearest_neighbours_leave_the_sentence_itself_out():
    vectors = np.repeat(np.eye(12), 2, axis=0)
    found = demo.nearest_neighbours(vectors)
    nearest = [demo.SENTENCES.index(n.nearest) for n in found]
    assert nearest == [row ^ 1 for row in range(24)]


def test_both_sides_take_turns():
    calls = []
    ours, theirs = demo.time_in_turns(
        lambda: calls.append("a"), lambda: calls.append("b"), seconds=0.0
    )
    assert "".join(calls) == "aaaaaabbbbbb" * 2
    assert len(ours) == len(theirs) == 10


def test_a_result_is_plain_data():
    row = demo.Latency("1x16", 1.0, (0.9, 1.1), 2.0, (1.9, 2.1))
    report = SimpleNamespace(to_json=lambda: '{"layers": []}')
    data = demo.Result(2, 1.5, 1e-6, (), (row,), report).to_dict()
    assert data["latency"][0]["ratio"] == 0.5
    assert data["report"] == {"layers": []}


def test_a_missing_package_is_named(monkeypatch):
    monkeypatch.setattr(demo, "MODEL_PACKAGE", "no-such-package-here")
    with pytest.raises(MissingDependencyError, match="no-such-package-here"):
        demo.find_model()


@pytest.mark.slow
def test_neighbours_in_the_real_model_are_the_partners():
    from tvmstruct.sentence import SentenceEncoder

    onnx_runtime = demo.OnnxRuntime(demo.find_model(), "onnx::Shape_422", 2)
    names = ("input_ids", "attention_mask")
    model = SimpleNamespace(
        inputs=[SimpleNamespace(name=n, dtype="int64", shape=(None, None)) for n in names],
        outputs=[SimpleNamespace(name="h", dtype="float32", shape=(None, None, 384))],
        run=lambda feeds: {"h": onnx_runtime(feeds)},
    )
    vectors = SentenceEncoder(model, demo.find_tokenizer()).encode(demo.SENTENCES)
    found = demo.nearest_neighbours(vectors)
    assert [demo.SENTENCES.index(n.nearest) for n in found] == [row ^ 1 for row in range(24)]
