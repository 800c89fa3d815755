"""Profiles in tests do not wait for the machine's limits to be measured."""

import pytest

from tvmstruct.profiling import run


@pytest.fixture(autouse=True)
def fixed_limits(monkeypatch):
    """Replace the measurement by 100 GFLOP/s and 50 GB/s; return the measurement."""
    measure = run.machine_limits
    monkeypatch.setattr(run, "machine_limits", lambda spec, threads, size: (100.0, 50.0))
    return measure
