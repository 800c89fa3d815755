"""The built-in models: the numbers of the paper's equations, sizes, seeds and refusals."""

from __future__ import annotations

import json

import numpy as np
import onnx
import pytest

import tvmstruct
from tests.builtin_reference import Reference, arrays_of
from tests.models import run_onnx
from tvmstruct import cli, models
from tvmstruct.arrays import ALIGNMENT
from tvmstruct.errors import InputError, ModelError
from tvmstruct.frontends.huggingface import BERT_NAMES
from tvmstruct.models.graph import MOST_BYTES
from tvmstruct.testing import tolerance

SMALL = "hidden=32&heads=2&ffn=48&seq=7"
CASES = {
    "bert": f"bert?{SMALL}&layers=2&vocabulary=50",
    "bert, layers alone": f"bert?{SMALL}&layers=2&embeddings=false",
    "transformer": f"transformer?{SMALL}&layers=2&vocabulary=50",
    "transformer, layers alone": f"transformer?{SMALL}&layers=1&embeddings=false",
    "bert, factored": f"bert?{SMALL}&layers=1&vocabulary=150&form=kronecker&r=2&r_embedding=3",
    "transformer, factored": f"transformer?{SMALL}&layers=1&vocabulary=150&target_vocabulary=131"
    "&form=kronecker&r=3&r_embedding=2&order=3",
    "bert, phm": f"bert?{SMALL}&layers=1&embeddings=false&form=phm&r=4",
    "t5": f"t5?{SMALL}&layers=1&vocabulary=50",
    "t5, factored": f"t5?{SMALL}&layers=1&vocabulary=150&form=kronecker&r=2&r_embedding=3"
    "&attention_bias=true",
    "embedding": "embedding?hidden=13&seq=5&vocabulary=50",
    "embedding, factored": "embedding?hidden=13&seq=5&vocabulary=650&form=kronecker&order=4"
    "&r_embedding=2",
    "memory network, factored": "memory-network?keys=131&hidden=64&answers=36&queries=3"
    "&form=kronecker&r=2",
    "memory network": "memory-network?keys=131&hidden=24&answers=17&queries=3",
    "memory network, stored": "memory-network?keys=131&hidden=24&answers=17&stored=true",
}


def small(name: str, **options: int | bool) -> models.Config:
    return models.config(name, **{"hidden": 32, "heads": 2, "ffn": 48, "seq": 7, **options})


@pytest.mark.parametrize("text", CASES.values(), ids=CASES)
def test_numbers_are_those_of_the_paper_and_of_onnx_runtime(text):
    pytest.importorskip("onnxruntime")
    config = models.parse(text)
    model = models.build(config, seed=4)
    onnx.checker.check_model(model)
    inputs = config.inputs(batch=3, seed=5)
    want = Reference(config, arrays_of(model))(inputs)
    bound = tolerance("float32", config.hidden)
    np.testing.assert_allclose(run_onnx(model, inputs)[0], want, **bound)
    compiled = tvmstruct.compile(models.source(config, seed=4), buckets="exact")
    np.testing.assert_allclose(compiled(**inputs), want, **bound)
    forms = [x.form for x in compiled.report().layers if x.name.startswith("attention.")]
    assert forms == ["attention"] * attentions(config)  # every one fused


def test_distances_of_t5_share_buckets_beyond_the_shorter_ones():
    pytest.importorskip("onnxruntime")
    config = models.parse("t5?hidden=16&heads=2&ffn=24&seq=150&layers=1&vocabulary=50")
    model, inputs = models.build(config, seed=4), config.inputs()
    want = Reference(config, arrays_of(model))(inputs)
    np.testing.assert_allclose(run_onnx(model, inputs)[0], want, **tolerance("float32", 16))


def attentions(config: models.Config) -> int:
    """Return how many attentions a model has: a decoder layer has two."""
    counts = {"bert": 1, "transformer": 3, "t5": 3}
    if config.name not in counts:
        return config.hops if config.name == "memory-network" else 0
    return config.layers * counts[config.name]


def test_a_factored_model_holds_no_matrix():
    config = small("bert", layers=1, vocabulary=900, form="kronecker", r=2, r_embedding=3)
    model = tvmstruct.compile(models.source(config), buckets="exact")
    model.run(config.inputs())
    layers = {x.name: x for x in model.report().layers if x.form == "kronecker"}
    assert len(layers) == 6
    query = layers["encoder.layer.0.attention.self.query.weight"]
    assert (query.shape, query.params) == ((32, 32), 2 * 2 * 6 * 6)
    (words,) = (x for x in model.report().layers if x.form == "word2ket_xs")
    assert (words.name, words.params) == ("embeddings.word_embeddings.weight", 2 * 3 * 30 * 6)
    (bucket,) = (b for key, b in model.buckets.items() if key[0] == (1, 7))
    largest = max(weight.numpy().size for weight in bucket.weights)
    assert largest <= max(512 * 32, 30 * 6 * 3)  # positions, which stay dense; a factor of words
    assert sum(w.numpy().size for w in bucket.weights) < 32 * 900


def test_ids_over_the_vocabulary_are_refused_where_factors_have_rows_for_more():
    config = models.parse("embedding?hidden=13&seq=5&vocabulary=50&form=kronecker&r_embedding=1")
    assert config.storage.table(50, 13) == (8, 4)
    source = models.source(config)
    assert source.token_inputs == {"input_ids": 50}
    read = tvmstruct.from_onnx(models.build(config))
    assert read.token_inputs == {"input_ids": 64}  # a file does not say more
    model = tvmstruct.compile(source, buckets="exact")
    assert model(np.full((1, 2), 49)).shape == (1, 2, 13)
    with pytest.raises(InputError, match="ids must be 0 to 49"):
        model(np.full((1, 2), 50))


def test_padding_of_the_source_changes_nothing():
    pytest.importorskip("onnxruntime")
    config = small("transformer", layers=1, vocabulary=50)
    model, inputs = models.build(config), config.inputs(batch=3)
    hidden = inputs["attention_mask"] == 0
    assert hidden.any(1).all()
    other = inputs | {"input_ids": np.where(hidden, 1, inputs["input_ids"])}
    assert (other["input_ids"] != inputs["input_ids"]).any()
    np.testing.assert_array_equal(run_onnx(model, inputs)[0], run_onnx(model, other)[0])


def test_a_target_is_read_from_left_to_right():
    pytest.importorskip("onnxruntime")
    config = small("transformer", layers=1, vocabulary=50)
    model, inputs = models.build(config), config.inputs()
    other = inputs | {"decoder_input_ids": inputs["decoder_input_ids"].copy()}
    other["decoder_input_ids"][0, 4] += 1 if other["decoder_input_ids"][0, 4] < 49 else -1
    before, after = run_onnx(model, inputs)[0], run_onnx(model, other)[0]
    np.testing.assert_array_equal(before[:, :4], after[:, :4])
    assert (before[:, 4:] != after[:, 4:]).all(axis=-1).all()


def test_the_command_line_runs_them(capsys):
    with pytest.raises(SystemExit) as exit_info:
        cli.main(["run", f"random:{CASES['bert']}", "--json"])
    assert not exit_info.value.code
    (output,) = json.loads(capsys.readouterr().out)["outputs"]
    assert (output["name"], output["shape"]) == ("last_hidden_state", [1, 7, 32])


def test_the_report_counts_parameters_by_part(capsys):
    model = "random:embedding?form=kronecker&order=4&r_embedding=1&seq=3"
    for options in ([], ["--json"]):
        with pytest.raises(SystemExit) as exit_info:
            cli.main(["report", model, *options])
        assert not exit_info.value.code
    table, _, found = capsys.readouterr().out.partition("{")
    assert "norms and biases included: total 380, embedding 380" in table
    assert json.loads("{" + found)["counts"] == {"total": 380, "embedding": 380}


def test_batch_and_lengths_are_dynamic():
    config = small("transformer", layers=1, vocabulary=50)
    model = tvmstruct.compile(models.source(config), buckets="exact")
    assert [spec.shape for spec in model.inputs] == [
        ("batch", "source"),
        ("batch", "source"),
        ("batch", "target"),
    ]
    ids = np.ones((2, 3), np.int64)
    assert model(ids, decoder_input_ids=np.ones((2, 5), np.int64)).shape == (2, 5, 32)


@pytest.mark.parametrize("name", ["bert", "transformer"])
def test_activations_stay_normal_in_any_depth(name):
    pytest.importorskip("onnxruntime")
    config = small(name, layers=24, hidden=64, ffn=256, seq=33, vocabulary=100)
    model = models.build(config)
    out = run_onnx(model, config.inputs())[0]
    assert 0.8 < out.std() < 1.25
    assert np.abs(out).max() < 10
    for array in arrays_of(model).values():
        small_values = np.abs(array[array != 0]).min(initial=1)
        assert small_values >= np.finfo(np.float32).tiny


def test_the_answers_of_a_memory_network_are_probabilities():
    config = models.config("memory-network", keys=5000, queries=2)
    out = run_onnx(models.build(config), config.inputs(batch=2))[0]
    assert out.shape == (4, 1000)
    np.testing.assert_allclose(out.sum(1), 1, rtol=1e-5)


def test_the_memory_is_one_input_and_is_not_copied():
    config = models.config("memory-network", keys=3000)
    model = tvmstruct.compile(models.source(config), buckets="exact")
    inputs = config.inputs()
    model.run(inputs)
    bucket = model.buckets[tuple(inputs[s.name].shape for s in model.inputs)]
    own = [bucket._runner().tensor(i, inputs[s.name])[1] for i, s in enumerate(model.inputs)]
    assert own == [True, True, True]


def test_base_sizes_are_those_of_table_iv():
    memory, transformer, bert, *_ = map(models.config, models.MODELS)
    assert (memory.hidden, memory.hops, memory.queries) == (64, 3, 1)
    for config in (transformer, bert):
        sizes = (config.seq, config.hidden, config.ffn, config.hidden // config.heads)
        assert sizes == (256, 1024, 4096, 64)
    assert (transformer.layers, bert.layers) == (6, 24)
    assert bert.params == pytest.approx(334e6, rel=0.01)  # BERT-large without its pooler
    paper = models.config("memory-network", keys=100_000_000)
    assert paper.shapes()["keys"] == (100_000_000, 64)


def test_a_variant_is_four_times_one_size():
    for suffix, axis in models.VARIANTS.items():
        for name in ("bert", "transformer"):
            variant, base = models.config(f"{name}-{suffix}"), models.config(name)
            layers = base.variant["layers"]
            assert variant == models.config(name, layers=layers).scaled(axis, 4)
            assert variant.hidden // variant.heads == 64
    assert models.config("bert-s4x").seq == 1024
    assert models.config("bert-h4x", layers=1).hidden == 4096
    assert models.config("transformer-f4x").ffn == 16384
    assert models.config("memory-network-s4x").shapes()["values"] == (400_000, 64)
    assert models.config("memory-network-h4x").hidden == 256


def test_every_name_fits_into_one_message():
    names = list(models.names())
    assert len(names) == len(set(names)) == 18 + len(models.PRESETS)
    assert all(4 * models.config(name).params < MOST_BYTES for name in names)


@pytest.mark.parametrize("text", CASES.values(), ids=CASES)
def test_parameters_are_counted(text):
    config = models.parse(text)
    arrays = arrays_of(models.build(config))
    assert config.params == sum(a.size for n, a in arrays.items() if "constant" not in n)


def test_a_seed_and_a_name_decide_a_weight():
    shallow, deep = (small("bert", layers=n, vocabulary=50) for n in (1, 2))
    first, again = models.build(shallow, 1), models.build(shallow, 1)
    assert first.SerializeToString() == again.SerializeToString()
    deeper, other = arrays_of(models.build(deep, 1)), arrays_of(models.build(shallow, 2))
    name = "encoder.layer.0.attention.self.query.weight"
    np.testing.assert_array_equal(arrays_of(first)[name], deeper[name])
    assert (arrays_of(first)[name] != other[name]).all()
    assert (deeper[name] != deeper[name.replace("query", "key")]).all()


def test_weights_are_called_as_by_hugging_face():
    arrays = arrays_of(models.build(small("bert", layers=1, vocabulary=50)))
    at = BERT_NAMES.layer.format(0)
    parts = {n for n in vars(BERT_NAMES).values() if n != BERT_NAMES.layer}
    assert {f"{at}{part}.{kind}" for part in parts for kind in ("weight", "bias")} <= set(arrays)


def test_inputs_are_random_reproducible_and_in_range():
    config = small("bert", vocabulary=50)
    inputs, again, other = config.inputs(4), config.inputs(4), config.inputs(4, seed=1)
    assert {n: a.shape for n, a in inputs.items()} == config.shapes(4)
    assert {a.ctypes.data % ALIGNMENT for a in inputs.values()} == {0}
    for name, array in inputs.items():
        np.testing.assert_array_equal(array, again[name])
    assert (inputs["input_ids"] != other["input_ids"]).any()
    assert inputs["input_ids"].min() >= 0
    assert inputs["input_ids"].max() < 50
    mask = inputs["attention_mask"]
    assert (mask[:, :4] == 1).all()
    assert (mask.sum(1) < 7).all()
    assert small("bert", seq=1).inputs()["attention_mask"].tolist() == [[1]]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: models.config("bert-s8x"), "no built-in model 'bert-s8x'; there are: memory"),
        (lambda: models.config("bert", depth=2), "unknown option 'depth'; known: seq, hidden"),
        (lambda: models.config("bert", seq=0), "seq is 0, want an integer of 1 or more"),
        (lambda: models.config("bert", seq=2.5), "seq is 2.5, want an integer"),
        (lambda: models.config("bert", layers=True), "layers is True, want an integer"),
        (lambda: models.config("bert", embeddings=1), "embeddings is 1, want True or False"),
        (lambda: models.config("bert", heads=3), "no multiple of heads 3; heads=2 would divide"),
        (lambda: models.config("transformer", heads=7), "no multiple of heads 7; heads=4"),
        (lambda: models.config("transformer", hidden=9, heads=3), "hidden 9 is odd"),
        (lambda: models.parse("bert?form=tensor"), "form is 'tensor', want one of dense, kron"),
        (lambda: models.parse("bert?form=kronecker&order=7"), "order is 7, want 2 to 6"),
        (lambda: models.parse("bert?r=0"), "r is 0, want an integer of 1 or more"),
        (
            lambda: models.build(models.parse("bert?form=phm&r=3")),
            "1024x1024 .* not split into r",
        ),
        (lambda: models.config("memory-network-f4x"), "memory-network has no feed-forward size"),
        (lambda: models.config("bert").scaled("depth", 4), "unknown axis 'depth'; known: seq"),
        (lambda: models.config("bert").scaled("seq", 0), "seq is 0"),
        (lambda: models.config("bert").shapes(0), "batch is 0, want 1 or more"),
        (lambda: models.build(models.config("bert"), -1), "seed is -1, want 0 or more"),
        (lambda: models.config("bert").inputs(seed=-1), "seed is -1, want 0 or more"),
    ],
    ids=lambda x: x if isinstance(x, str) else "",
)
def test_refusals_name_the_value_and_the_fix(call, message):
    with pytest.raises(InputError, match=message):
        call()


@pytest.mark.parametrize(
    ("name", "options", "fix"),
    [
        ("bert-h4x", {"layers": 24}, "10.2 GB .* take fewer layers, such as layers=2"),
        ("transformer-h4x", {"layers": 6}, "GB .* take fewer layers, such as layers=1"),
        ("memory-network", {"keys": 10**8, "stored": True}, "51.2 GB .* stored=False"),
    ],
)
def test_a_model_over_the_limit_of_onnx_is_refused_before_it_is_made(name, options, fix):
    with pytest.raises(ModelError, match=fix):
        models.build(models.config(name, **options))
