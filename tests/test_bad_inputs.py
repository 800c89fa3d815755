"""Any feed of a model gives ONNX Runtime's numbers or an InputError, never anything else."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as npst

import tvmstruct
from tests import models
from tvmstruct.errors import InputError
from tvmstruct.testing import tolerance

ROWS, LONGEST = 50, 32  # of the encoder's tables
BOUND = tolerance("float32", 256)
DTYPES = [
    "int64",
    "int32",
    "int8",
    "uint64",
    "uint8",
    "float32",
    "float64",
    "float16",
    "bool",
    ">i8",
]
SIDES = st.sampled_from([0, 1, 2, 3, 5, 8, 31, 32, 33])
QUICK = settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow])


@pytest.fixture(scope="module")
def model():
    source = tvmstruct.from_onnx(models.encoder_model())
    return tvmstruct.compile(source)


@pytest.fixture(scope="module")
def session():
    onnxruntime = pytest.importorskip("onnxruntime")
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    data = models.encoder_model().SerializeToString()
    return onnxruntime.InferenceSession(data, options, providers=["CPUExecutionProvider"])


def numbers(dtype: str) -> st.SearchStrategy:
    kind = np.dtype(dtype)
    if kind.kind == "f":
        return st.floats(width=8 * kind.itemsize) | st.sampled_from([0.0, 1.0, np.nan])
    if kind.kind == "b":
        return st.booleans()
    info = np.iinfo(kind)
    wild = st.sampled_from([max(-1, info.min), min(ROWS, info.max), info.min, info.max])
    mild = st.integers(0, min(ROWS - 1, info.max))
    return st.one_of(*[mild] * 30, wild)


def arrays(shape) -> st.SearchStrategy:
    return st.sampled_from(["int64"] * 8 + DTYPES).flatmap(
        lambda dtype: npst.arrays(dtype, shape, elements=numbers(dtype), fill=st.nothing())
    )


@st.composite
def feeds(draw):
    rank = draw(st.sampled_from([2, 2, 2, 2, 2, 2, 0, 1, 3]))
    shape = tuple(draw(st.lists(SIDES, min_size=rank, max_size=rank)))
    given = {}
    if draw(st.integers(0, 9)):
        given["input_ids"] = draw(arrays(shape))
    if draw(st.integers(0, 3)):
        other = draw(st.sampled_from([shape] * 8 + [shape[::-1], shape[1:], (1, *shape[1:])]))
        given["attention_mask"] = draw(
            arrays(other) if draw(st.integers(0, 9)) == 0 else masks(other)
        )
    if not draw(st.integers(0, 19)):
        given["surprise"] = np.zeros(shape)
    return given


def masks(shape) -> st.SearchStrategy:
    return npst.arrays("int64", shape, elements=st.integers(0, 1), fill=st.nothing())


@QUICK
@example({"input_ids": np.full((2, 3), -1), "attention_mask": np.ones((2, 3), np.int64)})
@example({"input_ids": np.full((2, 3), 10**9)})
@example({"input_ids": np.full((2, 3), np.nan)})
@example({"input_ids": np.zeros((0, 3), np.int64)})
@example({"input_ids": np.zeros((1, LONGEST + 1), np.int64)})
@example({"input_ids": np.zeros((1, LONGEST), np.int64)})
@example({"input_ids": np.zeros((2, 3), np.int64), "attention_mask": np.zeros((2, 3), np.int64)})
@given(feeds())
def test_the_right_numbers_or_an_input_error(model, session, given):
    ids, found, refused = given.get("input_ids"), None, ""
    try:
        found = model.run(given)["hidden"]
    except InputError as error:
        refused = str(error)
    if found is None:
        assert len(refused) > 20, "an error says what to do"
        assert not acceptable(given), refused
        return
    mask = given.get("attention_mask", np.ones(ids.shape))
    feed = {"input_ids": ids.astype(np.int64), "attention_mask": mask.astype(np.int64)}
    (want,) = session.run(None, feed)
    np.testing.assert_allclose(found, want, **BOUND)


def acceptable(given) -> bool:
    """Return whether a feed is one that a model has no reason to refuse."""
    ids, mask = given.get("input_ids"), given.get("attention_mask")
    return bool(
        ids is not None
        and set(given) <= {"input_ids", "attention_mask"}
        and ids.dtype == np.int64
        and ids.ndim == 2
        and ids.size
        and ids.shape[1] <= LONGEST
        and ids.min() >= 0
        and ids.max() < ROWS
        and (mask is None or (mask.dtype == np.int64 and mask.shape == ids.shape))
    )


@settings(max_examples=60, deadline=None)
@given(
    npst.arrays(
        st.sampled_from(["float32", "float16", "float64", "int64"]),
        st.tuples(st.sampled_from([0, 1, 2, 7]), st.sampled_from([23, 24])),
        elements=st.nothing() | st.integers(-100, 100),
        fill=st.nothing(),
    ),
    st.sampled_from([None, np.nan, np.inf, 3e38, 1e-45]),
)
def test_floats_give_the_right_numbers_or_an_input_error(given, special):
    model = _mlp()
    if special is not None and given.size and given.dtype.kind == "f":
        with np.errstate(over="ignore"):
            given[0, 0] = special
    try:
        found = model(given)
    except InputError:
        assert given.dtype in ("float64", "int64") or given.shape[1] != 24 or not given.size
        return
    (want,) = models.run_onnx(models.dense_model(), {"x": given.astype(np.float32)})
    finite = np.isfinite(want)
    np.testing.assert_array_equal(np.isfinite(found), finite)
    scale = max(1.0, float(np.abs(want[finite]).max(initial=0)))
    np.testing.assert_allclose(found[finite], want[finite], **tolerance("float32", 40, scale=scale))


_CACHE: list = []


def _mlp():
    if not _CACHE:
        source = tvmstruct.from_onnx(models.dense_model())
        _CACHE.append(tvmstruct.compile(source, buckets="exact"))
    return _CACHE[0]
