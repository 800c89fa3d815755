"""``tune`` for VTA: the cycle model measures, records are kept and compiled with."""

from __future__ import annotations

import numpy as np
import pytest

import tvmstruct
from tests import models
from tvmstruct import ops
from tvmstruct.database import Database
from tvmstruct.errors import InputError, TuningError
from tvmstruct.progress import TuningProgress
from tvmstruct.vta.config import DEFAULT
from tvmstruct.vta.integer import IntLinear
from tvmstruct.vta.target import Accelerator
from tvmstruct.vta.tuning import MACHINE, Search, tuned_make, workload


def step() -> IntLinear:
    rng = np.random.default_rng(0)
    op = ops.Dense(rng.integers(-128, 128, (96, 80)).astype(np.int8))
    return IntLinear(op, np.full(80, 64, np.int32), np.full(80, 9, np.int32))


def search(folder, trials: int, seed: int = 0):
    database = Database(folder).create()
    found = Search(workload([step()], 24, DEFAULT), [step()], DEFAULT, database, seed)
    with TuningProgress(1, trials, enabled=False) as display:
        display.start("x", found.trials)
        return found.run(trials, 1, display)


def test_a_search_goes_on_where_it_stopped(tmp_path):
    first = search(tmp_path, 4)
    assert (first.trials, first.new_trials) == (4, 4)
    second = search(tmp_path, 7)
    assert (second.trials, second.new_trials) == (7, 3)
    assert second.best_seconds <= first.best_seconds <= first.default_seconds
    again = search(tmp_path, 7)
    assert again.new_trials == 0
    assert again.best_seconds == second.best_seconds


def test_records_are_compiled_with(tmp_path):
    what = workload([step()], 24, DEFAULT)
    database = Database(tmp_path).create()
    default = Accelerator(DEFAULT).kernels([step()], 24)[0]
    found = Search(what, [step()], DEFAULT, database)
    seconds = default.prediction.cycles / 1e8
    found._keep(None, seconds)
    choices = {"rows_last": 0, "n": 1, "g": 1, "m": 1, "columns": 1, "k": 1}
    choices |= {"x_places": 1, "w_places": 1, "sums_places": 1}
    found._keep(choices, seconds / 2)
    (tuned,) = tuned_make(Accelerator(DEFAULT), tmp_path)([step()], 24)
    assert len(tuned.launch.insn) > len(default.launch.insn)
    x = np.random.default_rng(1).integers(-128, 128, (24, 96)).astype(np.int8)
    np.testing.assert_array_equal(tuned.run(x), step().run(x))
    (other,) = tuned_make(Accelerator(DEFAULT), tmp_path)([step()], 23)
    assert other.launch.insn == Accelerator(DEFAULT).kernels([step()], 23)[0].launch.insn


def test_choices_of_another_version_are_left_alone(tmp_path):
    what = workload([step()], 24, DEFAULT)
    found = Search(what, [step()], DEFAULT, Database(tmp_path).create())
    found._keep(None, 1.0)
    found._keep({"n": 17}, 0.5)
    with pytest.warns(UserWarning, match="n=17 is no option"):
        (kernel,) = tuned_make(Accelerator(DEFAULT), tmp_path)([step()], 24)
    assert kernel.launch.insn == Accelerator(DEFAULT).kernels([step()], 24)[0].launch.insn
    with pytest.raises(TuningError, match="there is no such folder"):
        tuned_make(Accelerator(DEFAULT), tmp_path / "missing")


def test_launches_of_a_model_are_tuned(tmp_path):
    source = tvmstruct.from_onnx(models.dense_model())
    x = models.rng(1).normal(size=(40, 24)).astype(np.float32)
    report = tvmstruct.tune(
        source, "vta", shapes={"x": (6, 24)}, trials=2, database=tmp_path, calibration=x,
        progress=False,
    )  # fmt: skip
    assert [row.workload.shapes for row in report.rows] == [((6, 24), (6, 12))]  # one launch
    assert all(row.trials == 2 and row.best_seconds <= row.default_seconds for row in report.rows)
    (first, *_) = Database(tmp_path).records(report.rows[0].workload)
    assert first.machine == MACHINE
    model = tvmstruct.compile(source, "vta", calibration=x, database=tmp_path)
    assert model(x[:6]).shape == (6, 12)


def test_refusals(tmp_path):
    source = tvmstruct.from_onnx(models.dense_model())
    with pytest.raises(TuningError, match="measured by its cycle model; leave runner and rpc out"):
        tvmstruct.tune(source, "vta", rpc=("h", 1, "k"), database=tmp_path)
    with pytest.raises(InputError, match='calibration is for target="vta"'):
        tvmstruct.tune(source, calibration=np.ones((1, 24)), database=tmp_path)
