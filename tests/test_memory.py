"""``memory=``: three ways to cut attention and feed-forward compute the same in other memory."""

from __future__ import annotations

from functools import cache

import numpy as np
import pytest

import tvmstruct
from tests.models import run_onnx
from tvmstruct import models
from tvmstruct.compiler import MEMORIES
from tvmstruct.errors import InputError
from tvmstruct.planning import LayerPlan, Plan

WIDE = "hidden=64&heads=4&ffn=96"
NAMES = {
    "bert": f"bert?{WIDE}&layers=1&embeddings=false&seq=70",
    "transformer": f"transformer?{WIDE}&layers=1&embeddings=false&seq=33",
}


@cache
def compiled(name: str, memory: str) -> tvmstruct.CompiledModel:
    return tvmstruct.compile(models.source(models.parse(NAMES[name])), memory=memory)


def relax_output(model: tvmstruct.CompiledModel, inputs: dict[str, np.ndarray]) -> np.ndarray:
    (output,) = model.run(inputs).values()
    return output


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("memory", MEMORIES)
def test_every_cut_computes_the_same(name, memory):
    config = models.parse(NAMES[name])
    inputs = config.inputs(batch=2)
    (want,) = run_onnx(models.build(config), inputs)
    np.testing.assert_allclose(relax_output(compiled(name, memory), inputs), want, atol=2e-5)


def footprints(memory: str) -> list[int]:
    """Return the bytes per row at two lengths."""
    config = models.parse(NAMES["bert"])
    found = []
    for length in (128, 512):
        shapes = {n: _long(s, length) for n, s in config.shapes().items()}
        found.append(compiled("bert", memory).footprint(shapes).total // length)
    return found


def _long(shape: tuple[int, ...], length: int) -> tuple[int, ...]:
    return (shape[0], length, *shape[2:])


def test_partitioned_memory_grows_with_the_length_and_no_faster():
    short, long = footprints("minimal")
    assert long <= short
    short, long = footprints("auto")
    assert long <= 1.1 * short
    short, long = footprints("baseline")
    assert long > 2 * short


def test_minimal_holds_neither_projections_nor_hidden_features():
    (_, least), (_, usual), (_, most) = map(footprints, ("minimal", "auto", "baseline"))
    assert least < usual < 0.2 * most


def test_the_report_says_how_attention_is_cut():
    (record,) = (r for r in compiled("bert", "minimal").report().layers if r.form == "attention")
    assert "query.weight" in record.reason
    assert "head by head; each head into" in record.reason
    assert not [r for r in compiled("bert", "baseline").report().layers if r.form == "attention"]
    assert "MB planned" in " ".join(compiled("bert", "auto").report().notes)


def test_what_cannot_be_made_on_the_way_says_why():
    key = "encoder.layer.0.attention.self.key.weight"
    plan = Plan({key: LayerPlan("low_rank", {"r": 4})})
    source = models.source(models.parse(NAMES["bert"]))
    model = tvmstruct.compile(source, memory="minimal", plan=plan)
    reasons = [r.reason for r in model.report().layers if r.form.startswith("not rewritten")]
    assert any("key.weight is Product f32, want Dense f32" in reason for reason in reasons)


def test_unknown_memory_is_refused():
    with pytest.raises(InputError, match="memory='least' is unknown; known: auto, minimal"):
        tvmstruct.compile(models.source(models.parse(NAMES["bert"])), memory="least")
