"""Calling a compiled model: names, defaults, checks, memory, threads, buckets."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from onnx import helper

import tvmstruct
from tests import models
from tests.models import value
from tvmstruct.arrays import aligned_empty
from tvmstruct.buckets import KEEP, Policy, round_up
from tvmstruct.errors import InputError
from tvmstruct.model import CompiledModel
from tvmstruct.testing import tolerance

LONGEST, ROWS = 32, 50  # positions and vocabulary of the encoder
BOUND = tolerance("float32", 256)
node = helper.make_node


@pytest.fixture(scope="module")
def encoder() -> CompiledModel:
    return tvmstruct.compile(tvmstruct.from_onnx(models.encoder_model()))


@pytest.fixture(scope="module")
def mlp() -> CompiledModel:
    return tvmstruct.compile(tvmstruct.from_onnx(models.dense_model()), buckets="exact")


def feeds(batch: int = 2, length: int = 7, seed: int = 0) -> dict[str, np.ndarray]:
    rng = models.rng(seed)
    mask = (np.arange(length) < rng.integers(1, length + 1, (batch, 1))).astype(np.int64)
    return {"input_ids": rng.integers(0, ROWS, (batch, length)), "attention_mask": mask}


def check(model: CompiledModel, inputs: dict[str, np.ndarray]) -> None:
    (want,) = models.run_onnx(models.encoder_model(), inputs)
    np.testing.assert_allclose(model.run(inputs)["hidden"], want, **BOUND)


# names, order, defaults


def test_by_position_by_keyword_and_by_name(encoder):
    inputs = feeds()
    first = encoder(inputs["input_ids"], inputs["attention_mask"])
    assert isinstance(first, np.ndarray)
    for again in (
        encoder(**inputs),
        encoder(inputs["input_ids"], attention_mask=inputs["attention_mask"]),
        encoder.run(inputs)["hidden"],
        encoder.run(dict(reversed(inputs.items())))["hidden"],
    ):
        np.testing.assert_array_equal(first, again)
    check(encoder, inputs)


def test_several_outputs_come_in_the_order_of_the_source():
    nodes = [
        node("Relu", ["x"], ["last"]),
        node("Neg", ["x"], ["first"]),
        node("Exp", ["x"], ["middle"]),
    ]
    outputs = [value(n, ["n", 4]) for n in ("first", "middle", "last")]
    model = compile_graph(nodes, [value("x", ["n", 4])], outputs)
    x = models.rng().normal(size=(3, 4)).astype(np.float32)
    found = model(x)
    assert isinstance(found, tuple)
    for array, want in zip(found, (-x, np.exp(x), np.maximum(x, 0)), strict=True):
        np.testing.assert_allclose(array, want, **tolerance("float32"))
    assert list(model.run({"x": x})) == ["first", "middle", "last"]


def compile_graph(nodes, inputs, outputs, arrays=None, **options) -> CompiledModel:
    source = tvmstruct.from_onnx(models.make_model(nodes, inputs, outputs, arrays))
    return tvmstruct.compile(source, **({"buckets": "exact"} | options))


def test_a_missing_mask_is_all_ones(encoder):
    ids = feeds()["input_ids"]
    full = encoder(ids, np.ones_like(ids))
    np.testing.assert_array_equal(encoder(ids), full)
    np.testing.assert_array_equal(encoder(ids, None), full)
    np.testing.assert_array_equal(encoder.run({"input_ids": ids})["hidden"], full)


def test_missing_token_types_are_zeros():
    table = models.weight(3, 4)
    nodes = [
        node("Gather", ["table", "input_ids"], ["a"]),
        node("Gather", ["table", "token_type_ids"], ["b"]),
        node("Add", ["a", "b"], ["y"]),
    ]
    inputs = [value(n, ["b", "s"], models.INT64) for n in ("input_ids", "token_type_ids")]
    model = compile_graph(nodes, inputs, [value("y", None)], {"table": table})
    ids = np.array([[0, 2, 1]])
    np.testing.assert_array_equal(model(ids), table[ids] + table[0])
    with pytest.raises(InputError, match="input 'input_ids' is missing; the model takes input_ids"):
        model(token_type_ids=ids)


@pytest.mark.parametrize("dtype", ["int32", "int8", "uint8", "uint16", ">i8", "bool"])
def test_ids_of_a_smaller_or_swapped_type_are_accepted(encoder, dtype):
    inputs = feeds()
    ids = inputs["input_ids"] % 2 if dtype == "bool" else inputs["input_ids"]
    want = encoder(ids, inputs["attention_mask"])
    np.testing.assert_array_equal(encoder(ids.astype(dtype), inputs["attention_mask"]), want)


def test_a_list_is_an_array(encoder):
    np.testing.assert_array_equal(encoder([[3, 1, 4]]), encoder(np.array([[3, 1, 4]])))


# errors that name the thing, the values, the fix

IDS = np.zeros((2, 7), np.int64)
WRONG = {
    r"input 'input_ids' has rank 1 \(shape \(7,\)\); the model takes rank 2": lambda m: m(IDS[0]),
    r"input 'input_ids' has rank 3": lambda m: m(IDS[None]),
    r"'input_ids' has dtype float64 \(it holds NaN or infinite values where ids are expected\)": (
        lambda m: m(np.full((2, 7), np.nan))
    ),
    r"dtype float32 \(it holds floats where ids are expected\); .*astype\(\"int64\"\)": (
        lambda m: m(IDS.astype(np.float32))
    ),
    "has dtype uint64; the model takes int64: convert": lambda m: m(IDS.astype(np.uint64)),
    "has dtype complex64": lambda m: m(IDS.astype(np.complex64)),
    "has dtype object": lambda m: m(IDS.astype(object)),
    "input 'input_ids' is a str of dtype": lambda m: m("hello"),
    "input 'input_ids' is no array": lambda m: m([[1, 2], [3]]),
    r"unknown input 'ids'; the model takes input_ids: int64\['batch', 'sequence'\]": (
        lambda m: m.run({"ids": IDS})
    ),
    "unknown input 'mask'": lambda m: m(IDS, mask=IDS),
    "3 arrays given; the model takes": lambda m: m(IDS, IDS, IDS),
    "input 'input_ids' is given by position and by name": lambda m: m(IDS, input_ids=IDS),
    "input 'input_ids' is missing; the model takes": lambda m: m(),
    r"input 'input_ids'\[1, 3\] is -1; ids must be 0 to 49: is the tokenizer": (
        lambda m: m(with_id(-1))
    ),
    r"is 1000000000; ids must be 0 to 49": lambda m: m(with_id(10**9)),
    r"is 50; ids must be 0 to 49": lambda m: m(with_id(50)),
    r"has shape \(0, 7\): axis 0 \(batch\) is empty; give at least one": lambda m: m(IDS[:0]),
    r"has shape \(2, 0\): axis 1 \(sequence\) is empty": lambda m: m(IDS[:, :0]),
    r"sequence is 33, but the model takes at most 32; truncate the input": (
        lambda m: m(np.zeros((1, 33), np.int64))
    ),
    r"'attention_mask' has shape \(2, 6\): axis 1 \(sequence\) is 6 but must be 7": (
        lambda m: m(IDS, IDS[:, :6])
    ),
    r"'attention_mask' has shape \(1, 7\): axis 0 \(batch\) is 1 but must be 2": (
        lambda m: m(IDS, IDS[:1])
    ),
    "'attention_mask' has dtype float32": lambda m: m(IDS, IDS.astype(np.float32)),
}


def with_id(bad: int) -> np.ndarray:
    ids = IDS.copy()
    ids[1, 3] = bad
    return ids


@pytest.mark.parametrize("message", WRONG)
def test_bad_inputs_are_named(encoder, message):
    with pytest.raises(InputError, match=message):
        WRONG[message](encoder)


def test_ids_are_checked_on_the_fast_path_too(encoder):
    encoder(IDS, np.ones_like(IDS))
    with pytest.raises(InputError, match="is -1; ids must be"):
        encoder(with_id(-1), np.ones_like(IDS))


@pytest.mark.parametrize(
    ("shapes", "message"),
    [
        ({"input_ids": (1, 4)}, "no shape for input 'attention_mask'"),
        ({"input_ids": (1, 4), "attention_mask": (1, 5)}, "axis 1"),
        ({"input_ids": (4,), "attention_mask": (4,)}, "rank"),
        ({"input_ids": (1, 4), "attention_mask": (1, 4), "x": (1,)}, "unknown input 'x'"),
        ({"input_ids": (1, 4.5), "attention_mask": (1, 4.5)}, "whole number|integer"),
    ],
)
def test_shapes_to_compile_are_checked(encoder, shapes, message):
    with pytest.raises(InputError, match=message):
        encoder.compile_bucket(shapes)


def test_options_are_checked():
    source = tvmstruct.from_onnx(models.dense_model())
    for options, message in (
        ({"precision": "f31"}, "precision='f31' is unknown; known: f32"),
        ({"skip": 0}, "threshold is 0.0, want a positive distance"),
        ({"buckets": "some"}, 'want "auto", "exact" or a list'),
        ({"buckets": [{"rows": 4}]}, "must give a positive size for each of batch"),
        ({"buckets": [{"batch": 0}]}, "must give a positive size"),
        ({"threads": 0}, "threads=0; want a positive number"),
        ({"threads": "2"}, "threads='2'"),
    ):
        with pytest.raises(InputError, match=message):
            tvmstruct.compile(source, **options)


# memory


def strange_arrays(x: np.ndarray) -> dict[str, np.ndarray]:
    """Return arrays equal to ``x`` that kernels cannot read where they lie."""
    raw = np.zeros(x.nbytes + 64, np.uint8)
    start = -raw.ctypes.data % 64 + x.itemsize
    unaligned = raw[start : start + x.nbytes].view(x.dtype).reshape(x.shape)
    unaligned[:] = x
    odd = np.zeros(x.nbytes + 1, np.uint8)[1:].view(x.dtype).reshape(x.shape)
    odd[:] = x
    frozen = x.copy()
    frozen.flags.writeable = False
    wide = np.zeros((2 * x.shape[0], 3 * x.shape[1]), x.dtype)
    wide[::2, ::3] = x
    return {
        "unaligned": unaligned,
        "half a word off": odd,
        "read-only": frozen,
        "transposed": np.asfortranarray(x),
        "strided": wide[::2, ::3],
        "reversed": x[::-1, ::-1].copy()[::-1, ::-1],
        "broadcast": np.broadcast_to(x[:1], x.shape),
        "a subclass": x.view(np.matrix),
    }


@pytest.mark.parametrize("kind", strange_arrays(np.zeros((2, 2), np.float32)))
def test_inputs_that_lie_badly(mlp, kind, rng):
    x = rng.normal(size=(3, 24)).astype(np.float32)
    strange = strange_arrays(x)[kind]
    x = np.array(strange)
    for _ in range(2):
        np.testing.assert_array_equal(mlp(strange), mlp(x))


@pytest.mark.parametrize("kind", ["aligned", "unaligned", "strided", "transposed", "reversed"])
def test_an_array_that_is_changed_between_calls(mlp, kind, rng):
    x = rng.normal(size=(3, 24)).astype(np.float32)
    array = aligned_empty(x.shape, x.dtype) if kind == "aligned" else strange_arrays(x)[kind]
    array[:] = x
    mlp(array)
    array[:] = 2 * x
    np.testing.assert_array_equal(mlp(array), mlp(2 * x))


def test_outputs_survive_the_next_call(mlp, rng):
    xs = rng.normal(size=(5, 3, 24)).astype(np.float32)
    outputs = [mlp(x) for x in xs]
    copies = [y.copy() for y in outputs]
    for x in xs[::-1]:
        mlp(x)
    for y, copy in zip(outputs, copies, strict=True):
        np.testing.assert_array_equal(y, copy)
    assert not any(np.shares_memory(a, b) for a in outputs for b in outputs if a is not b)


def test_outputs_that_are_inputs_weights_or_one_another_are_copies(rng):
    nodes = [
        node("Identity", ["x"], ["same"]),
        node("Reshape", ["x", "flat"], ["reshaped"]),
        node("Relu", ["x"], ["r"]),
        node("Identity", ["r"], ["again"]),
        node("Identity", ["w"], ["weight"]),
        node("MatMul", ["x", "w"], ["y"]),
    ]
    names = ("same", "reshaped", "r", "again", "weight", "y")
    w = models.weight(24, 8)
    arrays = {"w": w, "flat": np.array([-1])}
    outputs = [value(n, None) for n in names]
    model = compile_graph(nodes, [value("x", [3, 24])], outputs, arrays)
    x = aligned_empty((3, 24), np.float32)
    x[:] = rng.normal(size=x.shape)
    before = x.copy()
    found = model.run({"x": x})
    np.testing.assert_allclose(found["weight"], w)
    for name in names:
        found[name][...] = -1e9  # must reach neither the input, nor the model, nor another output
    np.testing.assert_array_equal(x, before)
    again = model.run({"x": x})
    np.testing.assert_array_equal(again["weight"], w)
    np.testing.assert_array_equal(again["again"], np.maximum(x, 0))
    np.testing.assert_allclose(again["y"], x @ w, **BOUND)


def test_outputs_of_other_types(rng):
    nodes = [
        node("Greater", ["x", "zero"], ["bools"]),
        node("ArgMax", ["x"], ["ints"], axis=1),
        node("Cast", ["x"], ["halves"], to=10),
    ]
    outputs = [value("bools", None, models.BOOL), value("ints", None, models.INT64)]
    outputs.append(value("halves", None, 10))
    model = compile_graph(nodes, [value("x", [3, 24])], outputs, {"zero": np.float32(0)})
    x = rng.normal(size=(3, 24)).astype(np.float32)
    bools, ints, halves = model(x)
    np.testing.assert_array_equal(bools, x > 0, strict=True)
    np.testing.assert_array_equal(ints[:, 0], x.argmax(1), strict=True)
    np.testing.assert_array_equal(halves, x.astype(np.float16), strict=True)


def test_dlpack_inputs(mlp, rng):
    torch = pytest.importorskip("torch")
    x = rng.normal(size=(3, 24)).astype(np.float32)
    want = mlp(x)
    for tensor in (torch.from_numpy(x), torch.from_numpy(x.T.copy()).T, torch.from_numpy(x)[:]):
        np.testing.assert_array_equal(mlp(tensor), want)
    with pytest.raises(InputError, match="input 'x' is no array"):
        mlp(torch.from_numpy(x).requires_grad_())


def test_tvm_tensors_are_inputs(mlp, rng):
    import tvm

    x = rng.normal(size=(3, 24)).astype(np.float32)
    np.testing.assert_array_equal(mlp(tvm.runtime.tensor(x)), mlp(x))


# threads


def test_many_threads_share_a_model(encoder):
    shapes = [(1, 3), (2, 7), (3, 16), (1, 16), (2, 20), (5, 9), (4, 5), (1, 1)]
    cases = [feeds(batch, length, seed) for seed, (batch, length) in enumerate(shapes)]
    want = [models.run_onnx(models.encoder_model(), case)[0] for case in cases]
    start = threading.Barrier(len(cases))

    def work(i: int) -> list[np.ndarray]:
        start.wait()
        return [encoder.run(cases[i])["hidden"] for _ in range(10)]

    with ThreadPoolExecutor(len(cases)) as pool:
        for expected, results in zip(want, pool.map(work, range(len(cases))), strict=True):
            for result in results:
                np.testing.assert_allclose(result, expected, **BOUND)
    notes = encoder.report().notes
    assert len(notes) == len(set(notes)) <= 2


def test_many_threads_share_a_bucket(mlp, rng):
    xs = rng.normal(size=(8, 3, 24)).astype(np.float32)
    want = [mlp(x) for x in xs]
    with ThreadPoolExecutor(8) as pool:
        for _ in range(20):
            for found, expected in zip(pool.map(mlp, xs), want, strict=True):
                np.testing.assert_array_equal(found, expected)


def test_one_thread(rng):
    source = tvmstruct.from_onnx(models.dense_model())
    model = tvmstruct.compile(source, buckets="exact", threads=1)
    x = rng.normal(size=(300, 24)).astype(np.float32)
    (want,) = models.run_onnx(models.dense_model(), {"x": x})
    np.testing.assert_allclose(model(x), want, **BOUND)


# buckets


def test_padded_results_are_exact_results(encoder):
    exact = tvmstruct.compile(tvmstruct.from_onnx(models.encoder_model()), buckets="exact")
    for batch, length in [(9, 11), (5, 13), (11, 29)]:
        inputs = feeds(batch, length, seed=length)
        found, want = encoder.run(inputs)["hidden"], exact.run(inputs)["hidden"]
        assert found.shape == want.shape
        assert found.flags.c_contiguous
        np.testing.assert_allclose(found, want, **BOUND)
    assert ((9, 11), (9, 11)) not in encoder.buckets
    assert ((9, 11), (9, 11)) in exact.buckets
    notes = " ".join(encoder.report().notes)
    assert "batch: padded" in notes
    assert "sequence: padded" in notes


def test_a_row_whose_mask_is_all_zero_is_never_padded(encoder):
    inputs = feeds(2, 11)
    inputs["attention_mask"][1] = 0
    check(encoder, inputs)
    assert ((2, 11), (2, 11)) in encoder.buckets


def pooled(*, masked: bool) -> CompiledModel:
    """Return a model that averages over length; with a mask input that it barely uses."""
    table = models.weight(ROWS, 8)
    nodes = [node("Gather", ["table", "input_ids"], ["e"])]
    inputs = [value("input_ids", ["b", "s"], models.INT64)]
    if masked:
        inputs.append(value("attention_mask", ["b", "s"], models.INT64))
        nodes += [
            node("Cast", ["attention_mask"], ["m"], to=models.FLOAT),
            node("Unsqueeze", ["m", "last"], ["m3"]),
            node("Mul", ["e", "m3"], ["masked"]),
        ]
    mean = "masked" if masked else "e"
    nodes.append(node("ReduceMean", [mean], ["y"], axes=[1], keepdims=0))
    arrays = {"table": table, "last": np.array([2])}
    return compile_graph(nodes, inputs, [value("y", None)], arrays, buckets="auto")


@pytest.mark.parametrize(
    ("masked", "why"), [(False, "no attention mask has this dimension"), (True, "in a probe")]
)
def test_a_result_that_depends_on_the_length_is_never_padded(masked, why):
    model = pooled(masked=masked)
    ids = models.rng().integers(0, ROWS, (3, 11))
    table = models.weight(ROWS, 8)
    np.testing.assert_allclose(model(ids), table[ids].mean(1), **BOUND)
    assert all(key[0][1] == 11 for key in model.buckets if key[0][1] > 8 and key[0][1] != 16)
    notes = {note.split(":")[0]: note for note in model.report().notes}
    assert "exact sizes" in notes["s"]
    assert why in notes["s"]


def test_a_batch_whose_rows_meet_is_never_padded():
    nodes = [node("ReduceMean", ["x"], ["m"], axes=[0]), node("Sub", ["x", "m"], ["y"])]
    model = compile_graph(nodes, [value("x", ["n", 4])], [value("y", ["n", 4])], buckets="auto")
    x = models.rng().normal(size=(11, 4)).astype(np.float32)
    np.testing.assert_allclose(model(x), x - x.mean(0), **tolerance("float32", 16))
    assert "n: exact sizes" in model.report().notes[0]


def test_exact_buckets_are_never_padded():
    model = tvmstruct.compile(tvmstruct.from_onnx(models.dense_model()), buckets="exact")
    model(np.ones((11, 24), np.float32))
    assert list(model.buckets) == [((1, 24),), ((11, 24),)]
    assert all(note.startswith("intermediate results") for note in model.report().notes)


def test_fixed_buckets():
    source = tvmstruct.from_onnx(models.encoder_model())
    sizes = [{"batch": 2, "sequence": 8}, {"batch": 4, "sequence": 16}]
    model = tvmstruct.compile(source, buckets=sizes)
    assert set(model.buckets) == {((2, 8),) * 2, ((4, 16),) * 2}
    for batch, length in [(2, 8), (1, 5), (3, 11), (4, 2)]:
        check(model, feeds(batch, length))
    with pytest.raises(InputError, match=r"no bucket fits .*; the buckets are"):
        model.run(feeds(5, 8))


def test_a_fixed_bucket_over_the_limit_is_refused():
    source = tvmstruct.from_onnx(models.encoder_model())
    with pytest.raises(InputError, match="sequence is 40, but the model takes at most 32"):
        tvmstruct.compile(source, buckets=[{"batch": 1, "sequence": 40}])


def test_the_least_recently_used_bucket_goes_first(monkeypatch):
    monkeypatch.setattr("tvmstruct.model.KEEP", 3)
    model = tvmstruct.compile(tvmstruct.from_onnx(models.dense_model()), buckets="exact")
    x = aligned_empty((9, 24), "float32")  # which takes the shortest way
    x[...] = 1
    for rows in (1, 2, 3):
        model(x[:rows])
    model(x[:1])  # the oldest, but used last
    model(x[:4])
    assert [key[0][0] for key in model.buckets] == [3, 1, 4]
    np.testing.assert_allclose(model(x[:2]), model(x)[:2], **BOUND)


@pytest.mark.parametrize("size", range(1, 300, 7))
def test_sizes_round_up_to_at_most_a_quarter_more(size):
    assert size <= round_up(size) <= max(size + 1, size * 1.25)
    assert round_up(round_up(size)) == round_up(size)


def test_policy_never_rounds_over_the_limit():
    policy = Policy("auto", (), {"s": 300})
    assert policy.padded({"s": 299}, frozenset({"s"})) == {"s": 300}
    assert KEEP >= 16


def test_a_model_of_one_relax_module(rng):
    from tests.relax_modules import R, const, module

    w = models.weight(24, 8)
    model = tvmstruct.compile(module(lambda emit, x: R.matmul(x, const(w)), (5, 24)))
    x = rng.normal(size=(5, 24)).astype(np.float32)
    np.testing.assert_allclose(model(x), x @ w, **BOUND)
    with pytest.raises(InputError, match=r"axis 0 \(5\) is 4 but must be 5"):
        model(x[:4])


def test_code_for_another_cpu_is_never_run():
    from tvmstruct.errors import TargetError
    from tvmstruct.targets import host_features

    if "avx10.2" in host_features():
        pytest.skip("this CPU has every instruction set")
    source = tvmstruct.from_onnx(models.dense_model())
    model = tvmstruct.compile(source, target="llvm -mcpu=diamondrapids", buckets="exact")
    with pytest.raises(TargetError, match="which this CPU does not have"):
        model(np.ones((1, 24), np.float32))


@pytest.mark.parametrize("target", ["llvm -mcpu=x86-64", "llvm -mcpu=haswell"])
def test_other_instruction_sets_give_the_same_results(target):
    from tvmstruct.targets import host_features, resolve

    if not resolve(target).features <= host_features():
        pytest.skip(f"this CPU does not run {target}")
    model = tvmstruct.compile(
        tvmstruct.from_onnx(models.encoder_model()), target=target, buckets="exact"
    )
    check(model, feeds(3, 9))
