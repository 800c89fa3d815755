"""Sweeps scale what they say, and refuse what a model does not have."""

import pytest

import tvmstruct
from tvmstruct.errors import InputError
from tvmstruct.models import config
from tvmstruct.profiling import sweep
from tvmstruct.profiling.sweep import check_axes

BERT = config("bert", layers=1, seq=4, hidden=32, heads=2, ffn=64, vocabulary=50)


def test_variants_of_a_built_in_model():
    seen = []

    class Watch:
        def __init__(self, message):
            seen.append(message)

        def __enter__(self):
            return self

        def __exit__(self, *error):
            pass

    found = sweep(BERT, ["seq", "ffn"], factor=2, runs=1, threads=1, watch=Watch)
    base, longer, wider = found
    assert [profile.label for profile in found] == ["base", "S-2x", "F-2x"]
    assert longer.shapes["input_ids"] == (1, 8)
    assert wider.shapes == base.shapes
    assert wider.row("linear 1").bytes - base.row("linear 1").bytes == 4 * 64 * (32 + 1 + 4)
    assert seen[0] == "profiling base (1 of 3)"


def test_shapes_of_a_compiled_model_are_scaled():
    model = tvmstruct.compile(tvmstruct.models.source(BERT), buckets="exact", threads=1)
    shapes = {spec.name: (3, 2) for spec in model.inputs}
    found = sweep(model, ["seq"], shapes, factor=2, runs=1)
    assert [profile.shapes["input_ids"] for profile in found] == [(3, 2), (3, 4)]


@pytest.mark.parametrize("axis", ["hidden", "ffn"])
def test_trained_weights_have_one_size(axis):
    source = tvmstruct.models.source(BERT)
    with pytest.raises(InputError, match="fixed by this model's weights; only seq"):
        check_axes(source, [axis])


def test_an_axis_that_is_unknown():
    with pytest.raises(InputError, match=r"unknown axis 'heads'; known: seq, hidden, ffn"):
        check_axes(BERT, ["heads"])


def test_an_axis_that_the_model_does_not_have():
    with pytest.raises(InputError, match="memory-network has no feed-forward size"):
        check_axes(config("memory-network"), ["ffn"])


def test_a_factor_of_1():
    with pytest.raises(InputError, match="factor=1; want 2 or more"):
        sweep(BERT, ["seq"], factor=1)
