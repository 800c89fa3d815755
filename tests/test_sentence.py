"""SentenceEncoder on a model small enough to check by hand."""

from types import SimpleNamespace

import numpy as np
import pytest

from tvmstruct.errors import InputError, ModelError
from tvmstruct.sentence import SentenceEncoder, hidden_output, mean_pool

tokenizers = pytest.importorskip("tokenizers")

WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "a", "b", "c", "d", "e"]
RNG = np.random.default_rng(0)
TABLE = RNG.normal(size=(len(WORDS), 6)).astype(np.float32)


class FakeModel:
    """Hidden states are table rows; at padding they are huge, as a compiled model's may be."""

    def __init__(self, inputs=("input_ids", "attention_mask", "token_type_ids"), dtype="int64"):
        self.inputs = [spec(name, dtype, ("batch", "length")) for name in inputs]
        self.outputs = [
            spec("ids", "int64", ("batch", "length", 6)),
            spec("pooled", "float32", ("batch", 6)),
            spec("states", "float32", (None, None, 6)),
        ]
        self.calls = []

    def run(self, feeds):
        self.calls.append(feeds)
        hidden = TABLE[feeds["input_ids"]]
        if "attention_mask" in feeds:
            hidden = hidden + 1e6 * (1 - feeds["attention_mask"][..., None])
        return {"ids": feeds["input_ids"], "pooled": hidden[:, 0], "states": hidden}


def spec(name, dtype, shape):
    return SimpleNamespace(name=name, dtype=dtype, shape=shape)


@pytest.fixture
def tokenizer_json(tmp_path):
    vocabulary = {word: number for number, word in enumerate(WORDS)}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    tokenizer.post_processor = tokenizers.processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    tokenizer.enable_padding(length=40)
    path = tmp_path / "tokenizer.json"
    tokenizer.save(str(path))
    return path


def by_hand(sentence):
    ids = [2, *(WORDS.index(word) for word in sentence.split()), 3]
    mean = TABLE[ids].mean(axis=0)
    return mean / np.linalg.norm(mean)


SENTENCES = ["a b c d e", "b", "", "e e", "c a a a b b a c", "d"]


@pytest.mark.parametrize("batch_size", [1, 2, 4, 100])
def test_vectors_are_the_masked_mean_in_the_order_given(tokenizer_json, batch_size):
    encoder = SentenceEncoder(FakeModel(), tokenizer_json)
    vectors = encoder.encode(SENTENCES, batch_size=batch_size)
    assert vectors.dtype == np.float32
    expected = np.stack([by_hand(sentence) for sentence in SENTENCES])
    np.testing.assert_allclose(vectors, expected, rtol=1e-5, atol=1e-6)


def test_batches_are_padded_to_their_own_longest_row(tokenizer_json):
    model = FakeModel()
    SentenceEncoder(model, tokenizer_json).encode(SENTENCES, batch_size=3)
    assert [call["input_ids"].shape for call in model.calls] == [(3, 3), (3, 10)]


def test_inputs_have_the_dtype_and_the_names_of_the_model(tokenizer_json):
    model = FakeModel(inputs=("input_ids", "attention_mask"), dtype="int32")
    SentenceEncoder(model, tokenizer_json).encode(["a b"])
    assert {name: str(x.dtype) for name, x in model.calls[0].items()} == {
        "input_ids": "int32",
        "attention_mask": "int32",
    }


def test_long_sentences_are_cut(tokenizer_json):
    model = FakeModel()
    SentenceEncoder(model, tokenizer_json, max_length=5).encode(["a b c d e e e e e"])
    np.testing.assert_array_equal(model.calls[0]["input_ids"], [[2, 4, 5, 6, 3]])


def test_nothing_gives_no_rows(tokenizer_json):
    assert SentenceEncoder(FakeModel(), tokenizer_json).encode([]).shape == (0, 6)


def test_a_model_without_mask_takes_equal_lengths_only(tokenizer_json):
    encoder = SentenceEncoder(FakeModel(inputs=("input_ids",)), tokenizer_json)
    np.testing.assert_allclose(encoder.encode(["a b", "c d"])[1], by_hand("c d"), rtol=1e-5)
    with pytest.raises(ModelError, match="batch_size=1"):
        encoder.encode(["a", "b c"])


@pytest.mark.parametrize("sentences", ["one string", ["a", 3], [None]])
def test_only_a_list_of_strings_is_taken(tokenizer_json, sentences):
    with pytest.raises(InputError, match="sentences"):
        SentenceEncoder(FakeModel(), tokenizer_json).encode(sentences)


def test_batch_size_must_be_positive(tokenizer_json):
    with pytest.raises(InputError, match="batch_size"):
        SentenceEncoder(FakeModel(), tokenizer_json).encode(["a"], batch_size=0)


def test_a_tokenizer_must_be_a_tokenizer_json(tmp_path):
    with pytest.raises(InputError, match="no file"):
        SentenceEncoder(FakeModel(), tmp_path / "missing.json")
    (tmp_path / "other.json").write_text("{}")
    with pytest.raises(InputError, match=r"not a tokenizer\.json"):
        SentenceEncoder(FakeModel(), tmp_path / "other.json")


def test_a_strange_input_is_named(tokenizer_json):
    with pytest.raises(ModelError, match="pixels"):
        SentenceEncoder(FakeModel(inputs=("input_ids", "pixels")), tokenizer_json)


def test_hidden_states_are_the_float_output_of_rank_three():
    outputs = FakeModel().outputs
    assert hidden_output(outputs).name == "states"
    last = spec("last_hidden_state", "float32", (None, None, 6))
    assert hidden_output([*outputs, last]) is last
    with pytest.raises(ModelError, match="pooled float32 rank 2"):
        hidden_output(outputs[:2])


def test_mean_pool_of_a_row_without_tokens_is_zero():
    np.testing.assert_array_equal(mean_pool(np.ones((1, 2, 3)), np.zeros((1, 2))), [[0, 0, 0]])
