"""Operation classes read from a graph, against those of the configuration that wrote it."""

import pytest

from tvmstruct import models
from tvmstruct.errors import InputError
from tvmstruct.vta.graph_workload import source_workload
from tvmstruct.vta.operations import workload

SIZES = {"layers": 2, "seq": 24, "hidden": 96, "heads": 4, "ffn": 160}


@pytest.mark.parametrize("name", ["bert", "transformer"])
def test_graph_asks_for_what_its_configuration_says(name):
    config = models.config(name, **SIZES)
    want = workload(config)
    found = source_workload(name, models.source(config), 24)
    assert set(found.gemms) == set(want.gemms)
    for role in ("dot product", "softmax", "weighted sum", "activation", "activation ReLU"):
        assert found.work(role) == want.work(role), role
    assert sum(s.bytes for s in found.steps) == sum(s.bytes for s in want.steps)


def test_length_is_that_asked_for():
    config = models.config("bert", **SIZES)
    found = source_workload("bert", models.source(config), 7)
    assert {gemm.rows for gemm in found.gemms} == {7}
    assert found.classes[0] == "dense 96x96"


def test_model_without_matrices_is_refused():
    config = models.config("embedding", vocabulary=50, hidden=16)
    with pytest.raises(InputError, match="no constant matrix"):
        source_workload("embedding", models.source(config), 7)
