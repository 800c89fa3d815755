"""Signs of life on stderr for whatever takes more than two seconds."""

from collections.abc import Iterator
from contextlib import contextmanager
from threading import Timer

from rich.console import Console
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

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
