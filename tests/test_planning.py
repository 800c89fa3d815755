"""Plans: JSON in, JSON out, and errors that name layer, family, values and fix."""

from __future__ import annotations

import json
from pathlib import Path

import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import given, settings

from tests.catalogue import CASES, Case, normal
from tvmstruct.errors import PlanError
from tvmstruct.families import FAMILIES
from tvmstruct.planning import LayerPlan, Plan, apply_layer

PLAN = Plan(
    {
        "a.weight": LayerPlan("vvma", {"k": 4, "transposed": True}),
        "b.weight": LayerPlan("kronecker", {"r": 2, "a": (4, 9), "b": (6, 4)}),
        "c.weight": LayerPlan("bh4", {"b": 4, "decay": 0.5}),
    }
)


def test_json_round_trip() -> None:
    again = Plan.from_json(PLAN.to_json())
    assert dict(again) == dict(PLAN)
    assert list(again) == ["a.weight", "b.weight", "c.weight"]
    assert again["b.weight"].parameters["a"] == (4, 9)
    assert again["b.weight"].layer == "b.weight"


def test_a_plan_is_read_from_a_file(tmp_path: Path) -> None:
    path = tmp_path / "plan.json"
    path.write_text(PLAN.to_json())
    assert dict(Plan.from_json(path)) == dict(Plan.from_json(str(path))) == dict(PLAN)


def test_layers_not_named_stay_dense() -> None:
    assert PLAN.lookup("z.weight") is None
    assert PLAN.lookup("a.weight") == PLAN["a.weight"]
    assert len(Plan()) == 0
    assert dict(Plan.from_json('{"version": 1, "layers": {}}')) == {}


@pytest.mark.parametrize("case", CASES, ids=str)
def test_apply_layer_fits_the_planned_family(case: Case) -> None:
    parameters = json.loads(json.dumps(case.parameters))  # tuples become lists, as in a file
    found = apply_layer(LayerPlan(case.family, parameters, "x"), normal(*case.shape))
    assert found.family == case.family
    assert case.parameters.items() <= found.parameters.items()


def layer(entry: object) -> str:
    return json.dumps({"version": 1, "layers": {"q.weight": entry}})


BAD = {
    "layer 'q.weight': unknown family 'vmva'; known: low_rank, vvma, kronecker": layer(
        {"family": "vmva", "parameters": {"k": 4}}
    ),
    r"layer 'q.weight': vvma got the parameters {'n': 4}; unknown \['n'\], missing \['k'\]": layer(
        {"family": "vvma", "parameters": {"n": 4}}
    ),
    "layer 'q.weight': parameter k='32'; want a whole number": layer(
        {"family": "vvma", "parameters": {"k": "32"}}
    ),
    "layer 'q.weight': parameter k=True; want a whole number": layer(
        {"family": "vvma", "parameters": {"k": True}}
    ),
    "layer 'q.weight': parameter k=-2; want a whole number": layer(
        {"family": "vvma", "parameters": {"k": -2}}
    ),
    "parameter transposed=1; want a bool": layer(
        {"family": "vvma", "parameters": {"k": 2, "transposed": 1}}
    ),
    r"parameter a=\[1, 2, 3\]; want two such numbers": layer(
        {"family": "kronecker", "parameters": {"r": 2, "a": [1, 2, 3]}}
    ),
    "layer 'q.weight': is 7; want": layer(7),
    "layer 'q.weight': is .*'rank'.* and no other key": layer({"family": "low_rank", "rank": 3}),
    "family=None and parameters={}; want a string and an object": layer({}),
    "version is 2; this release reads version 1": '{"version": 2, "layers": {}}',
    "version is None": "{}",
    r"has the keys \['version'\]": '{"version": 1}',
    r"has the keys \['layer', 'layers', 'version'\]": '{"version": 1, "layers": {}, "layer": {}}',
    "not valid JSON: .*; was the file cut short": '{"version": 1, "layers": {',
    r"the names \['a'\] occur twice": '{"version": 1, "layers": {"a": {}, "a": {}}}',
    "cannot read 'nowhere.json'": "nowhere.json",
}


@pytest.mark.parametrize("message", BAD)
def test_bad_plans_say_what_is_wrong(message: str) -> None:
    with pytest.raises(PlanError, match=message):
        Plan.from_json(BAD[message])


def test_a_plan_file_must_hold_an_object(tmp_path: Path) -> None:
    path = tmp_path / "plan.json"
    path.write_text("[1, 2]")
    with pytest.raises(PlanError, match="the JSON is a list; want an object"):
        Plan.from_json(path)
    path.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(PlanError, match="cannot read"):
        Plan.from_json(path)


def test_parameters_that_do_not_fit_the_layer_name_it() -> None:
    plan = Plan({"enc.weight": LayerPlan("lgp_shuffle", {"g": 40})})
    with pytest.raises(
        PlanError, match=r"layer 'enc.weight': lgp_shuffle: g=40 .* 24x36 .* leave the layer out"
    ):
        apply_layer(plan["enc.weight"], normal(24, 36))


values = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=3)
trees = st.recursive(values, lambda t: st.lists(t, max_size=3) | st.dictionaries(st.text(), t))
entries = st.fixed_dictionaries(
    {}, optional={"family": st.sampled_from([*FAMILIES, "x"]) | values, "parameters": trees}
)
names = st.text(max_size=4)


@settings(max_examples=150, deadline=None)
@given(st.dictionaries(names, entries | trees, max_size=3) | trees)
def test_any_json_is_a_plan_or_a_plan_error(layers: object) -> None:
    try:
        plan = Plan.from_json(json.dumps({"version": 1, "layers": layers}))
    except PlanError:
        return
    assert dict(Plan.from_json(plan.to_json())).keys() == dict(plan).keys()


@settings(max_examples=60, deadline=None)
@given(
    st.sampled_from(sorted(set(FAMILIES) - {"bh4", "low_rank_lgp"})),
    st.integers(0, 40),
    st.integers(1, 12),
    st.integers(1, 12),
)
def test_any_parameter_fits_or_is_a_plan_error(family: str, value: int, p: int, q: int) -> None:
    name = next(iter(FAMILIES[family].required))
    w = np.ones((p, q)) + normal(p, q)
    try:
        found = apply_layer(LayerPlan(family, {name: value}, "x"), w)
    except PlanError as error:
        assert "layer 'x'" in str(error)  # noqa: PT017
    else:
        assert found.op.to_dense().shape == (p, q)
        assert np.isfinite(found.error)
