"""Options and fixtures that all tests share."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from tvmstruct.targets import ISAS, host_features

GOLDEN = Path(__file__).parent / "golden"


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add ``--update-golden``."""
    parser.addoption(
        "--update-golden", action="store_true", help="accept what the tests find as the new goldens"
    )


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Skip, and say so, where this CPU lacks what a test marked ``isa(name)`` needs."""
    have = host_features()
    for mark in item.iter_markers("isa"):
        name = mark.args[0]
        needs = next((isa.needs for isa in ISAS if isa.name == name), frozenset({name}))
        if missing := needs - have:
            pytest.skip(f"this CPU lacks {', '.join(sorted(missing))}, which {name} code needs")


@pytest.fixture
def rng() -> np.random.Generator:
    """Return a generator with a fixed seed."""
    return np.random.default_rng(20240607)


@pytest.fixture
def golden(request: pytest.FixtureRequest) -> Callable[[str, str], None]:
    """Return a check that ``text`` is what ``tests/golden/<name>.txt`` holds."""

    def check(name: str, text: str) -> None:
        path = GOLDEN / f"{name}.txt"
        text = text.rstrip() + "\n"
        if request.config.getoption("--update-golden"):
            path.parent.mkdir(exist_ok=True)
            path.write_text(text)
        assert path.exists(), f"{path.name} is missing; run pytest --update-golden"
        assert text == path.read_text(), f"{path.name} changed; accept with pytest --update-golden"

    return check
