"""One training run of a language model: resumes, logs, measures held-out perplexity."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from language_text import Text, streams
from torch import Tensor, nn

from tvmstruct.errors import ArtifactError
from tvmstruct.training import (
    DistillationLoss,
    LanguageModel,
    Terms,
    clip_gradients,
    load_checkpoint,
    save_checkpoint,
)

EVALUATION_ROWS, EVALUATION_STEPS = 16, 64
FLOOR = 0.001  # of the learning rate at the end
SHARED = ("hidden", "layers", "vocabulary", "rows", "steps", "warmup", "norm")  # of all runs


@dataclass(frozen=True)
class Settings:
    """Sizes of the model and of its training."""

    hidden: int = 400
    layers: int = 2
    vocabulary: int = 2000
    rows: int = 32  # streams side by side
    steps: int = 35  # of back-propagation through time
    teacher: int = 830  # updates: one pass over the text
    student: int = 800
    alone: int = 120  # with one term of the loss, for the coefficients
    teacher_rate: float = 2e-3  # of Adam
    student_rate: float = 3e-3
    warmup: int = 30
    norm: float = 1.0
    save: int = 50  # updates between checkpoints


@dataclass(frozen=True)
class Run:
    """A model to train: by ``coefficients``, on the teacher's logits where there is one."""

    name: str
    updates: int
    coefficients: Terms
    rate: float
    seed: int


Tick = Callable[[int, float], None]  # updates done, loss


def train(
    run: Run,
    model: LanguageModel,
    text: Text,
    settings: Settings,
    folder: Path,
    tick: Tick,
    teacher: LanguageModel | None = None,
) -> dict[str, Any]:
    """Train, going on where a checkpoint in ``folder`` stops; return seconds and losses."""
    file = folder / f"{run.name}.ckpt"
    loss = DistillationLoss(run.coefficients)
    optimiser = torch.optim.Adam(model.parameters(), lr=run.rate)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimiser, _rate(run.updates, settings.warmup))
    parts = {"optimiser": optimiser, "schedule": schedule}
    identity = {"run": asdict(run)} | {n: getattr(settings, n) for n in SHARED}
    ids = streams(text.train, settings.rows)
    torch.manual_seed(run.seed)
    at, extra = 0, {"place": 0, "state": None, "teacher": None, "seconds": 0.0, "losses": []}
    if file.exists():
        at, extra = load_checkpoint(file, model, parts=parts)
        if extra.pop("identity") != identity:
            raise ArtifactError(f"{file}: is of other settings; choose another folder")
        tick(at, extra["losses"][-1])
    model.train()
    while at < run.updates:
        start = time.perf_counter()
        x, y = _window(ids, extra, settings.steps)
        logits, state = model(x, extra["state"])
        extra["state"] = [s.detach() for s in state]
        value = loss(logits, _teach(teacher, x, extra), y)
        optimiser.zero_grad()
        value.backward()
        clip_gradients(model, settings.norm)
        optimiser.step()
        schedule.step()
        at += 1
        extra["seconds"] += time.perf_counter() - start
        extra["losses"].append(value.item())
        tick(at, value.item())
        if at % settings.save == 0 or at == run.updates:
            save_checkpoint(
                file, model, step=at, parts=parts, extra={**extra, "identity": identity}
            )
    model.eval()
    return extra


def _rate(updates: int, warmup: int) -> Callable[[int], float]:
    """Return the factor of the learning rate: a linear start, then half a cosine."""

    def factor(step: int) -> float:
        cosine = 0.5 * (1 + math.cos(math.pi * min(step / updates, 1)))
        return min(1.0, (step + 1) / warmup) * cosine + FLOOR

    return factor


def _window(ids: Tensor, extra: dict[str, Any], steps: int) -> tuple[Tensor, Tensor]:
    """Return the next (steps, rows) words and those that follow them."""
    if extra["place"] + steps + 1 > len(ids):
        extra |= {"place": 0, "state": None, "teacher": None}
    place = extra["place"]
    extra["place"] = place + steps
    return ids[place : place + steps], ids[place + 1 : place + steps + 1]


def _teach(teacher: LanguageModel | None, x: Tensor, extra: dict[str, Any]) -> Tensor | None:
    if teacher is None:
        return None
    with torch.no_grad():
        logits, state = teacher(x, extra["teacher"])
    extra["teacher"] = list(state)
    return logits


@torch.no_grad()
def held_out(model: LanguageModel, ids: Tensor, teacher: LanguageModel | None = None) -> Terms:
    """Return the three losses on held-out text, 0 for those that need a teacher without one.

    The model reads all of it once, in streams side by side, with its state carried along.
    """
    terms = DistillationLoss(Terms(1.0, *((1.0, 1.0) if teacher is not None else (0.0, 0.0))))
    text = streams(ids, min(EVALUATION_ROWS, len(ids) // 2))
    sums, count = torch.zeros(3, dtype=torch.float64), 0
    state = own = None
    for at in range(0, len(text) - 1, EVALUATION_STEPS):
        y = text[at + 1 : at + 1 + EVALUATION_STEPS]
        x = text[at : at + len(y)]
        logits, state = model(x, state)
        known = None
        if teacher is not None:
            known, own = teacher(x, own)
        sums += y.numel() * torch.stack(terms.terms(logits, known, y)).double()
        count += y.numel()
    return Terms(*(sums / count).tolist())


def parameters(module: nn.Module) -> int:
    """Return the number of trained numbers."""
    return sum(p.numel() for p in module.parameters())


def quick(settings: Settings) -> Settings:
    """Return the same in under two minutes: what a test and a first try run."""
    return replace(
        settings, hidden=100, vocabulary=500, teacher=120, student=60, alone=20, save=20, rows=16
    )
