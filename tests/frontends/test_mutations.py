"""Mutated ONNX files: a named error, or a source that behaves."""

import random
import threading
import warnings
from functools import cache

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from onnx import ModelProto

from tests import models
from tests.recurrent_models import Node, branch_model, recurrent_model
from tvmstruct.errors import TvmstructError
from tvmstruct.frontends import from_onnx

SECONDS = 30


@cache
def originals():
    return [models.encoder_model(13), models.dense_model(17), models.gemm_model(0, 1, 0.5, 2.0)]


@cache
def recurrent():
    gru = Node("GRU", "bidirectional", states=True, lengths=[2, 5, 1], activations=["Elu"] * 4)
    return [recurrent_model(gru), recurrent_model(Node(peepholes=True, clip=0.5)), branch_model()]


def mutate(seed, models=None):
    """Flip bytes, cut, repeat or overwrite a small model (weights are mostly spared)."""
    pick = random.Random(seed)
    model = (models or originals())[seed % 3]
    data = bytearray(model.SerializeToString())
    header = [i for i in range(len(data)) if i < 600 or i > len(data) - 400]
    kind = pick.choice(["flip", "flip", "bits", "cut", "drop", "repeat"])
    place = pick.choice(header) if pick.random() < 0.7 else pick.randrange(len(data))
    if kind == "cut":
        return bytes(data[:place])
    if kind == "drop":
        del data[place : place + pick.randrange(1, 9)]
    elif kind == "repeat":
        data[place:place] = data[place : place + pick.randrange(1, 40)]
    else:
        for _ in range(pick.randrange(1, 5)):
            place = min(len(data) - 1, place + pick.randrange(0, 9))
            data[place] ^= pick.randrange(1, 256) if kind == "flip" else 1 << pick.randrange(8)
    return bytes(data)


def load(data):
    """Return source, input shapes and module; None where refused. Only named errors may escape."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            source = from_onnx(data)
            sizes = {s: 3 + i for i, s in enumerate(source.dims)}
            shapes = {
                s.name: tuple(sizes[d] if isinstance(d, str) else d for d in s.shape)
                for s in source.inputs
            }
            return source, shapes, source.at(shapes)
        except TvmstructError:
            return None


def behaves(data):
    return load(data) is not None


def run(seeds, models=None):
    """Load every mutant in a daemon thread, so that a hang fails the test."""
    results, errors = [], []

    def work():
        try:
            results.extend(behaves(mutate(seed, models)) for seed in seeds)
        except BaseException as error:
            errors.append((seed_of(results, seeds), error))

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    thread.join(SECONDS + len(seeds) / 10)
    assert not thread.is_alive(), f"a mutant hangs near seed {seed_of(results, seeds)}"
    assert not errors, errors
    return results


def seed_of(results, seeds):
    return seeds[min(len(results), len(seeds) - 1)]


def test_originals_are_accepted():
    assert all(behaves(m.SerializeToString()) for m in originals() + recurrent())


def test_mutated_files():
    results = run(range(60))
    assert not all(results)


def test_mutated_recurrent_files():
    results = run(range(60), recurrent())
    assert not all(results)


@pytest.mark.slow
@pytest.mark.parametrize("kind", [originals, recurrent])
def test_2000_mutated_files(kind):
    results = run(range(2000), kind())
    assert 100 < sum(results) < 1900


@pytest.mark.slow
def test_accepted_mutants_compute_what_onnx_runtime_computes():
    runtime = pytest.importorskip("onnxruntime")
    compared = 0
    for seed in range(5000, 5150):
        data = mutate(seed)
        if (loaded := load(data)) is None:
            continue
        source, shapes, mod = loaded
        feeds = {s.name: feed(source, s, shapes[s.name]) for s in source.inputs}
        try:
            want = models.run_onnx(ModelProto.FromString(data), feeds)
        except runtime.capi.onnxruntime_pybind11_state.Fail:
            continue
        found = models.run_module(mod, list(feeds.values()))
        for a, b in zip(found, want, strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-3, err_msg=f"seed {seed}")
        compared += 1
    assert compared > 20


def feed(source, spec, shape):
    if spec.dtype.startswith("float"):
        return models.rng(1).normal(size=shape).astype(spec.dtype)
    return models.rng(1).integers(0, source.token_inputs.get(spec.name, 2), shape, spec.dtype)


@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
@given(st.binary(max_size=300))
def test_random_bytes_are_refused(data):
    with pytest.raises(TvmstructError):
        from_onnx(data)
