"""Signs of life on stderr for whatever takes more than two seconds."""

from collections.abc import Iterator
from contextlib import contextmanager
from threading import Timer
from typing import Self

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    SpinnerColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

PATIENCE = 2.0  # seconds


@contextmanager
def working(message: str) -> Iterator[None]:
    """Show ``message`` while the body runs: a spinner with a clock, or one line in a log."""
    console = Console(stderr=True)
    if console.is_terminal:
        columns = SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn()
        with Progress(*columns, console=console, transient=True) as progress:
            progress.add_task(message, total=None)
            yield
        return
    timer = Timer(PATIENCE, console.print, [f"{message} ..."], {"markup": False})
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


class TuningProgress:
    """Progress of a search: kernel, trial, fastest so far against the default, time left.

    On a terminal a live line; in a log one line when a kernel is done.
    """

    def __init__(self, kernels: int, trials: int, *, enabled: bool) -> None:
        self.kernels, self.trials, self.enabled = kernels, trials, enabled
        self.console = Console(stderr=True, quiet=not enabled)
        self.live = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=20),
            MofNCompleteColumn(),
            TextColumn("{task.fields[best]}"),
            TimeRemainingColumn(),
            console=self.console,
            disable=not (enabled and self.console.is_terminal),
        )
        self.number, self.name, self.best = 0, "", ""

    def __enter__(self) -> Self:
        """Show what is to come."""
        self.live.start()
        self.total = self.live.add_task(
            "all kernels", total=self.kernels * self.trials, best="", visible=self.kernels > 1
        )
        return self

    def __exit__(self, *error: object) -> None:
        """Leave the last state on the screen."""
        self.live.stop()

    def start(self, name: str, done: int) -> None:
        """Begin the next kernel, of which ``done`` trials are known from earlier."""
        self.number, self.name, self.best = self.number + 1, name, ""
        self.task = self.live.add_task(name, total=self.trials, completed=done, best="")

    def advance(self, trials: int, best: float | None, default: float | None) -> None:
        """Show how far the kernel is; seconds are None before anything has run."""
        if best is not None:
            against = "" if default is None else f" (default {default * 1e6:.1f})"
            self.best = f"best {best * 1e6:.1f} us{against}"
        self.live.update(self.task, completed=trials, best=self.best)
        before = (self.number - 1) * self.trials
        self.live.update(self.total, completed=before + min(trials, self.trials))

    def finish(self) -> None:
        """End the kernel."""
        self.live.update(self.total, completed=self.number * self.trials)
        if not self.console.is_terminal:
            line = f"{self.number} of {self.kernels}: {self.name}: {self.best or 'nothing new'}"
            self.console.print(line, highlight=False, markup=False, soft_wrap=True)
