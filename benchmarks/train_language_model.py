"""AntMan on a word-level LSTM language model of BBC news: teacher, students, table.

Students start from random weights and see the same words in the same order, once with the labels
alone and once with the teacher's logits too (`tvmstruct.training.DistillationLoss`), with the
coefficients that the rule of the paper's section 4 gives. Run again after an interruption, it goes
on where it stopped:

    python benchmarks/train_language_model.py --out build/language_model --seed 1
"""

from __future__ import annotations

import json
import math
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import click
import torch
from language_latency import LENGTHS, measure
from language_runs import Run, Settings, held_out, parameters, quick, train
from language_text import Text, read_text
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from tvmstruct.recurrent_forms import Forms, antman, reduction
from tvmstruct.training import LanguageModel, Terms, choose_coefficients

LABELS = Terms(target=1.0)
STUDENTS: dict[str, Forms] = {
    "LGP-shuffle g=10": antman("lgp_shuffle", g_im=10, g_hm=10),
    "LowRank-LGP g=20 r=2": antman("low_rank_lgp", g_im=20, g_hm=20, r_im=2, r_hm=2),
    "LGP-shuffle g=25": antman("lgp_shuffle", g_im=25, g_hm=25),
}
COLUMNS = ("model", "distilled", "LSTM parameters", "all", "perplexity", "us/word", "in 100s")
LOG_EVERY = 50  # updates between lines where there is no terminal


class Experiment:
    """All runs of one seed, in a folder of checkpoints."""

    def __init__(self, text: Text, settings: Settings, folder: Path, seed: int) -> None:
        self.text, self.settings, self.folder, self.seed = text, settings, folder, seed
        self.console = Console(stderr=True)

    def model(self, forms: Forms, seed: int) -> LanguageModel:
        """Return initial weights: the same for every run with this seed."""
        torch.manual_seed(seed)
        s = self.settings
        return LanguageModel.of(len(self.text.words), s.hidden, s.layers, forms=forms)

    def run(self, run: Run, forms: Forms, teacher: LanguageModel | None = None) -> LanguageModel:
        """Return the trained model, with signs of life."""
        model = self.model(forms, run.seed)
        live = self.console.is_terminal
        columns = (TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn())
        with Progress(
            *columns, TimeRemainingColumn(), console=self.console, disable=not live
        ) as progress:
            task = progress.add_task(run.name, total=run.updates)

            def tick(at: int, loss: float) -> None:
                progress.update(task, completed=at, description=f"{run.name} {loss:.2f}")
                if not live and (at % LOG_EVERY == 0 or at == run.updates):
                    self.console.print(f"{run.name}: {at} of {run.updates}, loss {loss:.3f}")

            train(run, model, self.text, self.settings, self.folder, tick, teacher)
        return model

    def coefficients(self, teacher: LanguageModel) -> tuple[Terms, Terms]:
        """Return the coefficients, and the losses of three short runs with one term each."""
        forms = next(iter(STUDENTS.values()))
        losses: dict[str, float] = {}

        def alone(coefficients: Terms) -> Terms:
            name = max(asdict(coefficients), key=asdict(coefficients).__getitem__)
            s = self.settings
            run = Run(f"alone-{name}", s.alone, coefficients, s.student_rate, self.seed + 1)
            model = self.run(run, forms, None if name == "target" else teacher)
            found = held_out(model, self.text.valid, teacher)
            losses[name] = asdict(found)[name]
            return found

        return choose_coefficients(alone), Terms(**losses)

    def record(self, name: str, distilled: str, model: LanguageModel) -> dict[str, Any]:
        """Return what the table says of a model, but for its latency."""
        layers = model.recurrent.recurrent()
        return {
            "model": name,
            "distilled": distilled,
            "lstm": parameters(model.recurrent),
            "all": parameters(model),
            "reduction": reduction(layers[-1]),
            "perplexity": math.exp(held_out(model, self.text.test).target),
        }


def run_all(experiment: Experiment) -> tuple[dict[str, Any], dict[str, LanguageModel]]:
    """Return the figures and the trained models, teacher first."""
    settings, seed = experiment.settings, experiment.seed
    dense: Forms = (None, None)
    teacher = experiment.run(
        Run("teacher", settings.teacher, LABELS, settings.teacher_rate, seed), dense
    )
    coefficients, losses = experiment.coefficients(teacher)
    models = {"teacher": teacher}
    rows = [experiment.record("dense (teacher)", "-", teacher)]
    for name, forms in STUDENTS.items():
        for distilled in (False, True):
            label = f"{name}{', distilled' if distilled else ''}"
            run = Run(
                label.replace(" ", "-").replace(",", ""),
                settings.student,
                coefficients if distilled else LABELS,
                settings.student_rate,
                seed + 1,
            )
            model = experiment.run(run, forms, teacher if distilled else None)
            models[label] = model
            rows.append(experiment.record(name, "yes" if distilled else "no", model))
    found = {"coefficients": asdict(coefficients), "alone": asdict(losses), "rows": rows}
    return found, models


def add_latency(found: dict[str, Any], models: dict[str, LanguageModel], text: Text) -> None:
    """Add microseconds a word of the compiled models; distilled ones are as fast as the others."""
    kinds = {n: m for n, m in models.items() if "distilled" not in n}
    times = measure(kinds, text.test[: max(LENGTHS)])
    by_model = dict(zip(["dense (teacher)", *STUDENTS], times.values(), strict=True))
    for row in found["rows"]:
        row |= by_model[row["model"]]


def table(found: dict[str, Any]) -> str:
    """Return the table in Markdown."""
    full = found["rows"][0]
    lines = [" | ".join(COLUMNS), " | ".join("--:" if i > 1 else "---" for i in range(7))]
    for row in found["rows"]:
        cells = [
            row["model"],
            row["distilled"],
            f"{row['lstm']:,} ({full['lstm'] / row['lstm']:.1f}x)",
            f"{row['all']:,} ({full['all'] / row['all']:.1f}x)",
            f"{row['perplexity']:.1f}",
            *_latency(row),
        ]
        lines.append(" | ".join(cells))
    return "\n".join(f"| {line} |" for line in lines) + "\n"


def _latency(row: dict[str, Any]) -> list[str]:
    times = row.get("microseconds")
    return [f"{t:.1f}" for t in times.values()] if times else ["-"] * len(LENGTHS)


def caption(found: dict[str, Any]) -> str:
    """Return the sentences above the table."""
    s, c, a = found["settings"], found["coefficients"], found["alone"]
    return (
        f"`{found['command']}`\n\n"
        f"Word-level language model of BBC news: {found['train']:,} words to train, "
        f"{found['test']:,} to test, vocabulary {s['vocabulary']:,} ({found['unknown']:.1%} of the "
        f"test words are outside it), {s['layers']} LSTM layers of {s['hidden']}; the teacher has "
        f"{s['teacher']} updates of {s['rows'] * s['steps']} words, every student {s['student']} "
        f"from random weights; seed {found['seed']}. After {s['alone']} updates with one term "
        f"alone the losses were {a['target']:.3f} (labels), {a['mse']:.3f} (MSE) and "
        f"{a['kl']:.3f} (KL): coefficients 1, {c['mse']:.2f} and {c['kl']:.2f}. Microseconds a "
        "word are of the compiled model on one thread, batch 1, a word at a time and 100 at a "
        "time.\n"
    )


def _command() -> str:
    """Return the command of this run: its seed, and what is not as by default."""
    parts = ["python benchmarks/train_language_model.py"]
    context = click.get_current_context()
    for option in context.command.params:
        value = context.params[str(option.name)]
        usual = {None, option.get_default(context)}
        usual |= set() if option.secondary_opts else {False}  # a flag that is not given
        if option.name == "seed" or (option.name != "out" and value not in usual):
            switch = option.secondary_opts[0] if value is False else option.opts[0]
            parts.append(switch if isinstance(value, bool) else f"{switch} {value}")
    return " ".join(parts)


@click.command(help=__doc__)
@click.option("--out", type=click.Path(path_type=Path), default=Path("build/language_model"))
@click.option("--seed", default=1, show_default=True)
@click.option("--threads", default=1, show_default=True, help="of PyTorch, while training")
@click.option("--quick", "fast", is_flag=True, help="a small model, under two minutes")
@click.option("--student-updates", type=int, help="of every student, else as many as the default")
@click.option("--alone-updates", type=int, help="of the runs with one term of the loss")
@click.option("--articles", type=int, help="use so many articles only")
@click.option("--latency/--no-latency", default=True, help="compile the models and time them")
def main(
    out: Path,
    seed: int,
    threads: int,
    fast: bool,
    student_updates: int | None,
    alone_updates: int | None,
    articles: int | None,
    latency: bool,
) -> None:
    """Train, measure, and write ``result.json`` and ``result.md`` into the folder."""
    torch.set_num_threads(threads)
    settings = quick(Settings()) if fast else Settings()
    given = {"student": student_updates, "alone": alone_updates}
    settings = replace(settings, **{name: n for name, n in given.items() if n is not None})
    text = read_text(settings.vocabulary, seed, articles)
    experiment = Experiment(text, settings, out, seed)
    found, models = run_all(experiment)
    sizes = {"train": len(text.train), "test": len(text.test), "unknown": text.unknown}
    found |= {"command": _command(), "seed": seed, "settings": asdict(settings)} | sizes
    if latency:
        add_latency(found, models, text)
    out.mkdir(parents=True, exist_ok=True)
    (out / "result.json").write_text(json.dumps(found, indent=2) + "\n")
    (out / "result.md").write_text(caption(found) + "\n" + table(found))
    click.echo(table(found))


if __name__ == "__main__":
    main()
